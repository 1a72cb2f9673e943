"""What a run goes on in spite of is one line on stderr, whichever verb it is, and wherever the model ran."""

from __future__ import annotations

import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
from blt_edge.runtime import BltModel, BltWarning, FailedValidationWarning
from blt_edge.runtime.manifest import load_manifest, write_manifest
from blt_edge.tools.output import TextOutput, warning_lines
from support.chat import posix, start

ROWS = [
    {"check": "patcher: logits", "ok": True},
    {"check": "decoder: logits, cosine", "ok": False},
    {"check": "greedy: equal bytes of 12\x1b[2J", "ok": False},
]
FAILED = {"passed": False, "against": "a golden file", "data_bytes": 20, "rows": ROWS}
TOLD = (
    r"failed its last validation (decoder: logits, cosine; 'greedy: equal bytes of 12\x1b[2J'), it may not "
    "compute what the model does; blt-edge validate "
)


def record(bundle: Path, report: dict[str, Any] | None) -> None:
    write_manifest(bundle, load_manifest(bundle).with_validation(report))


VERBS = {
    "generate": "generate -m {bundle} -p x -n 2",
    "generate -q": "generate -m {bundle} -p x -n 2 -q",
    "score": "score -m {bundle} {text}",
    "patches": "patches -m {bundle} some",
    "chat": "chat -m {bundle} -n 2",
    "profile": "profile -m {bundle} --text {text} --prompt-bytes 8 --new-bytes 3 --repeat 1 --threads 1",
    "compare": "compare {bundle} --text {text} --prompts 1 --lead-bytes 2 --prompt-bytes 8 --repeat 1",
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_bundle_that_failed_its_validation_is_warned_of(cli, own_bundle, tmp_path: Path, verb: str) -> None:
    (tmp_path / "text").write_text("some text to read")
    command = VERBS[verb].format(bundle=own_bundle, text=tmp_path / "text").split()
    record(own_bundle, FAILED)
    result = cli(*command, stdin=b"", code=0)
    lines = [line for line in result.stderr.splitlines() if "warning:" in line]
    assert lines == [f"blt-edge: warning: {own_bundle} {TOLD}{own_bundle} shows by how much"]
    assert "validation" not in result.stdout


def test_verbs_that_judge_or_describe_do_not_warn(cli, own_bundle, tiny_model) -> None:
    record(own_bundle, FAILED)
    assert "FAILED (decoder: logits, cosine" in cli("inspect", own_bundle, code=0).stdout
    golden = tiny_model.checkpoint / "golden.safetensors"
    assert "warning" not in cli("validate", own_bundle, "--golden", golden, code=0).stderr
    assert load_manifest(own_bundle).failed_checks == ()


@posix
def test_a_server_warns_before_it_serves(own_bundle) -> None:
    pytest.importorskip("starlette", reason="needs starlette: pip install 'blt-edge[serve]'")
    record(own_bundle, FAILED)
    process = start("serve", "-m", own_bundle, "--port", 0, "-q", text=True)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[1] == (
        f"blt-edge: warning: {own_bundle} {TOLD}{own_bundle} shows by how much\n"
    )


def test_python_is_warned_once(own_bundle: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # neither of one that nobody compared, nor of one that passed
        for report in (None, {**FAILED, "passed": True, "rows": ROWS[:1]}):
            record(own_bundle, report)
            BltModel.load(own_bundle, threads=1)
    record(own_bundle, {"passed": "yes", "rows": [1]})
    with pytest.warns(FailedValidationWarning, match=r"validation \(it has no rows\)") as caught:
        BltModel.load(own_bundle, threads=1)
    assert [each.filename for each in caught] == [__file__]


def test_a_warning_in_the_middle_of_a_text_has_a_line_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("blt_edge.tools.output.is_terminal", lambda stream: True)
    before = warnings.showwarning
    with warning_lines():
        out = TextOutput(shown=True)
        for text in ("Once upon\n", "a time"):
            out.write(text.encode())
            warnings.warn(f"after {text!r}\x1b", BltWarning, stacklevel=1)
        out.write(b" there")
    assert warnings.showwarning is before
    told = [rf"blt-edge: warning: after {text!r}\x1b" for text in ("Once upon\n", "a time")]
    assert capsys.readouterr().err == f"{told[0]}\n\n{told[1]}\n"

"""What a run goes on in spite of is one line on stderr, whichever verb it is, and wherever the model ran."""

from __future__ import annotations

import re
import shutil
import signal
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from blt_edge.runtime import BltModel, BltWarning, FailedValidationWarning, NotValidatedHereWarning
from blt_edge.runtime.kernels import kernel_family
from blt_edge.runtime.manifest import load_manifest, write_manifest
from blt_edge.runtime.validation import ValidationRecord
from blt_edge.tools.output import TextOutput, warning_lines
from support.chat import posix, start
from support.processors import ARM, X86, become, elsewhere

ROWS = [
    {"check": "patcher: logits", "ok": True},
    {"check": "decoder: logits, cosine", "ok": False},
    {"check": "greedy: equal bytes of 12\x1b[2J", "ok": False},
]
FAILED = {"passed": False, "against": "a golden file", "data_bytes": 20, "rows": ROWS}
HERE = kernel_family()
TOLD = (
    r"failed its last validation (decoder: logits, cosine; 'greedy: equal bytes of 12\x1b[2J'), it may not "
    "compute what the model does; blt-edge validate "
)


def record(bundle: Path, *records: ValidationRecord) -> None:
    write_manifest(bundle, replace(load_manifest(bundle), validation=records))


def here(report: dict[str, Any]) -> ValidationRecord:
    return replace(elsewhere(HERE), report=report)


ELSEWHERE = (
    f"was validated on z80 with rounding, not on {HERE}, whose kernels may round otherwise; "
    "blt-edge validate "
)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from blt_edge.export import export_checkpoint
    from support.quantized import BLOCKY
    from support.random_models import write_random_model

    folder = tmp_path_factory.mktemp("quantized")
    write_random_model(BLOCKY, folder / "checkpoint")
    return export_checkpoint(folder / "checkpoint", folder / "bundle", precision="int8w", context=500)


@pytest.fixture
def quantized_bundle(quantized: Path, tmp_path: Path) -> Path:
    """A copy of it to change."""
    return Path(shutil.copytree(quantized, tmp_path / "quantized"))


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
    record(own_bundle, here(FAILED))
    result = cli(*command, stdin=b"", code=0)
    lines = [line for line in result.stderr.splitlines() if "warning:" in line]
    assert lines == [f"blt-edge: warning: {own_bundle} {TOLD}{own_bundle} shows by how much"]
    assert "validation" not in result.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_a_quantized_bundle_of_other_kernels_is_warned_of_once(
    cli, quantized_bundle: Path, tmp_path: Path, verb: str
) -> None:
    (tmp_path / "text").write_text("some text to read")
    record(quantized_bundle, elsewhere())
    command = VERBS[verb].format(bundle=quantized_bundle, text=tmp_path / "text").split()
    result = cli(*command, stdin=b"", code=0)
    lines = [line for line in result.stderr.splitlines() if "warning:" in line]
    assert lines == [f"blt-edge: warning: {quantized_bundle} {ELSEWHERE}{quantized_bundle} measures it here"]
    assert "validated" not in result.stdout


def test_verbs_that_judge_or_describe_do_not_warn(cli, own_bundle, tiny_model) -> None:
    golden = tiny_model.checkpoint / "golden.safetensors"
    for records in ([here(FAILED)], [elsewhere("z80 with rounding", "decoder: logits, cosine")]):
        record(own_bundle, *records)
        shown = cli("inspect", own_bundle, code=0)
        assert "FAILED (decoder: logits, cosine" in shown.stdout
        assert shown.stderr == ""
        assert "warning" not in cli("validate", own_bundle, "--golden", golden, code=0).stderr
        newest = load_manifest(own_bundle).validation[-1]
        assert (newest.kernels, newest.failed_checks) == (HERE, ())


@posix
def test_a_server_warns_before_it_serves(own_bundle: Path, quantized_bundle: Path) -> None:
    pytest.importorskip("starlette", reason="needs starlette: pip install 'blt-edge[serve]'")
    record(own_bundle, here(FAILED))
    record(quantized_bundle, elsewhere())
    for bundle, told in (
        (own_bundle, f"{TOLD}{own_bundle} shows by how much"),
        (quantized_bundle, f"{ELSEWHERE}{quantized_bundle} measures it here"),
    ):
        process = start("serve", "-m", bundle, "--port", 0, "-q", text=True)
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=60)[1] == f"blt-edge: warning: {bundle} {told}\n"


def test_python_is_warned_once(own_bundle: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # neither of one that nobody compared, nor of one that passed
        for records in ((), (here({**FAILED, "passed": True, "rows": ROWS[:1]}),)):
            record(own_bundle, *records)
            BltModel.load(own_bundle, threads=1)
    record(own_bundle, here({"passed": "yes", "rows": [1]}))
    with pytest.warns(FailedValidationWarning, match=r"validation \(it names no check\)") as caught:
        BltModel.load(own_bundle, threads=1)
    assert [each.filename for each in caught] == [__file__]


FINE, BAD = elsewhere(HERE), elsewhere(HERE, "logits")
OTHER, OTHER_BAD = elsewhere(), elsewhere("6502", "logits", "greedy")
UNNAMED, UNNAMED_BAD = elsewhere(None), elsewhere(None, "logits")
_FAILED = r"failed its last validation \(logits\), it may not compute"
_NOT_HERE = (
    r"was validated on {}, not on " + re.escape(HERE) + r", whose kernels may round otherwise; "
    r"blt-edge validate .* measures it here$"
)
_FAILED_THERE = (
    r"failed its validation on 6502 \(logits; greedy\), and had none on " + re.escape(HERE) + ", whose"
)


@pytest.mark.parametrize(
    ("records", "float32", "quantized"),
    [
        ([], None, None),
        ([FINE], None, None),
        ([BAD], _FAILED, _FAILED),
        # Of other kernels, what is wrong in float32 will be wrong here.
        ([OTHER], None, _NOT_HERE.format("z80 with rounding")),
        (
            [OTHER, elsewhere("b"), elsewhere("c"), elsewhere("d")],
            None,
            _NOT_HERE.format(".*; b; c and 1 more"),
        ),
        ([OTHER_BAD], _FAILED_THERE, _FAILED_THERE),
        ([OTHER_BAD, OTHER], _FAILED_THERE, _FAILED_THERE),
        # This processor's own record is what counts.
        ([OTHER, FINE], None, None),
        ([FINE, OTHER_BAD], None, None),
        ([BAD, OTHER], _FAILED, _FAILED),
        # One without a name may be of this processor.
        ([UNNAMED], None, None),
        ([UNNAMED_BAD], _FAILED, _FAILED),
        ([UNNAMED_BAD, FINE], None, None),
        ([UNNAMED, OTHER], None, _NOT_HERE.format("z80 with rounding")),
        ([UNNAMED, OTHER_BAD], _FAILED_THERE, _FAILED_THERE),
        ([UNNAMED_BAD, OTHER], _FAILED, _FAILED),
    ],
)
def test_which_records_are_a_reason_to_warn(
    own_bundle: Path, records: list[ValidationRecord], float32: str | None, quantized: str | None
) -> None:
    whole = load_manifest(own_bundle)
    # The graphs stay what they are: what is told depends on what the manifest says of them.
    rounded = {**whole.stages, "latent": replace(whole.stages["latent"], precision="int8w")}
    for stages, told in ((whole.stages, float32), (rounded, quantized)):
        write_manifest(own_bundle, replace(whole, stages=stages, validation=tuple(records)))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            BltModel.load(own_bundle, threads=1)
        assert [each.filename for each in caught] == [__file__] * (told is not None)
        if told is not None:
            kind = FailedValidationWarning if told == _FAILED else NotValidatedHereWarning
            assert caught[0].category is kind
            assert re.search(told, str(caught[0].message))
            assert "\n" not in str(caught[0].message)


def test_float16_differs_between_families_unless_both_are_x86(
    own_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_manifest(own_bundle)
    stages = {**whole.stages, "latent": replace(whole.stages["latent"], precision="fp16")}

    def told(*processor: str) -> int:
        become(monkeypatch, tmp_path, *processor)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", NotValidatedHereWarning)
            BltModel.load(own_bundle, threads=1, portable=True)
        return len(caught)

    loaded = BltModel.load(own_bundle, threads=1, portable=True)
    records = (elsewhere("x86-64 with AVX-512 VNNI"),)
    write_manifest(own_bundle, replace(whole, stages=stages, validation=records))
    assert (told("x86_64", X86), told("aarch64", ARM)) == (0, 1)
    # On a GPU, whatever the processor beside it.
    monkeypatch.setattr(
        "blt_edge.runtime.model.open_device",
        lambda *asked: (loaded._backends, replace(loaded.engine, kernels="TensorRT on Orin", threads=None)),
    )
    assert told("x86_64", X86) == 1


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

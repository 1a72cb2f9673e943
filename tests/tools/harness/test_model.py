"""The harness' questions against numbers made by hand from whole runs' logits."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from blt_edge.runtime import BltModel, BltWarning, OptionError, Sequence
from blt_edge.tools.harness import __main__ as program

pytest.importorskip("lm_eval")

from blt_edge.tools.harness.model import BltEdgeLM

ROOT = Path(__file__).parents[3]
TASKS = ROOT / "tests/data/harness"
PAIRS = [
    ("The cat sat on the ", "mat"),
    ("The cat sat on the ", "mats and the moon"),
    ("The cat sat on the ", "mat"),
    ("", "It was"),
    ("", "It is"),
    ("Grüße aus ", "北京"),
    ("one two", ""),
    ("The cat sat", " on the mat"),
    ("A long beginning that many have, " * 5 + "one", " and only one"),
    ("A long beginning that many have, " * 5 + "other", " and another"),
    ("A long beginning that many have, " * 5, "other"),
]


@pytest.fixture(scope="module")
def lm(tiny_model) -> BltEdgeLM:
    return BltEdgeLM(str(tiny_model.bundle), threads=1)


def asked(*arguments: object) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


def by_hand(model: BltModel, before: bytes, scored: bytes) -> tuple[float, bool]:
    """From the logits of all of it, in float64."""
    rows = model.logits(before + scored).astype(np.float64)[len(before) : len(before) + len(scored)]
    targets = [byte + 4 for byte in scored]
    total = 0.0
    greedy = True
    for row, target in zip(rows, targets, strict=True):
        total += row[target] - row.max() - math.log(np.exp(row - row.max()).sum())
        greedy &= int(np.argmax(np.where(np.isin(np.arange(260), [0, 1, 3]), -np.inf, row))) == target
    return total, greedy


def test_loglikelihood_is_what_whole_runs_give(lm: BltEdgeLM, model: BltModel) -> None:
    found = lm.loglikelihood([asked(*pair) for pair in PAIRS], disable_tqdm=True)
    for (context, continuation), (total, greedy) in zip(PAIRS, found, strict=True):
        expected = by_hand(model, context.encode(), continuation.encode())
        assert total == pytest.approx(expected[0], rel=1e-5, abs=1e-5)
        assert greedy is expected[1]
        assert type(total) is float
    assert found[0] == found[2]
    assert found[6] == (0.0, True)
    assert lm.loglikelihood([], disable_tqdm=True) == []


def test_what_greedy_decoding_chooses_is_told(lm: BltEdgeLM, model: BltModel) -> None:
    text = model.generate("Once upon ", max_new_bytes=9, temperature=0.0).data
    other = bytes([text[0] ^ 1]) + text[1:]
    context = "Once upon "
    requests = [asked(context, one.decode("utf-8", "surrogateescape")) for one in (text, other)]
    assert [greedy for _, greedy in lm.loglikelihood(requests, disable_tqdm=True)] == [True, False]


def test_the_end_of_what_does_not_fit_is_read(tiny_model, model: BltModel) -> None:
    small = BltEdgeLM(str(tiny_model.bundle), threads=1, max_length=16)
    context, continuation = "A context of more bytes than that, ", "and on"
    text = (context + continuation).encode()
    (found,) = small.loglikelihood([asked(context, continuation)], disable_tqdm=True)
    assert found[0] == pytest.approx(by_hand(model, text[-16:-6], text[-6:])[0], rel=1e-5)


def test_rolling_windows(tiny_model, model: BltModel) -> None:
    text = bytes(range(65, 110))
    small = BltEdgeLM(str(tiny_model.bundle), threads=1, max_length=16)
    # 45 bytes: 16 after BOS, 15 after one more byte, and 14 at the end of a full window.
    parts = [(0, 0, 16), (15, 16, 31), (29, 31, 45)]
    expected = sum(by_hand(model, text[start:first], text[first:end])[0] for start, first, end in parts)
    found = small.loglikelihood_rolling([asked(text.decode()), asked("")], disable_tqdm=True)
    assert found == [pytest.approx(expected, rel=1e-5), 0.0]
    (whole,) = BltEdgeLM(str(tiny_model.bundle), threads=1).loglikelihood_rolling(
        [asked(text.decode())], True
    )
    assert whole == pytest.approx(-model.score(text).bits * math.log(2), rel=1e-6)


def test_what_texts_begin_with_is_read_once(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    extend = Sequence.extend

    def counted(self: Sequence, ids):
        read.append(len(ids))
        return extend(self, ids)

    beginning = "All of these examples come first, whatever is asked. " * 4
    requests = [asked(f"{beginning}{name}: ", answer) for name in "abcd" for answer in ("yes", "no", "maybe")]
    shared, alone = (BltEdgeLM(str(tiny_model.bundle), threads=1, memory=memory) for memory in (None, 0))
    monkeypatch.setattr(Sequence, "extend", counted)
    found = shared.loglikelihood(requests, disable_tqdm=True)
    together = sum(read)
    assert len(beginning) <= together < len(beginning) + 150
    read.clear()
    again = alone.loglikelihood(requests, disable_tqdm=True)
    assert 4 * len(beginning) <= sum(read) < 5 * len(beginning)
    assert [total for total, _ in found] == pytest.approx([total for total, _ in again], rel=1e-5)


def test_text_is_generated_up_to_stop_strings(lm: BltEdgeLM, model: BltModel) -> None:
    whole = model.generate("Once upon ", max_new_bytes=24, temperature=0.0)
    stop = re.search("[ -~]{2}", whole.text).group()
    requests = [
        asked(
            "Once upon ", {"until": [stop, ""], "max_gen_toks": 24, "do_sample": False, "temperature": 0.7}
        ),
        asked("Once upon ", {"until": stop, "max_new_tokens": 24}),
        asked("Once upon ", {"max_gen_toks": 24}),
        asked("", {"max_tokens": 3, "until": None}),
    ]
    found = lm.generate_until(requests, disable_tqdm=True)
    assert found[:3] == [whole.text[: whole.text.index(stop)]] * 2 + [whole.text]
    assert found[3] == model.generate("", max_new_bytes=3, temperature=0.0).text


def test_sampling_goes_by_the_harness_seed(lm: BltEdgeLM) -> None:
    options = {"do_sample": True, "temperature": 1.0, "top_k": 50, "max_gen_toks": 12}
    texts = []
    for seed in (1, 1, 2):
        random.seed(seed)
        texts += lm.generate_until([asked("It ", options)], disable_tqdm=True)
    assert texts[0] == texts[1] != texts[2]


def test_tokens_of_several_bytes_and_windows_of_few(tiny_model, model: BltModel) -> None:
    small = BltEdgeLM(str(tiny_model.bundle), threads=1, max_length=40, bytes_per_token=4)
    prompt = "A prompt of more bytes than that."
    (found,) = small.generate_until([asked(prompt, {"max_gen_toks": 5})], disable_tqdm=True)
    assert found == model.generate(prompt[-20:], max_new_bytes=20, temperature=0.0).text
    with pytest.raises(OptionError, match="max_gen_toks asks for 40 bytes"):
        small.generate_until([asked(prompt, {"max_gen_toks": 10})], disable_tqdm=True)


def test_what_has_no_effect_is_told_once(lm: BltEdgeLM, tiny_model) -> None:
    requests = [asked("It ", {"max_gen_toks": 2, "num_beams": 4})] * 2
    with pytest.warns(BltWarning, match="num_beams=4") as told:
        lm.generate_until(requests, disable_tqdm=True)
    assert len(told) == 1
    with pytest.warns(BltWarning, match="batch_size 8"):
        BltEdgeLM(str(tiny_model.bundle), threads=1, batch_size=8, device="cuda:0", max_batch_size=None)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"dtype": "float32"}, "model_args has 'dtype'"),
        ({"max_length": 1}, "max_length is 1; allowed is a whole number from 2 to"),
        ({"pretrained": ""}, "model_args has no pretrained; give --model_args pretrained=BUNDLE"),
        ({"bytes_per_token": 0}, "bytes_per_token"),
        ({"device": "mps"}, "mps"),
        ({"memory": -1}, "memory"),
    ],
)
def test_arguments_that_are_refused(tiny_model, wrong: dict, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        BltEdgeLM(**{"pretrained": str(tiny_model.bundle), "threads": 1, **wrong})
    with pytest.raises(OptionError, match="model_args has no pretrained"):
        BltEdgeLM()


def test_no_chat_template_is_applied(lm: BltEdgeLM) -> None:
    assert lm.chat_template() == ""
    for ask in (lambda: lm.chat_template(True), lambda: lm.apply_chat_template([])):
        with pytest.raises(OptionError, match="chat templates are applied by blt-edge serve alone"):
            ask()


def test_an_error_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise OptionError("threads is 0")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", fail)
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert (ended.value.code, capsys.readouterr().err) == (2, "blt-edge: error: threads is 0\n")


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    with pytest.raises(SystemExit) as ended:
        program.main()
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert said.startswith("blt-edge: error: lm-evaluation-harness is missing")
    assert "[eval]" in said
    assert said.count("\n") == 1


def test_tasks_from_the_command_line(tiny_model, model: BltModel, tmp_path: Path) -> None:
    """Local tasks, without the network, in a process as a user starts it."""
    command = [sys.executable, "-m", "blt_edge.tools.harness", "--model", "blt-edge"]
    command += ["--model_args", f"pretrained={tiny_model.bundle},threads=1", "--include_path", str(TASKS)]
    command += [
        "--tasks",
        "blt_edge_choice,blt_edge_text,blt_edge_until",
        "--output_path",
        str(tmp_path / "out"),
    ]
    offline = dict.fromkeys(("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    environment = {**os.environ, **offline, "HF_HOME": str(tmp_path / "home")}
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    assert said.returncode == 0, said.stderr[-2000:]
    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())
    assert results["config"]["model_fingerprint"] == model.manifest.fingerprint
    results = results["results"]

    choices = [json.loads(line) for line in (TASKS / "choice.jsonl").read_text().splitlines()]
    right, right_by_length = [], []
    for one in choices:
        totals = [by_hand(model, one["context"].encode(), text.encode())[0] for text in one["choices"]]
        lengths = [len(text) for text in one["choices"]]
        right.append(int(np.argmax(totals)) == one["answer"])
        right_by_length.append(int(np.argmax(np.divide(totals, lengths))) == one["answer"])
    assert results["blt_edge_choice"]["acc,none"] == np.mean(right)
    assert results["blt_edge_choice"]["acc_norm,none"] == np.mean(right_by_length)

    texts = [json.loads(line)["text"].encode() for line in (TASKS / "text.jsonl").read_text().splitlines()]
    bits = sum(-by_hand(model, b"", text)[0] for text in texts) / math.log(2)
    per_byte = bits / sum(map(len, texts))
    assert results["blt_edge_text"]["bits_per_byte,none"] == pytest.approx(per_byte, rel=1e-5)
    assert results["blt_edge_text"]["byte_perplexity,none"] == pytest.approx(2**per_byte, rel=1e-5)
    assert results["blt_edge_until"]["exact_match,none"] == 0.0

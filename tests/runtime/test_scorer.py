"""Columns of texts against each text scored alone, however batches are cut and wherever they run."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from blt_edge.runtime import BltError, BltModel, OptionError, Scorer
from blt_edge.runtime.patching import PatchingRule
from blt_edge.runtime.scorer import COLUMNS
from hypothesis import given, settings
from hypothesis import strategies as st

TEXTS = [
    "Grüße aus",
    b"\x00\xff\x00",
    "two words\n",
    "a" * 70,
    b"",
    "x",
    " \t\n",
    "It was the best of times.",
]


@pytest.fixture(scope="module")
def scorer(tiny_bundle: Path) -> Scorer:
    return Scorer(tiny_bundle, device="cpu", threads=1, context=32)


def column(texts: list) -> np.ndarray:
    made = np.empty(len(texts), object)
    made[:] = texts
    return made


def same(one: dict, other: dict) -> bool:
    return list(one) == list(other) and all(
        one[name].dtype == other[name].dtype
        and (one[name].tolist() == other[name].tolist() or one[name].tobytes() == other[name].tobytes())
        for name in one
    )


def test_each_row_is_what_the_text_alone_gives(scorer: Scorer, model: BltModel) -> None:
    ids = np.arange(len(TEXTS))
    batch = {"id": ids, "text": column(TEXTS)}
    found = scorer(batch)
    assert list(found) == ["id", "text", *COLUMNS]
    assert {name: str(found[name].dtype) for name in COLUMNS} == COLUMNS
    assert found["id"] is ids
    assert list(batch) == ["id", "text"]
    for row, text in enumerate(TEXTS):
        data = text if isinstance(text, bytes) else text.encode()
        told = {name: found[name][row] for name in COLUMNS}
        if not data:
            assert "empty" in told.pop("error")
            assert math.isnan(told.pop("bits_per_byte"))
            assert set(told.values()) == {0}
            continue
        score = model.score(data, context=32)
        assert told["bits_per_byte"] == score.bits_per_byte
        assert told["bits"] == score.bits
        assert (told["bytes"], told["words"], told["error"]) == (len(data), len(data.split()), "")
        assert (told["patches"], told["windows"]) == (score.patches - score.windows, score.windows)


@settings(max_examples=15)
@given(cuts=st.lists(st.integers(0, len(TEXTS)), max_size=6), order=st.permutations(range(len(TEXTS))))
def test_no_row_depends_on_how_batches_are_cut(scorer: Scorer, cuts: list[int], order: list[int]) -> None:
    whole = scorer({"text": column(TEXTS)})
    edges = [0, *sorted(cuts), len(order)]
    parts = [order[first:last] for first, last in itertools.pairwise(edges)]
    batches = [scorer({"text": column([TEXTS[place] for place in part])}) for part in parts]
    for name in COLUMNS:
        again = np.concatenate([batch[name] for batch in batches])
        expected = whole[name][list(order)]
        assert again.dtype == expected.dtype
        assert again.tobytes() == expected.tobytes() if name != "error" else list(again) == list(expected)
    bits = [bit for batch in batches for bit in batch["bits"]]
    assert math.fsum(bits) == math.fsum(whole["bits"])


@pytest.mark.parametrize("kind", ["S", "U"])
def test_columns_of_fixed_width(scorer: Scorer, kind: str) -> None:
    texts = ["one", "another one", ""]
    found = scorer({"text": np.array(texts, kind)})
    expected = scorer({"text": column(texts)})
    assert all(same({name: found[name]}, {name: expected[name]}) for name in COLUMNS)


def test_what_is_no_text_has_a_row_that_says_so(scorer: Scorer) -> None:
    found = scorer({"text": column(["good", None, 3, "half \ud800", float("nan")])})
    assert found["error"][0] == ""
    assert [text.partition(" is ")[0].split()[:2] for text in found["error"][1:]] == [["the", "text"]] * 4
    assert "\n" not in "".join(found["error"])
    assert found["bytes"].tolist() == [4, 0, 0, 0, 0]


def test_an_empty_batch_loads_nothing(tmp_path: Path) -> None:
    found = Scorer(tmp_path / "not-there")({"text": np.empty(0, object)})
    assert {name: (str(found[name].dtype), len(found[name])) for name in COLUMNS} == {
        name: (dtype, 0) for name, dtype in COLUMNS.items()
    }


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({}, "no column 'text'"),
        ({"a": np.zeros(2)}, "the columns are: a"),
        ({"text": np.zeros(2)}, "float64"),
        ({"text": np.empty((2, 2), object)}, "2 axes"),
        ({"text": np.array(["a"]), "bytes": np.zeros(1)}, "rename it"),
        ({"text": np.array(["a"]), "id": np.zeros(2)}, "column 'id'"),
        ([1], "a dict of columns"),
    ],
)
def test_batches_that_are_refused(scorer: Scorer, batch: object, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        scorer(batch)


@pytest.mark.parametrize(
    "wrong",
    [
        {"device": "gpu9"},
        {"threads": 0},
        {"context": 1},
        {"rows": 0},
        {"prefill_chunk": 0},
        {"probe": 1},
        {"text": ""},
        {"text": "bits"},
        {"rule": "space"},
        {"fingerprint": 1},
        {"provider_options": {"a": 1}},
        {"provider_options": [1]},
    ],
)
def test_options_that_are_refused(tiny_bundle: Path, wrong: dict) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        Scorer(tiny_bundle, **wrong)


def test_another_bundle_under_the_same_path_is_refused(tiny_bundle: Path, model: BltModel) -> None:
    batch = {"text": column(["a"])}
    right = Scorer(tiny_bundle, threads=1, fingerprint=model.manifest.fingerprint)(batch)
    assert right["bytes"].tolist() == [1]
    with pytest.raises(BltError, match="another bundle"):
        Scorer(tiny_bundle, threads=1, fingerprint="0" * 64)(batch)


def test_a_rule_cuts_patches_and_another_column_holds_the_texts(tiny_bundle: Path, model: BltModel) -> None:
    rule = PatchingRule("static", patch_size=3)
    scorer = Scorer(str(tiny_bundle), threads=1, text="body", rule=rule)
    found = scorer({"body": np.array(["a text of some bytes"])})
    score = model.with_patching(rule).score("a text of some bytes")
    assert (found["patches"][0], found["bits"][0]) == (score.patches - 1, score.bits)


def test_a_pickle_holds_no_model(scorer: Scorer, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer({"text": column(["a"])})
    pickled = pickle.dumps(scorer)
    assert len(pickled) < 1000
    again = pickle.loads(pickled)
    assert again.model is scorer.model  # as it is unpickled for each task of a pool
    monkeypatch.chdir(tiny_bundle.parent)
    assert Scorer(tiny_bundle.name, device="cpu", threads=1, context=32).model is scorer.model


def test_processes_give_the_same(scorer: Scorer) -> None:
    """Also one that was forked after the model was loaded here, whose sessions do not work there."""
    batches = [{"text": column(TEXTS[start : start + 3])} for start in range(0, len(TEXTS), 3)]
    expected = [scorer(batch) for batch in batches]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.map(scorer, batches, chunksize=1)
    assert all(map(same, found, expected))


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_a_forked_process_loads_its_own(tiny_bundle: Path) -> None:
    code = (
        "import multiprocessing, numpy as np\n"
        "from blt_edge.runtime import Scorer\n"
        f"scorer = Scorer({str(tiny_bundle)!r}, threads=1)\n"
        "batch = {'text': np.array(['some text'])}\n"
        "here = scorer(batch)['bits'][0]\n"
        "with multiprocessing.get_context('fork').Pool(1) as pool:\n"
        "    assert pool.map(scorer, [batch])[0]['bits'][0] == here\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

"""Walks over texts that are read, guessed at, taken back, forked, saved and restored, against fresh runs."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from blt_edge.export.build_ort import build_engine
from blt_edge.runtime import BltModel, GenerationOptions, Sequence
from blt_edge.runtime.vocabulary import byte_ids, encode
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from .random_models import RandomModel, base_config, export_random_model
from .simulated_gpu import simulate, write_engines

__all__ = [
    "LAYOUTS",
    "WIDE",
    "SavingWalk",
    "Walk",
    "agree",
    "assert_like_fresh",
    "export_wide",
    "loaded",
    "walk",
]

# Heads that fused attention takes; windows that the texts cross many times.
WIDE = RandomModel(
    "wide",
    base_config(
        width=64,
        local_attention_window_len=8,
        patcher={"hidden_size": 64, "sliding_window": 12, "num_key_value_heads": 2},
        decoder={"num_key_value_heads": 2},
        encoder={"max_position_embeddings": 400},
    ),
    share=0.3,
)

LAYOUTS = ("ring", "ordered", "tensorrt", "cuda")
"""Portable graphs, an engine with fused attention, and two kinds of (simulated) GPU."""

TEXT_LIMIT = 300
LIMITS = {"prefill_chunk": 16, "rollback": 12}


def export_wide(folder: Path) -> Path:
    """A bundle of `WIDE` with an engine for this processor."""
    bundle = export_random_model(WIDE, folder)
    build_engine(bundle)
    return bundle


@contextmanager
def loaded(bundle: Path, layout: str, scratch: Path, rows: tuple[int, ...] = ()) -> Iterator[BltModel]:
    """The bundle with caches in this layout; on a simulated GPU its rules are looked after.

    rows: for how many texts at once TensorRT has plans.
    """
    if layout in ("ring", "ordered"):
        yield BltModel.load(bundle, "cpu", 1, portable=layout == "ring", **LIMITS)
        return
    own = Path(shutil.copytree(bundle, scratch / layout, ignore=shutil.ignore_patterns("engines")))
    if layout == "tensorrt":
        write_engines(own, layout, rows=rows, **LIMITS)
    with pytest.MonkeyPatch.context() as monkeypatch:
        driver = simulate(monkeypatch, layout)
        model = BltModel.load(own, layout, **LIMITS)
    yield model
    del model
    gc.collect()
    assert driver.broken == []


def agree(found: np.ndarray, wanted: np.ndarray) -> None:
    """Equal to 1e-5 of scale."""
    assert np.abs(found - wanted).max() <= 1e-5 * max(1.0, np.abs(wanted).max())


def assert_like_fresh(reference: BltModel, sequence: Sequence, data: bytes, then: bytes = b"a\xff b") -> None:
    """The sequence is what reading `data` from BOS gives, and goes on with `then` as that does."""
    assert sequence.ids.tolist() == encode(data).tolist()
    fresh = reference.sequence()
    fresh.append(encode(data))
    assert sequence.boundaries.starts == fresh.boundaries.starts
    assert sequence.patches_closed == fresh.patches_closed
    assert sequence.entropies is not None
    assert fresh.entropies is not None
    agree(sequence.entropies, fresh.entropies)
    agree(sequence.logits, fresh.logits)
    for ids in (byte_ids(then[:1]), byte_ids(then[1:])):  # a step and a chunk: together they read all caches
        ours = np.concatenate([result.logits for result in sequence.append(ids)])
        theirs = np.concatenate([result.logits for result in fresh.append(ids)])
        agree(ours, theirs)


class Walk(RuleBasedStateMachine):
    """Up to five sequences of one model, the bytes each has read, and what those give in a fresh run."""

    model: BltModel
    reference: BltModel
    folder: Path

    def __init__(self) -> None:
        super().__init__()
        first = self.model.sequence()
        first.append(encode(b""))
        self.texts: list[tuple[Sequence, bytes]] = [(first, b"")]
        self.saved: list[tuple[Path, bytes]] = []
        self.wanted: dict[bytes, np.ndarray] = {}

    def take(self, number: int) -> tuple[int, Sequence, bytes]:
        index = number % len(self.texts)
        return (index, *self.texts[index])

    @rule(
        number=st.integers(0, 4),
        data=st.one_of(
            st.binary(min_size=1, max_size=60),
            st.sampled_from([b"e", b" ", b"the ", b"\x00" * 30, b"a" * 25, b"of the lamp " * 6]),
        ),
    )
    def read(self, number: int, data: bytes) -> None:
        index, sequence, text = self.take(number)
        data = data[: TEXT_LIMIT - len(text)]
        sequence.append(byte_ids(data))
        self.texts[index] = sequence, text + data

    @rule(
        number=st.integers(0, 4),
        count=st.integers(1, 20),
        draft=st.sampled_from(["none", "decoder", "patcher", "lookup"]),
    )
    def step(self, number: int, count: int, draft: str) -> None:
        index, sequence, text = self.take(number)
        if len(text) + count > TEXT_LIMIT:
            return
        made = self.model.generate(
            b"", GenerationOptions(max_new_bytes=count, draft=draft, draft_length=5), sequence=sequence
        ).data
        fresh = self.reference.generate(text, GenerationOptions(max_new_bytes=count, draft="none"))
        assert made == fresh.data
        self.texts[index] = sequence, text + made

    @rule(number=st.integers(0, 4), count=st.one_of(st.integers(1, 12), st.integers(1, 90)))
    def back(self, number: int, count: int) -> None:
        index, sequence, text = self.take(number)
        count = min(count, len(text))
        sequence.roll_back(count)
        self.texts[index] = sequence, text[: len(text) - count]

    @precondition(lambda self: len(self.texts) < 5)
    @rule(number=st.integers(0, 4))
    def fork(self, number: int) -> None:
        _, sequence, text = self.take(number)
        other = sequence.fork()
        assert all(spent.calls == 0 for spent in other.times.values())
        self.texts.append((other, text))

    @precondition(lambda self: len(self.texts) > 1)
    @rule(number=st.integers(0, 4))
    def drop(self, number: int) -> None:
        del self.texts[self.take(number)[0]]

    def teardown(self) -> None:
        for sequence, text in self.texts:
            assert_like_fresh(self.reference, sequence, text)

    @invariant()
    def whatever_one_did_the_others_are_what_they_were(self) -> None:
        for sequence, text in self.texts:
            if text not in self.wanted:
                self.wanted[text] = self.reference.logits(text)[-1]
            assert sequence.length == 1 + len(text)
            agree(sequence.logits, self.wanted[text])
            assert 0 <= sequence.own_bytes <= sequence.state_bytes


class SavingWalk(Walk):
    """The same, with states that go to files and come back."""

    @rule(number=st.integers(0, 4))
    def save(self, number: int) -> None:
        _, sequence, text = self.take(number)
        path = self.folder / f"{len(self.saved) % 3}.state"
        sequence.save(path)
        self.saved = [one for one in self.saved if one[0] != path] + [(path, text)]

    @precondition(lambda self: self.saved)
    @rule(number=st.integers(0, 4), which=st.integers(0, 2))
    def restore(self, number: int, which: int) -> None:
        path, text = self.saved[which % len(self.saved)]
        index = number % len(self.texts)
        self.texts[index] = self.model.restore(path), text


def walk(kind: type[Walk], model: BltModel, reference: BltModel, folder: Path, examples: int) -> None:
    """Run walks of a kind over a model; reference: what fresh runs are made with."""
    machine = type(kind.__name__, (kind,), {"model": model, "reference": reference, "folder": folder})
    run_state_machine_as_test(
        machine, settings=settings(deadline=None, max_examples=examples, stateful_step_count=12)
    )

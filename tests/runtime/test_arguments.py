"""Public functions and wrong arguments: taken for what they mean, or refused by us in one line, never by
numpy, the engine or Python."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blt_edge.runtime import BltError, BltModel, GenerationOptions, OptionError
from blt_edge.runtime.vocabulary import byte_ids, checked_ids, decode, encode

NAN = float("nan")
POOL: list[Any] = [
    *(None, True, False, -1, 0, 2, 1.5, NAN, float("inf"), 10**30, -(10**400), 1j),
    *("", "x", "Grüße 🐇", "\ud800", "caf\udce9", b"", b"\xff", bytearray(b"ab"), memoryview(b"cd")),
    *(
        [],
        [1],
        [1, 70],
        [[1, 70]],
        [[1], [2, 3]],
        [260],
        [-1],
        [1.0],
        [True],
        ["1"],
        [None],
        (1,),
        {},
        {"a": 1},
    ),
    *(set(), range(0), range(1, 9, 2), range(5), object(), print, Path("nowhere")),
    *(np.int64(2), np.float32(NAN), np.uint8(9), np.bool_(True), np.str_("y"), np.bytes_(b"z")),
    *(
        np.array(1),
        np.array([1, 80]),
        np.array([[1, 80]]),
        np.array([1.5]),
        np.array([True]),
        np.array(["a"]),
    ),
    *(np.array([2**63], np.uint64), np.empty(0), np.array([object()]), GenerationOptions(max_new_bytes=2)),
    *(threading.Event(), OptionError("x")),
]
FIELDS = [field.name for field in dataclasses.fields(GenerationOptions) if field.name != "max_new_bytes"]
CALLS: dict[str, Callable[[BltModel, Any], Any]] = {
    "logits": lambda model, value: model.logits(value),
    "entropies": lambda model, value: model.entropies(value),
    "patch_lengths": lambda model, value: model.patch_lengths(value),
    "trace": lambda model, value: model.trace(value),
    "score": lambda model, value: model.score(value),
    "score context": lambda model, value: model.score(b"ab", context=value),
    "score progress": lambda model, value: model.score(b"ab", progress=value),
    "prompt": lambda model, value: model.generate(value, max_new_bytes=2),
    "options": lambda model, value: model.generate("a", value, max_new_bytes=0),
    "options alone": lambda model, value: model.stream("a", value),
    "sequence": lambda model, value: model.generate("a", max_new_bytes=2, sequence=value),
    "cancel": lambda model, value: model.stream("a", cancel=value),
    "append": lambda model, value: model.sequence().append(value),
    "extend": lambda model, value: list(model.sequence().extend(value)),
    "roll_back": lambda model, value: begun(model).roll_back(value),
    "patch_values": lambda model, value: begun(model).patch_values(value),
    "encode": lambda model, value: encode(value),
    "byte_ids": lambda model, value: byte_ids(value),
    "decode": lambda model, value: decode(value),
    **{
        f"load {name}": lambda model, value, name=name: BltModel.load(model.path, **{name: value})
        for name in ("device", "threads", "verify", "prefill_chunk", "rollback", "portable", "probe")
    },
    "load provider_options": lambda model, value: BltModel.load(model.path, "cuda", provider_options=value),
    "load path": lambda model, value: BltModel.load(value),
    "load progress": lambda model, value: BltModel.load(model.path, progress=value),
    **{
        f"field {name}": lambda model, value, name=name: model.generate("a", max_new_bytes=2, **{name: value})
        for name in FIELDS
    },
}


def begun(model: BltModel) -> Any:
    sequence = model.sequence()
    sequence.append(encode("some text"))
    return sequence


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("error", "ignore::blt_edge.runtime.errors.BltWarning")
def test_what_is_wrong_is_refused_by_us(model: BltModel, name: str) -> None:
    refusals = []
    for value in POOL:
        try:
            CALLS[name](model, value)
        except BltError as error:
            refusals.append(str(error))
    assert refusals
    assert max(map(len, refusals)) < 400
    assert not any("\n" in told for told in refusals)


@pytest.mark.parametrize("text", ["", "x", "Grüße aus Straßburg 🐇", "caf\udce9"])
def test_text_is_its_bytes_wherever_bytes_are_taken(model: BltModel, text: str) -> None:
    data = text.encode("utf-8", "surrogateescape")
    for call in (model.logits, model.entropies, model.patch_lengths, encode, byte_ids):
        for same in (bytearray(data), memoryview(data), text):
            assert np.array_equal(call(data), call(same))
    for mine, theirs in zip(model.trace(text).values(), model.trace(data).values(), strict=True):
        assert np.array_equal(mine, theirs)
    if text:
        assert model.score(text).bits_per_byte == model.score(data).bits_per_byte
    assert model.generate(text, max_new_bytes=5).data == model.generate(data, max_new_bytes=5).data


def test_files_are_scored_as_bytes(model: BltModel, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("Grüße aus Straßburg", "utf-8")
    with (tmp_path / "text").open("rb") as data:
        assert model.score(data).bits_per_byte == model.score("Grüße aus Straßburg").bits_per_byte
    with (tmp_path / "text").open(encoding="utf-8") as text, pytest.raises(OptionError, match=r"\('rb'\)$"):
        model.score(text)  # type: ignore[arg-type]


def test_options_by_name_are_the_same_as_in_an_object(model: BltModel) -> None:
    named = {"max_new_bytes": 12, "temperature": 0.9, "seed": 5, "stop": ["zz"]}
    wanted = model.generate("a", GenerationOptions(**named))
    assert model.generate("a", **named).data == wanted.data
    assert b"".join(chunk.data for chunk in model.stream("a", **named)) == wanted.data
    # What is not named is the model's own default.
    spec = dataclasses.replace(model.manifest.generation, options={"max_new_bytes": 3, "temperature": 0.9})
    manifest = dataclasses.replace(model.manifest, generation=spec)
    own = BltModel(manifest, model._backends, model._table, model.limits, model.path)
    assert own.generate("a", seed=5).data == wanted.data[:3]


def test_options_that_contradict_are_named(model: BltModel) -> None:
    with pytest.raises(OptionError, match=r"^options and temperature, seed are given; give one or the other"):
        model.generate("a", GenerationOptions(), temperature=0.5, seed=1)
    with pytest.raises(
        OptionError, match=r"^there is no option 'max_tokens'; allowed are max_new_bytes, temp"
    ):
        model.generate("a", max_tokens=5)
    with pytest.raises(OptionError, match=r"^temperature is nan; allowed is a finite number"):
        model.stream("a", temperature=NAN)  # nothing was asked for yet
    with pytest.raises(OptionError, match="allowed is GenerationOptions, or its fields by name"):
        model.generate("a", {"temperature": 1})


def test_a_sequence_of_another_model_is_refused(model: BltModel, tight: BltModel) -> None:
    other = tight.sequence()
    with pytest.raises(
        OptionError, match=r"^sequence is <Sequence of 0 ids.*what sequence\(\) of this model"
    ):
        model.generate("a", sequence=other)


def test_ids_and_counts_of_numpy_are_numbers(model: BltModel) -> None:
    sequence, wanted = begun(model), begun(model)
    sequence.append([np.uint8(70), 71])
    sequence.append(np.array([72, 73], np.int16))
    wanted.append(np.array([70, 71, 72, 73]))
    assert np.allclose(sequence.logits, wanted.logits, atol=1e-5)
    sequence.roll_back(np.int32(4))
    assert np.allclose(sequence.logits, model.logits("some text")[-1], atol=1e-5)
    assert checked_ids([]).dtype == np.int64
    with pytest.raises(OptionError, match=r"^roll back True bytes: 0 to 9 can be taken back"):
        sequence.roll_back(True)
    with pytest.raises(OptionError, match=r"^id 260 is outside the vocabulary; allowed are 0 to 259"):
        sequence.append([70, 260])
    with pytest.raises(
        OptionError, match=r"^ids are \[\[70\]\]; allowed is a list of whole numbers from 0 to"
    ):
        sequence.append([[70]])
    assert np.allclose(sequence.logits, model.logits("some text")[-1], atol=1e-5)
    with pytest.raises(OptionError, match="nothing was read yet"):
        _ = model.sequence().logits


def test_a_model_says_what_it_is(model: BltModel, tiny_bundle: Path) -> None:
    assert repr(model).startswith(f"<BltModel {str(tiny_bundle)!r}: fp32, tables fp32; ")
    assert repr(model).endswith(" MB of tables; 400 positions; portable graphs>")
    assert repr(begun(model)) == "<Sequence of 10 ids, BOS included, in 3 patches>"

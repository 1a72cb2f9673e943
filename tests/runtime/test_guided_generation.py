"""Texts that must fit do, whatever is guessed; what they fit is judged by jsonschema and by re."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from blt_edge.runtime import BltModel, Constraint, GenerationOptions, OptionError
from blt_edge.runtime.constraint_automata import cut_character
from blt_edge.runtime.guide import Guide, new_guide
from blt_edge.runtime.sampling import Sampler, probabilities
from blt_edge.runtime.vocabulary import BYTE_OFFSET, EOS, byte_ids, encode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.fitting_texts import HAND_MADE, PATTERNS, SCHEMAS, check_fits_pattern, check_fits_schema

pytest.importorskip("llguidance")
DRAFTS = ["none", "auto", "decoder", "patcher", "lookup"]
RECORD = {
    "type": "object",
    "properties": {
        "name of the animal": {"type": "string", "maxLength": 6},
        "years it has lived": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind of the animal": {"enum": ["cat", "catfish", "dog"]},
    },
    "required": ["name of the animal", "years it has lived", "kind of the animal"],
    "additionalProperties": False,
}


def fitting(model: BltModel, options: GenerationOptions, prompt: bytes = b"Once") -> str | None:
    """The text, where it ended by itself; then nothing could be added, or the model ended it."""
    result = model.generate(prompt, options)
    assert result.finish_reason in ("eos", "length")
    if result.finish_reason == "length":
        return None
    return result.data.decode()  # strictly


@settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
@given(SCHEMAS, st.sampled_from([0.0, 1.0]), st.sampled_from(["none", "auto", "decoder"]), st.integers(0, 3))
def test_any_schema_is_kept(model: BltModel, schema: Any, temperature: float, draft: str, seed: int) -> None:
    constraint = Constraint.json_schema(schema)
    options = GenerationOptions(90, temperature=temperature, seed=seed, draft=draft, constraint=constraint)
    text = fitting(model, options)
    if text is not None:
        check_fits_schema(text, schema)


@pytest.mark.parametrize("name", HAND_MADE)
def test_what_schemas_can_say_is_kept(model: BltModel, name: str) -> None:
    ended = 0
    for seed in range(6):
        constraint = Constraint.json_schema(HAND_MADE[name])
        options = GenerationOptions(120, temperature=0.9, seed=seed, constraint=constraint)
        text = fitting(model, replace(options, logit_bias={ord("n") + BYTE_OFFSET: 50}))
        if text is not None:
            check_fits_schema(text, HAND_MADE[name])
            ended += 1
    assert ended


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(PATTERNS, st.sampled_from([0.0, 1.0]), st.sampled_from(["none", "auto", "decoder"]), st.integers(0, 3))
def test_any_pattern_is_kept(
    model: BltModel, pattern: str, temperature: float, draft: str, seed: int
) -> None:
    constraint = Constraint.regex(pattern)
    options = GenerationOptions(40, temperature=temperature, seed=seed, draft=draft, constraint=constraint)
    text = fitting(model, options)
    if text is not None:
        check_fits_pattern(text, pattern)


CASES: dict[str, dict[str, Any]] = {
    "record": {"constraint": Constraint.json_schema(RECORD)},
    "object": {"constraint": Constraint.json_object()},
    "pattern": {"constraint": Constraint.regex("(the cat [a-z]{1,3} and )+the end")},
    "lark": {"constraint": Constraint.grammar('start: line+\nline: "> " /[a-z ]{3,9}/ "\\n"')},
    "gbnf": {"constraint": Constraint.grammar('root ::= ("always" [a-d] "the same")+')},
    "choice": {"constraint": Constraint.choice(["a long text", "a long tale", "a longer tale", "b"])},
    "utf8": {"utf8": True},
    "both": {"utf8": True, "constraint": Constraint.json_schema(RECORD)},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
        {"repetition_penalty": 1.4, "logit_bias": {100: 5, 101: -100}},
    ],
    ids=["greedy", "warm", "filtered", "greedy-penalised"],
)
def test_drafts_change_no_text_that_must_fit(model: BltModel, name: str, how: dict[str, Any]) -> None:
    length = 90 if name in ("record", "both") else 50  # of which other texts have no end anyway
    options = GenerationOptions(length, seed=1, draft="none", **how, **CASES[name])
    plain = model.generate(b"Once upon", options)
    assert plain.stats.forced == plain.stats.drafted == 0
    for draft, length in (("auto", None), ("decoder", 5), ("patcher", None), ("lookup", None)):
        drafted = model.generate(b"Once upon", replace(options, draft=draft, draft_length=length))
        assert drafted.data == plain.data
        assert drafted.finish_reason == plain.finish_reason
        assert drafted.stats.patches == plain.stats.patches
        assert drafted.stats.accepted <= drafted.stats.drafted
        if name == "record":
            assert drafted.stats.forced > 50


@pytest.mark.parametrize("limits", [(0, 16), (3, 16), (64, 1), (64, 4)])
def test_what_is_forced_fits_whatever_limits_a_model_was_loaded_with(
    model: BltModel, limits: tuple[int, int]
) -> None:
    small = BltModel.load(model.path, threads=1, rollback=limits[0], prefill_chunk=limits[1])
    options = GenerationOptions(200, **CASES["record"])
    assert small.generate(b"Once", options).data == model.generate(b"Once", options).data


def test_forced_bytes_are_read_together(model: BltModel) -> None:
    options = GenerationOptions(300, draft="lookup", **CASES["record"])
    stats = model.generate(b"Once", options).stats
    assert stats.stage_calls["decoder"] <= stats.new_bytes - stats.forced - stats.accepted + 1


def test_a_text_ends_where_nothing_can_be_added(model: BltModel) -> None:
    for texts, count in ((["abc"], 3), (["abc"], 9), ([""], 9)):
        options = GenerationOptions(count, constraint=Constraint.choice(texts))
        result = model.generate(b"Once", options)
        assert (result.text, result.finish_reason) == (texts[0], "eos")
    cut = model.generate(b"Once", GenerationOptions(2, constraint=Constraint.choice(["abc"])))
    assert (cut.text, cut.finish_reason) == ("ab", "length")


@pytest.mark.parametrize("draft", DRAFTS)
def test_the_sequence_stands_behind_the_text(model: BltModel, draft: str) -> None:
    sequence = model.sequence()
    options = GenerationOptions(
        99, draft=draft, constraint=Constraint.choice(["one and two", "one and three"])
    )
    first = model.generate(b"Once", options, sequence=sequence)
    assert sequence.ids.tolist() == encode(b"Once" + first.data).tolist()
    second = model.generate(b", then ", options, sequence=sequence)
    assert sequence.ids.tolist() == encode(b"Once" + first.data + b", then " + second.data).tolist()


def test_without_a_constraint_a_text_is_what_it_was(model: BltModel) -> None:
    for seed in range(3):
        options = GenerationOptions(40, temperature=1.0, seed=seed)
        allowed = np.ones(260, np.bool_)
        result = model.generate(b"Once", options)
        sampler, sequence = Sampler(options), model.sequence()
        logits = sequence.append(encode(b"Once"))[0].logits[-1]
        for byte in result.data:
            number = sampler(logits, sequence.ids, allowed)
            assert number == byte + BYTE_OFFSET
            logits = sequence.append([number])[0].logits[-1]


@pytest.mark.parametrize(
    "how", [{}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.6}, {"logit_bias": {101: 1.0}}]
)
def test_choices_are_distributed_as_the_model_s_among_what_is_allowed(
    model: BltModel, how: dict[str, Any]
) -> None:
    constraint = Constraint.regex("[a-e]|$")
    options = GenerationOptions(1, temperature=1.0, constraint=constraint, **how)
    logits = model.logits(b"Once")[-1].astype(np.float64)
    for number, bias in options.biases:
        logits[number] += bias
    # By definition: the model's distribution on what may come, then the filters on that.
    ids = np.array([EOS, *range(ord("a") + 4, ord("e") + 5)])
    chances = np.exp(logits[ids] - logits[ids].max())
    chances /= chances.sum()
    order = np.argsort(-chances)
    kept = np.ones(len(ids), bool)
    if "top_k" in how:
        kept[order[how["top_k"] :]] = False
    if "top_p" in how:
        kept[order[1:][np.cumsum(chances[order])[:-1] >= how["top_p"]]] = False
    if "min_p" in how:
        kept &= chances >= how["min_p"] * chances.max()
    chances = np.where(kept, chances, 0) / chances[kept].sum()
    guide = new_guide(options)
    assert guide is not None
    found = probabilities(model.logits(b"Once")[-1], options, allowed=guide.mask())
    np.testing.assert_allclose(found[ids], chances, atol=1e-6)
    assert found.sum() == pytest.approx(found[ids].sum())
    sampler = Sampler(replace(options, seed=11))
    logits32 = model.logits(b"Once")[-1]
    draws = Counter(sampler(logits32, [], guide.mask()) for _ in range(4000))
    for number, chance in zip(ids.tolist(), chances, strict=True):
        deviation = 5 * np.sqrt(4000 * chance * (1 - chance)) + 1e-9
        assert abs(draws[number] - 4000 * chance) <= deviation


def test_logprobs_stay_the_model_s_own(model: BltModel) -> None:
    options = GenerationOptions(20, logprobs=3, constraint=Constraint.choice(["xyzzy"]))
    result = model.generate(b"Once", options)
    scores = model.logits(b"Once" + result.data).astype(np.float64)
    for place, detail in enumerate(result.details):
        row = scores[4 + place]
        expected = row[detail.byte + BYTE_OFFSET] - np.log(np.exp(row - row.max()).sum()) - row.max()
        assert detail.logprob == pytest.approx(expected, abs=1e-4)


def test_a_stop_string_ends_a_text_that_must_fit(model: BltModel) -> None:
    options = GenerationOptions(99, stop=("name",), constraint=Constraint.json_schema(RECORD))
    for draft in DRAFTS:
        result = model.generate(b"Once", replace(options, draft=draft))
        assert (result.text, result.finish_reason) == ('{"', "stop")


@pytest.mark.parametrize("seed", range(3))
def test_utf8_is_valid_and_completes_the_prompt_s_character(model: BltModel, seed: int) -> None:
    options = GenerationOptions(50, temperature=2.0, seed=seed, utf8=True)
    free = model.generate("すべて".encode(), replace(options, utf8=False)).data
    with pytest.raises(UnicodeDecodeError):  # else this shows nothing
        free.decode()
    data = model.generate("すべて".encode(), options).data
    assert cut_character(data) == data[len(data.decode(errors="ignore").encode()) :]  # no other is invalid
    whole = "す".encode()[:2]
    begun = model.generate(whole, options).data
    assert (whole + begun).decode(errors="ignore").startswith(tuple(map(chr, range(0x3040, 0x3080))))


def test_a_bias_moves_what_is_chosen(model: BltModel) -> None:
    never = model.generate(b"Once", GenerationOptions(30)).data[0]
    options = GenerationOptions(30, logit_bias={never + BYTE_OFFSET: -100})
    for draft in DRAFTS:
        assert never not in model.generate(b"Once", replace(options, draft=draft)).data
    always = GenerationOptions(9, temperature=1.0, seed=1, logit_bias={88 + BYTE_OFFSET: 100})
    assert model.generate(b"Once", always).data == b"X" * 9


def test_a_byte_that_ends_texts_can_t_be_in_one(model: BltModel) -> None:
    guide = new_guide(GenerationOptions(constraint=Constraint.regex("a\nb")), [EOS, 10 + BYTE_OFFSET])
    assert guide is not None
    assert guide.forced(9) == [] or guide.forced(9) == [97 + BYTE_OFFSET]
    guide.advance([97 + BYTE_OFFSET])
    with pytest.raises(OptionError, match="after 1 bytes nothing can come next that fits it and is a byte"):
        guide.mask()


def walk(guide: Guide, data: st.DataObject, fits: Any) -> None:
    """Go on, back and forth: what is allowed only depends on where the guide stands."""
    taken: list[int] = []
    seen: dict[tuple[int, ...], bytes] = {}
    for _ in range(25):
        mask = guide.mask()
        assert seen.setdefault(tuple(taken), mask.tobytes()) == mask.tobytes()
        assert mask[EOS] == guide.accepts_end
        assert not mask[[0, 1, 3]].any()
        text = bytes(number - BYTE_OFFSET for number in taken)
        if guide.accepts_end:
            fits(text.decode())
        forced, other = guide.forced(data.draw(st.integers(0, 40))), guide.fork()
        for number in forced:
            assert np.flatnonzero(other.mask()).tolist() == [number]
            other.advance([number])
        assert guide.mask().tobytes() == seen[tuple(taken)]  # forced takes nothing, a fork moves alone
        possible = [number for number in np.flatnonzero(mask).tolist() if number >= BYTE_OFFSET]
        assert guide.ended == (not possible)
        if possible and data.draw(st.integers(0, 3)):
            taken.append(data.draw(st.sampled_from(possible)))
            guide.advance(taken[-1:])
        else:
            count = data.draw(st.integers(0, len(taken)))
            guide.roll_back(count)
            del taken[len(taken) - count :]


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.data(), SCHEMAS, st.booleans())
def test_walks_of_schemas(data: st.DataObject, schema: Any, utf8: bool) -> None:
    guide = new_guide(GenerationOptions(constraint=Constraint.json_schema(schema), utf8=utf8))
    assert guide is not None
    walk(guide, data, lambda text: check_fits_schema(text, schema))


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.data(), PATTERNS, st.booleans())
def test_walks_of_patterns(data: st.DataObject, pattern: str, utf8: bool) -> None:
    guide = new_guide(GenerationOptions(constraint=Constraint.regex(pattern), utf8=utf8))
    assert guide is not None
    walk(guide, data, lambda text: check_fits_pattern(text, pattern))


def test_a_text_that_fits_a_pattern_is_taken_byte_by_byte() -> None:
    for pattern, text in ((r"\w+ (?:é|🐇)?\d{2}", "Grüße 🐇42"), (r"[^a]*", "\n\0é"), ("(?i)AbC", "aBc")):
        assert re.fullmatch(pattern, text)
        guide = new_guide(GenerationOptions(constraint=Constraint.regex(pattern)))
        assert guide is not None
        for number in byte_ids(text).tolist():
            assert guide.mask()[number]
            guide.advance([number])
        assert guide.accepts_end

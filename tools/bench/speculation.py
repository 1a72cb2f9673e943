"""Do drafts pay? Decoding with and without them, in turns, on the same prompts.

Theory: a round reads one chosen byte and k guesses in one pass over the stages. A pass over k + 1 positions
costs more than one over a single position, but less than k + 1 of them; how many guesses are right decides.

    python -m blt_edge.tools.bench.speculation --bundle demo-bundle --text tests/data/alice.txt
    python -m blt_edge.tools.bench.speculation --bundle big-bundle --text FILE --simulate decoder:8:0.9

The first command generates greedily after prompts from the texts, from Python's library and in other scripts.
The second is for random weights, whose text has odd patches and could not be guessed: both sides read on in
the text instead of what the model would choose (choosing and guessing are done and paid for), and each guess
is right with the given probability, as measured on a trained model (the rate that the first command prints).
"""

from __future__ import annotations

import argparse
import json.decoder
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...runtime import BltModel, GenerationOptions, GenerationStats
from ...runtime.drafting import LookupIndex, Match
from ...runtime.sampling import Sampler
from ...runtime.speculation import DraftFigures, Speculator
from ...runtime.vocabulary import encode
from ..profile.statistics import Spread, machine
from .common import options, print_json

Ids = npt.NDArray[np.int64]


def main() -> None:
    parser = options(__doc__, rounds=3)
    add = parser.add_argument
    add("--text", required=True, type=Path, action="append", help="may be given several times")
    add("--simulate", metavar="SOURCE:LENGTH:RATE", action="append", type=Simulated.argument)
    drafts = "none,auto,lookup,patcher,decoder"
    add("--drafts", default=drafts, help="sources to measure, the first is the base")
    add("--prompts", type=int, default=10, help="prompts from each text")
    add("--prompt-bytes", type=int, default=256)
    add("--new-bytes", type=int, default=256)
    args = parser.parse_args()
    model = BltModel.load(args.bundle, threads=args.threads)
    print(f"{machine()}; {args.threads} threads; {args.bundle}; engine: {model.engine}")
    measured = _simulate(model, args) if args.simulate else _generate(model, args)
    print_json({"benchmark": "speculation", "bundle": str(args.bundle), **measured})


# 1. Real text.


def _generate(model: BltModel, args: argparse.Namespace) -> dict[str, Any]:
    prompts = _prompts(args)
    drafts = args.drafts.split(",")
    speeds: dict[str, list[float]] = {draft: [] for draft in drafts}
    totals = {draft: DraftFigures() for draft in drafts}
    same = dict.fromkeys(drafts, 0)
    print(
        f"greedy, {args.prompt_bytes} bytes of prompt, {args.new_bytes} new, medians of {args.rounds} rounds"
    )
    print(f"{'prompt':<24}" + "".join(f"{draft:>10}" for draft in drafts) + "   bytes/s")
    for name, prompt in prompts:
        rounds: dict[str, list[float]] = {draft: [] for draft in drafts}
        texts: dict[str, bytes] = {}
        for _ in range(args.rounds):
            for draft in drafts:
                source, _, length = draft.partition(":")
                settings = GenerationOptions(
                    args.new_bytes, draft=source, draft_length=int(length) if length else None
                )
                result = model.generate(prompt, settings)
                rounds[draft].append(result.stats.bytes_per_second)
                texts[draft] = result.data
                _add(totals[draft], result.stats)
        for draft in drafts:
            speeds[draft].append(Spread.of(rounds[draft]).median)
            same[draft] += texts[draft] == texts[drafts[0]]
        print(f"{name:<24}" + "".join(f"{speeds[draft][-1]:>10.0f}" for draft in drafts), flush=True)
    rows = {}
    for draft in drafts:
        ratios = [fast / plain for fast, plain in zip(speeds[draft], speeds[drafts[0]], strict=True)]
        named = zip(ratios, prompts, strict=True)
        english = Spread.of([ratio for ratio, (name, _) in named if name.endswith(".txt")])
        rows[draft] = {
            "texts_ratio": english.to_dict(),
            "all_ratio": Spread.of(ratios).to_dict(),
            "identical_texts": same[draft],
            **_rates(totals[draft]),
        }
        print(
            f"{draft}: on the texts {english} times {drafts[0]}, on all {Spread.of(ratios)}; "
            f"{same[draft]} of {len(prompts)} texts identical; {_told(totals[draft])}"
        )
    return {"threads": args.threads, "drafts": rows}


def _prompts(args: argparse.Namespace) -> list[tuple[str, bytes]]:
    """Names and prompts: from the texts, code, other scripts, every byte, nothing."""
    size, named = args.prompt_bytes, []
    for path in args.text:
        text = path.read_bytes()
        step = max(1, (len(text) - 2000 - size) // args.prompts)
        named += [(path.name, text[1000 + index * step :][:size]) for index in range(args.prompts)]
    code = Path(json.decoder.__file__).read_bytes()
    named += [("code", code[start:][:size]) for start in (1500, 4000, 6500, 9000, 11000)]
    texts = resources.files("blt_edge.calibration") / "text"
    lines = (texts / "multilingual.txt").read_bytes().splitlines()
    foreign = [line for line in lines if sum(byte > 127 for byte in line) > 0.8 * len(line) > 40]
    named += [("other script", b"\n".join(foreign[index::3])[:size]) for index in range(3)]
    return [*named, ("every byte", bytes(range(256))[:size]), ("nothing", b"")]


def _add(total: DraftFigures, stats: GenerationStats) -> None:
    for name in ("rounds", "drafted", "accepted", "missed"):
        setattr(total, name, getattr(total, name) + getattr(stats, name))


def _rates(total: DraftFigures) -> dict[str, float]:
    return {
        "accepted_of_drafted": total.accepted / max(1, total.drafted),
        "right_when_reached": total.accepted / max(1, total.accepted + total.missed),
        "bytes_a_round": (total.accepted + total.rounds) / max(1, total.rounds),
        "guesses_a_round": total.drafted / max(1, total.rounds),
    }


def _told(total: DraftFigures) -> str:
    rates = _rates(total)
    if not total.rounds:
        return "no guesses"
    return (
        f"{rates['guesses_a_round']:.1f} guesses a round, {rates['accepted_of_drafted']:.0%} accepted, "
        f"{rates['right_when_reached']:.3f} right when reached, {rates['bytes_a_round']:.1f} bytes a round"
    )


# 2. Simulated guesses.


@dataclass(frozen=True)
class Simulated:
    source: str
    """"none", "decoder", "patcher" or "lookup"; guessing itself costs what it costs."""
    length: int = 0
    """Guesses in a round."""
    rate: float = 0.0
    """Probability that one is right."""

    @classmethod
    def argument(cls, text: str) -> Simulated:
        """From "none" or "SOURCE:LENGTH:RATE". Raises argparse.ArgumentTypeError."""
        if text == "none":
            return cls("none")
        try:
            source, length, rate = text.split(":")
            if source not in ("decoder", "patcher", "lookup"):
                raise ValueError(f"got source {source}, there are decoder, patcher and lookup")
            return cls(source, int(length), float(rate))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text}: {error}; give none or SOURCE:LENGTH:RATE") from None

    def __str__(self) -> str:
        return "none" if self.source == "none" else f"{self.source}:{self.length}:{self.rate:g}"


@dataclass(frozen=True)
class ReadOn:
    prefill: float
    """Bytes a second of reading the prompt."""
    decode: float
    """Bytes a second after the first new one."""
    bytes_per_patch: float
    """Of the new bytes."""
    figures: DraftFigures


def read_on(model: BltModel, ids: Ids, prompt: int, new_bytes: int, case: Simulated, seed: int) -> ReadOn:
    """Read `prompt` of int64 ids [n], then decode `new_bytes` that are the next of them.

    n is at least prompt + new_bytes + the guesses of a round.
    """
    sequence = model.sequence()
    started = time.perf_counter()
    sequence.append(ids[:prompt])
    prefill = prompt / (time.perf_counter() - started)
    closed = sequence.patches_closed
    sampler = _Forced(ids[prompt:], case.rate, seed)
    settings = GenerationOptions(draft=case.source, draft_length=case.length or None)
    speculator = Speculator(sequence, sampler, settings, model.costs)
    if case.source == "lookup":
        speculator._index = _SimulatedIndex(sampler)  # type: ignore[assignment]
    pending, made = speculator.begin(), 1
    started = time.perf_counter()
    while made < new_bytes:
        chosen = speculator.round(pending, new_bytes - made)
        pending, made = chosen[-1], made + len(chosen)
    decode = (made - 1) / (time.perf_counter() - started)
    patches = max(1, sequence.patches_closed - closed)
    return ReadOn(prefill, decode, (made - 1) / patches, speculator.figures)


class _Forced(Sampler):
    """Chooses and guesses as the logits ask, at that cost, and returns what a text says."""

    def __init__(self, text: Ids, rate: float, seed: int) -> None:
        super().__init__(GenerationOptions(draft="none"))
        self._text, self._rate = text.tolist(), rate
        self._random = np.random.default_rng(seed)
        self._place = 0

    def __call__(self, logits: npt.NDArray[np.float32], ids: Any, allowed: Any = None) -> int:
        super().guess(logits, ids, 0)
        self._place += 1
        return int(self._text[self._place - 1])

    def guess(self, logits: npt.NDArray[np.float32], ids: Any, ahead: int, allowed: Any = None) -> int:
        super().guess(logits, ids, ahead)
        return self.likely(ahead)

    def likely(self, ahead: int) -> int:
        """The id after `ahead` more, or with the rest of the probability another one."""
        truth = int(self._text[self._place + ahead])
        return truth if self._random.random() < self._rate else 4 + (truth - 3) % 256


class _SimulatedIndex:
    """Stands for the lookup: a match of full length everywhere, as likely right as asked."""

    def __init__(self, sampler: _Forced) -> None:
        self._sampler = sampler

    def extend(self, ids: list[int]) -> None:
        pass

    def find(self) -> Match:
        return Match(0, LookupIndex.LONGEST)

    def guesses(self, match: Match, count: int) -> list[int]:
        return [self._sampler.likely(index) for index in range(count)]


def _simulate(model: BltModel, args: argparse.Namespace) -> dict[str, Any]:
    text = args.text[0].read_bytes()
    cases: list[Simulated] = [Simulated("none"), *args.simulate]
    speeds: dict[Simulated, list[float]] = {case: [] for case in cases}
    notes: dict[Simulated, str] = {}
    print("guesses are simulated: right with the given probability, while both sides read on in the text")
    for number in range(args.rounds):
        ids = encode(text[2000 + number * 3000 :][: args.prompt_bytes + args.new_bytes + 64])
        for case in cases:
            run = read_on(model, ids, args.prompt_bytes + 1, args.new_bytes, case, seed=number)
            speeds[case].append(run.decode)
            notes[case] = f"{run.bytes_per_patch:.2f} bytes a patch, {_told(run.figures)}"
    rows = []
    for case in cases:
        spread = Spread.of(speeds[case])
        ratio = spread.median / Spread.of(speeds[cases[0]]).median
        print(f"{case!s:<36} {spread} bytes/s, {ratio:.2f} times; {notes[case]}")
        described = {"source": case.source, "length": case.length, "rate": case.rate}
        rows.append({**described, "ratio": ratio, **spread.to_dict()})
    return {"simulated": True, "cases": rows}


if __name__ == "__main__":
    main()

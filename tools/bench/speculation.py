"""Do drafts pay? Decoding with and without them, in turns, on the same prompts.

Theory: a round reads one chosen byte and k guesses in one pass over the stages. A pass over k + 1 positions
costs more than one over a single position, but less than k + 1 of them; how many guesses are right decides.

    python -m blt_edge.tools.bench.speculation --bundle demo-bundle --text tests/data/alice.txt
    python -m blt_edge.tools.bench.speculation --bundle big-bundle --text FILE --simulate decoder:8:0.9

The first form generates greedily after prompts from the texts, from Python's library and in other scripts.
The second is for random weights, whose text nobody could guess: both sides read on in the text instead of
what the model would choose (choosing is done and paid for), and each guess is right with the given
probability, as measured on a trained model (the rate that the first form prints). Guessing itself costs what
it costs.
"""

from __future__ import annotations

import argparse
import json.decoder
import time
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...runtime import BltModel, GenerationOptions, GenerationStats
from ...runtime.sampling import Sampler
from ...runtime.speculation import DraftFigures, Speculator
from ...runtime.vocabulary import encode
from .common import Spread, machine, print_json

__all__ = ["main"]

_DRAFTS = ("none", "auto", "lookup", "patcher", "decoder")


def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", required=True, type=Path)
    parser.add_argument(
        "--text", required=True, type=Path, action="append", help="may be given several times"
    )
    parser.add_argument("--simulate", metavar="SOURCE:LENGTH:RATE", action="append", type=_simulated)
    parser.add_argument(
        "--drafts", default=",".join(_DRAFTS), help="sources to measure, the first is the base"
    )
    parser.add_argument("--prompts", type=int, default=10, help="prompts from each text")
    parser.add_argument("--prompt-bytes", type=int, default=256)
    parser.add_argument("--new-bytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    model = BltModel.load(args.bundle, threads=args.threads)
    print(f"{machine()}; {args.threads} threads; {args.bundle}; engine: {model.engine}")
    if args.simulate:
        _simulate(model, args)
    else:
        _measure(model, args)


# 1. Real text.


def _measure(model: BltModel, args: argparse.Namespace) -> None:
    prompts = _prompts(args)
    drafts = args.drafts.split(",")
    speeds: dict[str, list[Spread]] = {draft: [] for draft in drafts}
    totals = {draft: DraftFigures() for draft in drafts}
    same = dict.fromkeys(drafts, 0)
    print(
        f"greedy, {args.prompt_bytes} bytes of prompt, {args.new_bytes} new, medians of {args.rounds} rounds"
    )
    print(f"{'prompt':<24}" + "".join(f"{draft:>10}" for draft in drafts) + "   bytes/s")
    for name, prompt in prompts:
        readings: dict[str, list[float]] = {draft: [] for draft in drafts}
        texts: dict[str, bytes] = {}
        for _ in range(args.rounds):
            for draft in drafts:
                source, _, length = draft.partition(":")
                options = GenerationOptions(
                    args.new_bytes, draft=source, draft_length=int(length) if length else None
                )
                result = model.generate(prompt, options)
                readings[draft].append(result.stats.bytes_per_second)
                texts[draft] = result.data
                _add(totals[draft], result.stats)
        for draft in drafts:
            speeds[draft].append(Spread.of(readings[draft]))
            same[draft] += texts[draft] == texts[drafts[0]]
        print(f"{name:<24}" + "".join(f"{speeds[draft][-1].median:>10.0f}" for draft in drafts), flush=True)
    base = [spread.median for spread in speeds[drafts[0]]]
    rows = {}
    for draft in drafts:
        ratios = [spread.median / plain for spread, plain in zip(speeds[draft], base, strict=True)]
        english = [ratio for ratio, (name, _) in zip(ratios, prompts, strict=True) if name.endswith(".txt")]
        rows[draft] = {
            "texts_ratio": Spread.of(english).to_dict(),
            "all_ratio": Spread.of(ratios).to_dict(),
            "identical_texts": same[draft],
            **_rates(totals[draft]),
        }
        print(
            f"{draft}: on the texts {Spread.of(english)} times {drafts[0]}, on all {Spread.of(ratios)}; "
            f"{same[draft]} of {len(prompts)} texts identical; {_told(totals[draft])}"
        )
    print_json(
        {"benchmark": "speculation", "bundle": str(args.bundle), "threads": args.threads, "drafts": rows}
    )


def _prompts(args: argparse.Namespace) -> list[tuple[str, bytes]]:
    named = []
    for path in args.text:
        text = path.read_bytes()
        for index in range(args.prompts):
            start = 1000 + index * max(1, (len(text) - 2000 - args.prompt_bytes) // args.prompts)
            named.append((path.name, text[start : start + args.prompt_bytes]))
    code = Path(json.decoder.__file__).read_bytes()
    named += [("code", code[start : start + args.prompt_bytes]) for start in (1500, 4000, 6500, 9000, 11000)]
    named += [("other script", text) for text in _other_scripts(args.prompt_bytes)]
    named.append(("every byte", bytes(range(256))[: args.prompt_bytes]))
    named.append(("nothing", b""))
    return named


def _other_scripts(size: int) -> list[bytes]:
    """Pieces of the package's multilingual text in which hardly a byte is ASCII."""
    lines = (
        resources.files("blt_edge.calibration").joinpath("text/multilingual.txt").read_bytes().splitlines()
    )
    foreign = [line for line in lines if sum(byte > 127 for byte in line) > 0.8 * len(line) > 40]
    return [b"\n".join(foreign[index::3])[:size] for index in range(3)]


def _add(total: DraftFigures, stats: GenerationStats) -> None:
    for name in ("rounds", "drafted", "accepted", "missed"):
        setattr(total, name, getattr(total, name) + getattr(stats, name))


def _rates(total: DraftFigures) -> dict[str, float]:
    looked_at = total.accepted + total.missed
    return {
        "accepted_of_drafted": total.accepted / max(1, total.drafted),
        "right_when_reached": total.accepted / max(1, looked_at),
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


def _simulated(value: str) -> tuple[str, int, float]:
    source, length, rate = value.split(":")
    if source not in ("decoder", "patcher", "lookup"):
        raise argparse.ArgumentTypeError(f"got source {source}, there are decoder, patcher and lookup")
    return source, int(length), float(rate)


class _Forced(Sampler):
    """Chooses and guesses as the model's logits ask, at that cost, and returns what a text says."""

    def __init__(self, text: npt.NDArray[np.int64], rate: float, seed: int) -> None:
        super().__init__(GenerationOptions(draft="none"))
        self._text, self._rate = text.tolist(), rate
        self._random = np.random.default_rng(seed)
        self.place = 0

    def __call__(self, logits: npt.NDArray[np.float32], ids: Any) -> int:
        super().guess(logits, ids, 0)
        self.place += 1
        return int(self._text[self.place - 1])

    def guess(self, logits: npt.NDArray[np.float32], ids: Any, ahead: int) -> int:
        super().guess(logits, ids, ahead)
        return self.likely(ahead)

    def likely(self, ahead: int) -> int:
        """The id after `ahead` more, or with the rest of the probability another one."""
        truth = int(self._text[self.place + ahead])
        return truth if self._random.random() < self._rate else 4 + (truth - 3) % 256


class _SimulatedIndex:
    """Stands for the lookup: a match everywhere."""

    def __init__(self, sampler: _Forced) -> None:
        self._sampler = sampler

    def extend(self, ids: list[int]) -> None:
        """Nothing to remember."""

    def find(self) -> Any:
        """A match of full length."""
        from ...runtime.drafting import LookupIndex, Match

        return Match(0, LookupIndex.LONGEST)

    def guesses(self, match: Any, count: int) -> list[int]:
        """As likely right as asked."""
        return [self._sampler.likely(index) for index in range(count)]


def _simulate(model: BltModel, args: argparse.Namespace) -> None:
    text = args.text[0].read_bytes()
    cases: list[tuple[str, int, float]] = [("none", 0, 0.0), *args.simulate]
    readings: dict[tuple[str, int, float], list[float]] = {case: [] for case in cases}
    details: dict[tuple[str, int, float], str] = {}
    print("guesses are simulated: right with the given probability, while both sides read on in the text")
    for number in range(args.rounds):
        start = 2000 + number * 3000
        ids = encode(text[start : start + args.prompt_bytes + args.new_bytes + 64])
        for case in cases:
            speed, detail = _forced_run(model, ids, args, case, seed=number)
            readings[case].append(speed)
            details[case] = detail
    base = Spread.of(readings[cases[0]])
    rows = []
    for case in cases:
        spread = Spread.of(readings[case])
        ratio = spread.median / base.median
        name = "none" if case[0] == "none" else f"{case[0]}, {case[1]} guesses, {case[2]:.2f} right"
        print(f"{name:<36} {spread} bytes/s, {ratio:.2f} times; {details[case]}")
        rows.append(
            {"source": case[0], "length": case[1], "rate": case[2], "ratio": ratio, **spread.to_dict()}
        )
    print_json({"benchmark": "speculation", "simulated": True, "bundle": str(args.bundle), "cases": rows})


def _forced_run(
    model: BltModel,
    ids: npt.NDArray[np.int64],
    args: argparse.Namespace,
    case: tuple[str, int, float],
    seed: int,
) -> tuple[float, str]:
    source, length, rate = case
    sequence = model.sequence()
    prompt = args.prompt_bytes + 1
    sequence.append(ids[:prompt])
    closed = sequence.patches_closed
    sampler = _Forced(ids[prompt:], rate, seed)
    options = GenerationOptions(draft=source, draft_length=length or None)
    speculator = Speculator(sequence, sampler, options, model.costs)
    if source == "lookup":
        speculator._index = _SimulatedIndex(sampler)  # type: ignore[assignment]
    pending, made = speculator.begin(), 1
    started = time.perf_counter()
    while made < args.new_bytes:
        chosen = speculator.round(pending, args.new_bytes - made)
        pending, made = chosen[-1], made + len(chosen)
    speed = (made - 1) / (time.perf_counter() - started)
    per_patch = (made - 1) / max(1, sequence.patches_closed - closed)
    return speed, f"{per_patch:.2f} bytes a patch, {_told(speculator.figures)}"


if __name__ == "__main__":
    main()

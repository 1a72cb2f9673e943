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
from importlib import resources
from pathlib import Path

from ...runtime import BltModel, GenerationOptions, GenerationStats
from ...runtime.speculation import DraftFigures
from ...runtime.vocabulary import encode
from .engine import Spread, machine, print_json
from .forced import Simulated, read_on

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


def _simulated(value: str) -> Simulated:
    try:
        return Simulated.parse(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {value}: {error}; give SOURCE:LENGTH:RATE") from None


def _simulate(model: BltModel, args: argparse.Namespace) -> None:
    text = args.text[0].read_bytes()
    cases: list[Simulated] = [Simulated("none"), *args.simulate]
    readings: dict[Simulated, list[float]] = {case: [] for case in cases}
    details: dict[Simulated, str] = {}
    print("guesses are simulated: right with the given probability, while both sides read on in the text")
    for number in range(args.rounds):
        start = 2000 + number * 3000
        ids = encode(text[start : start + args.prompt_bytes + args.new_bytes + 64])
        for case in cases:
            run = read_on(model, ids, args.prompt_bytes + 1, args.new_bytes, case, seed=number)
            readings[case].append(run.decode)
            details[case] = f"{run.bytes_per_patch:.2f} bytes a patch, {_told(run.figures)}"
    base = Spread.of(readings[cases[0]])
    rows = []
    for case in cases:
        spread = Spread.of(readings[case])
        ratio = spread.median / base.median
        print(f"{case!s:<36} {spread} bytes/s, {ratio:.2f} times; {details[case]}")
        rows.append(
            {
                "source": case.source,
                "length": case.length,
                "rate": case.rate,
                "ratio": ratio,
                **spread.to_dict(),
            }
        )
    print_json({"benchmark": "speculation", "simulated": True, "bundle": str(args.bundle), "cases": rows})


if __name__ == "__main__":
    main()

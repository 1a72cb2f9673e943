"""An engine in a process of its own, so that engines share no library, no thread pool and no memory.

Two builds of llama.cpp in one process may bind to each other's symbols. Between its rounds an engine's
process sleeps on a pipe, and these engines' thread pools stop spinning milliseconds after their last work.

How fast does a bundle add bytes beside token models in llama.cpp and onnxruntime-genai, in one run?

Theory: decoding reads every weight that a step needs, so a step takes about weights / memory bandwidth. A
token model's step adds some 4.3 bytes of English, a byte model's one byte or as many as its drafts get right,
with most of its weights read once a patch. Bytes a second compare them at like size and like precision;
how good the text is, is not measured. Random weights may patch more finely than trained ones (4 bytes a
patch), which slows a byte model down: the bytes a patch are printed beside its speed.

Each engine has a process of its own and starts every round with an empty cache. One round before the first
is not counted, so weights are in memory; then engines take turns, so that ratios are paired. Prefill and
decoding are told apart; the first new byte or token, which the prompt's logits give, is no decoding. Where
memory is too small for all engines, each is loaded again for each round. `llama_cpp`, `genai` and
`blt_engine` say what exactly runs. The machine must be idle: engines whose threads wait for each other by
spinning, llama.cpp's above all, collapse beside other work, and then a ratio says nothing.

    python -m blt_edge.tools.bench.peers --bundle demo-bundle --gguf smollm2 --gguf random-1b
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.resources
import math
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from ...runtime.host import available_memory
from .blt_engine import BltSpec
from .engine import (
    BenchError,
    Card,
    EngineSpec,
    Measured,
    Reading,
    Round,
    TokenBudget,
    document,
    machine,
    print_json,
    render,
)
from .forced import Simulated
from .genai import GenaiSpec, build_random
from .llama_cpp import LLAMA_1B, PACKAGES, LlamaCppSpec, smollm2, write_random_llama

__all__ = ["Worker", "main"]

_PATIENCE = 10.0


class Worker:
    """A loaded engine elsewhere. Close it, or use it as a context manager."""

    card: Card
    """What the engine runs."""

    def __init__(self, spec: EngineSpec, warm_up: Round) -> None:
        """Start a process, load the engine there and run one round that nobody counts.

        Raises BenchError when the engine can't be loaded or its process dies.
        """
        context = multiprocessing.get_context("spawn")
        self._name = spec.name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(spec, warm_up, theirs), daemon=True)
        self._process.start()
        theirs.close()
        try:
            card = self._answer()
        except BenchError:
            self.close()
            raise
        assert isinstance(card, Card)
        self.card = card

    def read(self, task: Round) -> Reading:
        """Run one round. Raises BenchError when the engine fails or its process dies."""
        self._pipe.send(task)
        reading = self._answer()
        assert isinstance(reading, Reading)
        return reading

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(_PATIENCE)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> Card | Reading:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join(_PATIENCE)
            code = self._process.exitcode
            raise BenchError(
                f"{self._name}: its process ended with code {code} (-9: out of memory?)"
            ) from None
        if isinstance(answer, BenchError):
            raise answer
        assert isinstance(answer, (Card, Reading))
        return answer


def _serve(spec: EngineSpec, warm_up: Round, pipe: Connection) -> None:
    try:
        engine = spec.open()
        engine.read(warm_up)
        pipe.send(engine.card)
        while (task := pipe.recv()) is not None:
            pipe.send(engine.read(task))
    except BenchError as error:
        pipe.send(error)
    except (EOFError, KeyboardInterrupt):
        pass


_MEMORY_SHARE = 0.8
_BUSY = 0.5
# Guesses of a round, at most, behind the last byte.
_AHEAD = 64


def main() -> None:
    """Command-line entry. Exit code 1 and one line on stderr when an engine can't be measured."""
    args = _parser().parse_args()
    try:
        _compare(args)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--bundle", action="append", type=Path, required=True, help="blt-edge bundle; repeatable")
    add("--draft", help="where drafts come from, as in GenerationOptions; default: the runtime's own choice")
    add(
        "--read-on",
        action="append",
        default=[],
        type=_simulated,
        metavar="none|SOURCE:LENGTH:RATE",
        help="bundles also read on in the text, with guesses that are simulated; repeatable",
    )
    add("--gguf", action="append", default=[], help="GGUF file, smollm2 or random-1b; repeatable")
    add("--llama-cpp", action="append", choices=PACKAGES, help="llama.cpp's package; repeatable (xllamacpp)")
    add("--genai", action="append", default=[], help="onnxruntime-genai folder, or random-1b; repeatable")
    add("--text", type=Path, help="prompts are taken from here; default: a bundled English text")
    add("--context", type=_positive, default=256, help="bytes before the first new one")
    add("--new-bytes", type=_positive, default=128, help="new bytes a round")
    add("--bytes-per-token", type=float, default=4.3)
    add("--rounds", type=_positive, default=5)
    add("--threads", type=_positive, default=2)
    add("--workdir", type=Path, help="where random-1b is written, once; default: the temporary folder")
    return parser


def _simulated(text: str) -> Simulated:
    try:
        return Simulated.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}; give none or SOURCE:LENGTH:RATE") from None


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: at least 1 is needed")
    return number


def _compare(args: argparse.Namespace) -> None:
    specs = _specs(args)
    needed = sum(spec.memory_bytes for spec in specs)  # looks into every model: mistakes show before work
    load = os.getloadavg()[0]
    bundles = [spec.name for spec in specs[: len(args.bundle) * (1 + len(args.read_on))]]
    tasks = _rounds(args.text, args.context, args.new_bytes, args.rounds)
    print(
        f"{machine()}; {args.threads} threads; {args.rounds} rounds; {args.context} bytes of context, "
        f"{args.new_bytes} new; {args.bytes_per_token} bytes a token; greedy"
    )
    if load > _BUSY:
        _say(f"warning: other work is running (load average {load:.1f}); these figures will mean little")
    measured = _measure(specs, tasks, needed)
    for row in measured:
        patches = "" if row.bytes_per_patch is None else f"; {row.bytes_per_patch:.2f} new bytes a patch"
        print(f"{row.card.name}: {row.card.build}{patches}")
    print(render(measured, bundles))
    print_json(
        {
            "benchmark": "peers",
            "threads": args.threads,
            "rounds": args.rounds,
            "context": args.context,
            "new_bytes": args.new_bytes,
            "bytes_per_token": args.bytes_per_token,
            "load_average_before": load,
            "engines": document(measured, bundles),
        }
    )


def _specs(args: argparse.Namespace) -> list[EngineSpec]:
    # Bundles first. Names must differ: rows and ratios go by them.
    positions = math.ceil((args.context + args.new_bytes) / args.bytes_per_token) + 16
    budget = TokenBudget(args.threads, args.bytes_per_token, positions)
    workdir = args.workdir or Path(tempfile.gettempdir(), "blt-edge-bench")
    workdir.mkdir(parents=True, exist_ok=True)
    specs: list[EngineSpec] = [
        BltSpec(bundle, args.threads, args.draft, reads_on)
        for bundle in args.bundle
        for reads_on in (None, *args.read_on)
    ]
    for choice in args.gguf:
        gguf = _gguf(choice, workdir)
        specs += [LlamaCppSpec(gguf, budget, package) for package in args.llama_cpp or PACKAGES[:1]]
    specs += [GenaiSpec(_genai(choice, workdir), budget) for choice in args.genai]
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise BenchError(
                f"{name} was given {names.count(name)} times; give each once, with its own folder name"
            )
    return specs


def _gguf(choice: str, workdir: Path) -> Path:
    if choice == "smollm2":
        return smollm2()
    if choice != "random-1b":
        path = Path(choice)
        if not path.is_file():
            raise BenchError(f"--gguf: {choice} is neither a file nor one of smollm2, random-1b")
        return path
    path = workdir / "random-llama-1b-q4_0.gguf"
    if not path.is_file():
        _say(f"writing {path}")
        write_random_llama(path, LLAMA_1B, smollm2())
    return path


def _genai(choice: str, workdir: Path) -> Path:
    if choice != "random-1b":
        if not Path(choice, "genai_config.json").is_file():
            raise BenchError(f"--genai: {choice} is neither a folder with genai_config.json nor random-1b")
        return Path(choice)
    folder = workdir / "random-llama-1b-int4"
    if not folder.is_dir():
        _say(f"building {folder} (minutes)")
        build_random(folder, LLAMA_1B)
    return folder


def _rounds(text: Path | None, context: int, new_bytes: int, count: int) -> list[Round]:
    # The first is the warm-up; each starts further on in the text.
    if text is None:
        data = importlib.resources.files("blt_edge.calibration").joinpath("text/english.txt").read_bytes()
    else:
        try:
            data = text.read_bytes()
        except OSError as error:
            raise BenchError(f"--text: {text}: {error.strerror}") from None
    step = (len(data) - context - new_bytes - _AHEAD) // (count + 1)
    if step < 1:
        raise BenchError(
            f"--text: {len(data)} bytes are too few for {count} rounds of {context} bytes of context and "
            f"{new_bytes} new"
        )
    return [
        Round(data[start:][:context], new_bytes, data[start + context :][: new_bytes + _AHEAD])
        for start in range(0, (count + 1) * step, step)
    ]


def _measure(specs: Sequence[EngineSpec], tasks: Sequence[Round], needed: int) -> list[Measured]:
    warm_up, *counted = tasks
    free = available_memory() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    results: dict[str, Measured] = {}
    with contextlib.ExitStack() as stack:
        workers = {}
        if needed < _MEMORY_SHARE * free:
            for spec in specs:
                _say(f"loading {spec.name}")
                workers[spec.name] = stack.enter_context(Worker(spec, warm_up))
        else:
            _say(f"about {needed / 1e9:.1f} GB for all engines, {free / 1e9:.1f} GB free: one at a time")
        for number, task in enumerate(counted, 1):
            # Every other round goes backwards, so that nobody always follows the same neighbour.
            for spec in specs if number % 2 else reversed(specs):
                with contextlib.ExitStack() as alone:
                    worker = workers.get(spec.name) or alone.enter_context(Worker(spec, warm_up))
                    reading: Reading = worker.read(task)
                results.setdefault(spec.name, Measured(worker.card)).readings.append(reading)
                _say(f"round {number}: {spec.name}: {reading.decode:.1f} bytes/s")
    return [results[spec.name] for spec in specs]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

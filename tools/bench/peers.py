"""How fast does a bundle add bytes beside token models in llama.cpp and onnxruntime-genai, in one run?

Theory: decoding reads every weight that a step needs, so a step takes about weights / memory bandwidth. A
token model's step adds some 4.3 bytes of English, a byte model's one byte or as many as its drafts get right,
with most of its weights read once a patch. Bytes a second compare them at like size and like precision;
how good the text is, is not measured. Random weights may patch more finely than trained ones (4 bytes a
patch), which slows a byte model down: the bytes a patch are printed beside its speed.

Each engine has a process of its own, so that they share no library, no thread pool and no memory (two builds
of llama.cpp in one process may bind to each other's symbols), and starts every round with an empty cache. One
round before the first is not counted, so weights are in memory; then engines take turns, so that ratios are
paired: what slowed the machine for a while slows both sides of a ratio. Prefill and decoding are told apart;
the first new byte or token, which the prompt's logits give, is no decoding. Where memory is too small for all
engines, each is loaded again for each round. `llama_cpp` and `genai` say what exactly runs there; a bundle is
loaded and generates as a user would have it. The machine must be idle: engines whose threads wait for each
other by spinning, llama.cpp's above all, collapse beside other work, and then a ratio says nothing.

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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ...runtime import BltModel, GenerationOptions
from ...runtime.errors import BltError
from ...runtime.host import available_memory
from ...runtime.manifest import load_manifest
from ...runtime.vocabulary import encode
from ..output import count, size
from ..profile.statistics import Spread, machine
from ..tables import print_table
from .common import BenchError, ModelCard, Peer, PeerSpec, Speeds, Task, TokenBudget, options, print_json
from .genai import GenaiSpec, build_random
from .llama_cpp import LLAMA_1B, PACKAGES, LlamaCppSpec, smollm2, write_random_llama
from .speculation import Simulated, read_on

_MEMORY_SHARE = 0.8
_BUSY = 0.5
_AHEAD = 64
"""Guesses of a round, at most, behind the last byte."""

T = TypeVar("T")


def main() -> None:
    """Exits with 1 and one line on stderr when an engine can't be measured."""
    parser = options(__doc__, rounds=5, action="append", help="blt-edge bundle; repeatable")
    add = parser.add_argument
    add("--draft", help="where drafts come from, as in GenerationOptions; default: the runtime's own choice")
    add(
        "--read-on",
        action="append",
        default=[],
        type=Simulated.argument,
        metavar="none|SOURCE:LENGTH:RATE",
        help="bundles also read on in the text, with guesses that are simulated; repeatable",
    )
    add("--gguf", action="append", default=[], help="GGUF file, smollm2 or random-1b; repeatable")
    add("--llama-cpp", action="append", choices=PACKAGES, help="llama.cpp's package; repeatable (xllamacpp)")
    add("--genai", action="append", default=[], help="onnxruntime-genai folder, or random-1b; repeatable")
    add("--text", type=Path, help="prompts are taken from here; default: a bundled English text")
    add("--context", type=int, default=256, help="bytes before the first new one")
    add("--new-bytes", type=int, default=128, help="new bytes a round")
    add("--bytes-per-token", type=float, default=4.3)
    add("--workdir", type=Path, help="where random-1b is written, once; default: the temporary folder")
    args = parser.parse_args()
    for name in ("context", "new_bytes", "rounds", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: at least 1 is needed")
    try:
        _compare(args)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _compare(args: argparse.Namespace) -> None:
    specs = _specs(args)
    needed = sum(spec.memory_bytes for spec in specs)  # looks into every model: mistakes show before work
    load = os.getloadavg()[0]
    bundles = [spec.name for spec in specs if isinstance(spec, BundleSpec)]
    tasks = _tasks(args.text, args.context, args.new_bytes, args.rounds)
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
    show(measured, bundles)
    given = ("threads", "rounds", "context", "new_bytes", "bytes_per_token")
    settings = {name: getattr(args, name) for name in given}
    engines = [row.to_dict(measured, bundles) for row in measured]
    print_json({"benchmark": "peers", **settings, "load_average_before": load, "engines": engines})


# 1. What is compared.


@dataclass(frozen=True)
class BundleSpec:
    bundle: Path
    threads: int
    draft: str | None = None
    """Where guesses come from, as in `GenerationOptions.draft`; None leaves the runtime's default."""
    reads_on: Simulated | None = None
    """Read on in the text with these guesses; None writes."""

    @property
    def name(self) -> str:
        folder = self.bundle.resolve().name
        return folder if self.reads_on is None else f"{folder} reads, {self.reads_on}"

    @property
    def memory_bytes(self) -> int:
        """Twice the graphs' weights (an engine may hold a rearranged copy); tables stay on disk."""
        return 2 * self.graph_bytes

    @property
    def graph_bytes(self) -> int:
        """Files without the tables. Raises BenchError."""
        with _bench_errors():
            manifest = load_manifest(self.bundle)
        return sum(record.bytes for name, record in manifest.files.items() if name != manifest.embedding.file)

    def open(self) -> Peer:
        with _bench_errors():
            return BundlePeer(self)


class BundlePeer:
    def __init__(self, spec: BundleSpec) -> None:
        self._spec = spec
        self._model = BltModel.load(spec.bundle, threads=spec.threads)
        manifest = self._model.manifest
        counts = dict(manifest.model.parameters)
        tables = counts.pop("tables", 0)
        precisions = " ".join(f"{name} {stage.precision}" for name, stage in manifest.stages.items())
        self.card = ModelCard(
            name=spec.name,
            parameters=sum(counts.values()),
            disk_bytes=spec.graph_bytes,
            build=f"{precisions}; {self._model.engine}; drafts {spec.reads_on or spec.draft or 'by default'}",
            table_parameters=tables,
            table_bytes=manifest.files[manifest.embedding.file].bytes,
        )

    def run(self, task: Task) -> Speeds:
        """Greedy. Raises BenchError when the text ends at once."""
        spec, model = self._spec, self._model
        if spec.reads_on is not None:
            ids = encode(task.prompt + task.following)
            done = read_on(model, ids, 1 + len(task.prompt), task.new_bytes, spec.reads_on, seed=len(ids))
            return Speeds(done.prefill, done.decode, done.bytes_per_patch)
        drafts: dict[str, Any] = {} if spec.draft is None else {"draft": spec.draft}
        with _bench_errors():
            before = len(model.patch_lengths(task.prompt))
            stats = model.generate(task.prompt, GenerationOptions(task.new_bytes, **drafts)).stats
        if stats.new_bytes < 2:
            raise BenchError(f"{self.card.name}: the text ended at its first byte; give another --text")
        return Speeds(
            prefill=stats.prompt_bytes / stats.prefill_seconds,
            decode=(stats.new_bytes - 1) / stats.decode_seconds,
            bytes_per_patch=stats.new_bytes / max(1, stats.patches - before),
        )


@contextlib.contextmanager
def _bench_errors() -> Iterator[None]:
    try:
        yield
    except BltError as error:
        raise BenchError(str(error)) from None


def _specs(args: argparse.Namespace) -> list[PeerSpec]:
    """Bundles first. Names must differ: rows and ratios go by them."""
    positions = math.ceil((args.context + args.new_bytes) / args.bytes_per_token) + 16
    budget = TokenBudget(args.threads, args.bytes_per_token, positions)
    workdir = args.workdir or Path(tempfile.gettempdir(), "blt-edge-bench")
    workdir.mkdir(parents=True, exist_ok=True)
    specs: list[PeerSpec] = [
        BundleSpec(bundle, args.threads, args.draft, reads_on)
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
        if not Path(choice).is_file():
            raise BenchError(f"--gguf: {choice} is neither a file nor one of smollm2, random-1b")
        return Path(choice)
    path = workdir / "random-llama-1b-q4_0.gguf"
    if not path.is_file():
        _say(f"writing {path}")
        write_random_llama(path, LLAMA_1B)
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


def _tasks(text: Path | None, context: int, new_bytes: int, rounds: int) -> list[Task]:
    """The warm-up and one task a round; each starts further on in the text."""
    source = importlib.resources.files("blt_edge.calibration") / "text" / "english.txt"
    try:
        data = (text or source).read_bytes()
    except OSError as error:
        raise BenchError(f"--text: {text}: {error.strerror}") from None
    step = (len(data) - context - new_bytes - _AHEAD) // (rounds + 1)
    if step < 1:
        raise BenchError(
            f"--text: {len(data)} bytes are too few for {rounds} rounds of {context} bytes of context and "
            f"{new_bytes} new"
        )
    return [
        Task(data[start:][:context], new_bytes, data[start + context :][: new_bytes + _AHEAD])
        for start in range(0, (rounds + 1) * step, step)
    ]


# 2. Running it.


class Worker:
    """A loaded peer in a process of its own, which sleeps between tasks. Close it, or use it in `with`."""

    def __init__(self, spec: PeerSpec, warm_up: Task) -> None:
        """Load, and run a task that nobody counts. Raises BenchError when the process can't."""
        self._name = spec.name
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        try:
            self.card: ModelCard = self._ask(_load, spec, warm_up)
        except BenchError:
            self._pool.shutdown()
            raise

    def run(self, task: Task) -> Speeds:
        """Run a task. Raises BenchError when the peer fails or its process dies."""
        return self._ask(_run, task)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def _ask(self, work: Callable[..., T], *arguments: object) -> T:
        try:
            return self._pool.submit(work, *arguments).result()
        except BrokenProcessPool:
            raise BenchError(f"{self._name}: its process ended by itself (out of memory?)") from None


_loaded: list[Peer] = []
"""In a worker's process: its peer."""


def _load(spec: PeerSpec, warm_up: Task) -> ModelCard:
    _loaded.append(spec.open())
    _run(warm_up)
    return _loaded[0].card


def _run(task: Task) -> Speeds:
    return _loaded[0].run(task)


@dataclass
class Measured:
    """A peer and its speeds, one a round."""

    card: ModelCard
    rounds: list[Speeds] = field(default_factory=list)

    @property
    def decode(self) -> list[float]:
        return [speeds.decode for speeds in self.rounds]

    @property
    def bytes_per_patch(self) -> float | None:
        """Median over the rounds; None for a token model."""
        values = [speeds.bytes_per_patch for speeds in self.rounds if speeds.bytes_per_patch is not None]
        return Spread.of(values).median if values else None

    @property
    def prefill(self) -> Spread:
        return Spread.of([speeds.prefill for speeds in self.rounds])

    def ratios(self, measured: Sequence[Measured], bundles: Sequence[str]) -> dict[str, Spread]:
        """By bundle, how many times as fast as this peer it decodes: each round's two are divided."""
        others = {other.card.name: other.decode for other in measured}
        return {
            name: Spread.of([one / own for one, own in zip(others[name], self.decode, strict=True)])
            for name in bundles
        }

    def to_dict(self, measured: Sequence[Measured], bundles: Sequence[str]) -> dict[str, Any]:
        """For the JSON line, every round's decoding included."""
        ratios = self.ratios(measured, bundles).items()
        return {
            **asdict(self.card),
            "decode_bytes_per_second": Spread.of(self.decode).to_dict(),
            "prefill_bytes_per_second": self.prefill.to_dict(),
            "decode_rounds": self.decode,
            "bytes_per_patch": self.bytes_per_patch,
            "bundle_times_as_fast": {name: ratio.to_dict() for name, ratio in ratios},
        }


def _measure(specs: Sequence[PeerSpec], tasks: Sequence[Task], needed: int) -> list[Measured]:
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
                    speeds = worker.run(task)
                results.setdefault(spec.name, Measured(worker.card)).rounds.append(speeds)
                _say(f"round {number}: {spec.name}: {speeds.decode:.1f} bytes/s")
    return [results[spec.name] for spec in specs]


def show(measured: Sequence[Measured], bundles: Sequence[str]) -> None:
    """Print the table; a column for each name in `bundles` tells how many times as fast it decodes."""
    rows = []
    for row in measured:
        card, tables = row.card, row.card.table_parameters
        parameters = count(card.parameters) + (f" + {count(tables)} tables" if tables else "")
        disk = size(card.disk_bytes) + (f" + {size(card.table_bytes)} tables" if tables else "")
        ratios = map(str, row.ratios(measured, bundles).values())
        rows.append([card.name, parameters, disk, str(Spread.of(row.decode)), str(row.prefill), *ratios])
    columns = ["engine", "parameters", "on disk", "decode bytes/s", "prefill bytes/s"]
    print_table(columns + [f"{name} is ... times as fast" for name in bundles], rows)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

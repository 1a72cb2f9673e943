"""Bundles side by side: size, quality against the first one, speed, memory.

Each bundle is measured in a process of its own (`work`), one after the other, so that none sees another's
memory; the first bundle's predictions and greedy texts wait for the others in a temporary folder, about 1 KB
per byte of text.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ...export.quality import Tally, lead_length
from ...runtime import BltModel, GenerationOptions
from ...runtime.child import Tell, run_child
from ...runtime.errors import BltError, OptionError, requirement
from ...runtime.files import bytes_on_disk
from ...runtime.host import PrivatePeak, describe_machine, mapped_resident, peak_resident
from ...runtime.manifest import Manifest, load_manifest
from ...runtime.processors import free_cores
from ...runtime.vocabulary import encode
from . import CompareOptions

__all__ = [
    "BundleReport",
    "CompareError",
    "CompareOptions",
    "Comparison",
    "compare_bundles",
    "draw_comparison",
]

Progress = Callable[[str, int, int], None]
"""progress(what is being done, how much is done, of how much)."""


@dataclass(frozen=True)
class Request:
    """What to measure."""

    bundle: str
    """The bundle's directory."""
    folder: Path
    """Where the texts are: text0, text1 ..."""
    first: bool
    """Whether this is the bundle that the others are compared with."""
    windows: list[list[tuple[int, int]]]
    """For each text the start and end of its windows, each read from BOS."""
    prompts: list[bytes]
    options: CompareOptions


def work(request: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
    """What `compare` runs in a child: the figures of one bundle. Raises BltError."""
    options = CompareOptions(**request["options"])
    prompts = [bytes.fromhex(prompt) for prompt in request["prompts"]]
    own = {**request, "folder": Path(request["folder"]), "prompts": prompts, "options": options}
    asked = Request(**own)

    def say(*progress: str | int) -> None:
        tell({"progress": progress})

    # 1. Memory and speed first: what comes later needs memory of its own.
    say("loading", 0, 0)
    with PrivatePeak() as private:
        started = time.perf_counter()
        model = BltModel.load(asked.bundle, options.device, options.threads)
        loaded = time.perf_counter() - started
        prompt, rest = _timing_text(asked, model)
        _seconds(model, prompt, rest)
    say("timing", 0, 0)
    timings = [_seconds(model, prompt, rest) for _ in range(options.repeat)]
    figures: dict[str, Any] = {
        "engine": str(model.engine),
        "built": model.engine.directory is not None,
        "load_seconds": loaded,
        "prefill_bytes_per_second": len(prompt) / median(prefill for prefill, _ in timings),
        "decode_bytes_per_second": len(rest) / median(decode for _, decode in timings),
        "peak_resident": peak_resident(),
        "peak_private": private.bytes,
        "tables_resident": mapped_resident(model.path / model.manifest.embedding.file),
    }
    # 2. Quality.
    figures["greedy_leads"] = _greedy_leads(asked, model, say)
    figures["texts"] = [asdict(_tally(asked, model, index, say)) for index in range(len(asked.windows))]
    return figures


def _timing_text(request: Request, model: BltModel) -> tuple[bytes, bytes]:
    """Bytes to read at once, and bytes to read one by one, as many as the model has positions for."""
    options = request.options
    wanted = min(options.prompt_bytes + options.new_bytes, model.limits.max_positions - 1)
    text = _bytes(request, 0, 0, wanted)
    text = (text * (wanted // len(text) + 1))[:wanted]
    cut = min(options.prompt_bytes, max(1, wanted - options.new_bytes))
    return text[:cut], text[cut:]


def _seconds(model: BltModel, prompt: bytes, rest: bytes) -> tuple[float, float]:
    """For the prompt, and for the rest byte by byte: the same text for every bundle."""
    sequence = model.sequence()
    ids = encode(prompt + rest)
    started = time.perf_counter()
    for _ in sequence.extend(ids[: len(prompt) + 1]):
        pass
    between = time.perf_counter()
    for at in range(len(prompt) + 1, len(ids)):
        sequence.append(ids[at : at + 1])
    return between - started, time.perf_counter() - between


def _greedy_leads(request: Request, model: BltModel, say: Progress) -> list[tuple[int, int]]:
    """For each prompt: bytes in common with the first bundle's text, and that text's length."""
    options = GenerationOptions(max_new_bytes=request.options.lead_bytes)
    texts = []
    for done, prompt in enumerate(request.prompts):
        say("greedy texts", done, len(request.prompts))
        texts.append(model.generate(prompt, options).data)
    path = request.folder / "greedy.json"
    if request.first:
        path.write_text(json.dumps([text.hex() for text in texts]))
    expected = [bytes.fromhex(text) for text in json.loads(path.read_text())]
    return [(lead_length(own, other), len(other)) for own, other in zip(texts, expected, strict=True)]


def _tally(request: Request, model: BltModel, index: int, say: Progress) -> Tally:
    """One text's predictions and boundaries against the first bundle's, window by window."""
    tally = Tally()
    windows = request.windows[index]
    total, done = sum(stop - start for start, stop in windows), 0
    for number, (start, stop) in enumerate(windows):
        data = _bytes(request, index, start, stop)
        sequence, parts = model.sequence(), []
        for result in sequence.extend(encode(data)):
            parts.append(result.logits.copy())
            done += len(result.logits)
            say(f"text {index + 1} of {len(request.windows)}", min(done, total), total)
        # The row after the window's last byte predicts nothing that is there.
        done -= 1
        logits = np.concatenate(parts)[:-1]
        starts = [at for at in sequence.boundaries.starts if at <= len(data)]
        path = request.folder / f"predictions{index}-{number}.npz"
        if request.first:
            np.savez(path, logits=logits, starts=np.array(starts, np.int64))
        with np.load(path) as first:
            tally.add_predictions(logits, first["logits"], data)
            tally.add_boundaries(starts, first["starts"].tolist())
    return tally


def _bytes(request: Request, index: int, start: int, stop: int) -> bytes:
    with (request.folder / f"text{index}").open("rb") as file:
        file.seek(start)
        return file.read(stop - start)


_PREDICTION_BYTES = 4 * 260
_GREEDY_PROMPT_BYTES = 96
# The least range of bits per byte that a picture shows: a difference that means nothing must not fill it.
_LEAST_RANGE = 0.02
# Points: how far above its point a name stands, what a line of text takes, and a panel's height, about.
_NAME_HEIGHT = 5.0
_LINE = 12.0
_PANEL_HEIGHT = 250.0


class CompareError(BltError):
    """A bundle could not be measured: its process ended early, or there is no room for predictions."""


@dataclass(frozen=True)
class BundleReport:
    """Figures of one bundle; speeds in bytes of text per second, memory and sizes in bytes."""

    path: str
    """The bundle's directory as it was given."""
    precisions: dict[str, str]
    """Precision of each stage."""
    tables: str
    """Precision of the embedding tables."""
    graph_bytes: int
    """Size of the graphs and their weights."""
    table_bytes: int
    """Size of the embedding tables."""
    disk_bytes: int
    """Size of everything in the directory, engines for this and other machines included."""
    engine: str
    """What it ran from and on; where that is not an engine, why."""
    built: bool
    """Whether that was an engine of `blt-edge build`."""
    texts: dict[str, Tally]
    """Quality on each text."""
    greedy_leads: list[tuple[int, int]]
    """For each prompt: greedy bytes in common with the first bundle's text, and that text's length."""
    prefill_bytes_per_second: float
    decode_bytes_per_second: float
    """Speed of reading one byte after the other, as in generation; all stages counted."""
    load_seconds: float
    peak_resident: int | None
    """Most resident memory while loading, prefilling and decoding, mapped files included."""
    peak_private: int | None
    """Most memory of it that belongs to no file."""
    tables_resident: int | None
    """How much of the mapped tables was in memory."""
    note: str = ""
    """What to know about the comparison."""

    @property
    def total(self) -> Tally:
        """Quality over all texts."""
        return sum(self.texts.values(), Tally())

    @property
    def mean_lead(self) -> float:
        """Mean identical greedy lead in bytes; 0 without prompts."""
        return sum(lead for lead, _ in self.greedy_leads) / max(1, len(self.greedy_leads))

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "mean_greedy_lead": self.mean_lead,
            "texts": {name: tally.to_dict() for name, tally in self.texts.items()},
            "total": self.total.to_dict(),
            "note": self.note or None,
        }


@dataclass(frozen=True)
class Comparison:
    """Reports of several bundles; the first one is what the others are compared with."""

    bundles: list[BundleReport]
    """In the order given."""
    options: CompareOptions
    context: int
    """Ids in a window."""
    text_bytes: dict[str, int]
    """Bytes scored of each text."""
    machine: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "machine": self.machine,
            "options": asdict(self.options),
            "context": self.context,
            "text_bytes": self.text_bytes,
            "bundles": [{**one.to_dict(), "against_first": self.against_first(one)} for one in self.bundles],
        }

    def against_first(self, bundle: BundleReport) -> dict[str, float]:
        """More bits per byte than the first bundle's over all texts; times as fast and as large."""
        first = self.bundles[0]
        return {
            "more_bits_per_byte": bundle.total.bits_per_byte - first.total.bits_per_byte,
            "times_decode": bundle.decode_bytes_per_second / first.decode_bytes_per_second,
            "times_prefill": bundle.prefill_bytes_per_second / first.prefill_bytes_per_second,
            "times_disk": bundle.disk_bytes / first.disk_bytes,
        }


def compare_bundles(
    bundles: Sequence[str | Path],
    texts: Mapping[str, bytes],
    options: CompareOptions | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Measure every bundle and compare it with the first one on named texts.

    Raises OptionError (no bundle, no or an empty text, a context that a bundle has no positions for),
    BundleError, BackendError's line as CompareError, and CompareError when a process ends early or the
    temporary folder has no room. progress(what, done, all).
    """
    options = options or CompareOptions()
    if options.threads is None and options.device in ("auto", "cpu"):
        # One number for all: what is best or free may differ from one load to the next.
        options = replace(options, threads=free_cores())
    paths = [Path(bundle) for bundle in bundles]
    if not paths:
        raise OptionError("there is no bundle to compare; give at least one")
    if not texts:
        raise OptionError("there is no text to compare on; give at least one")
    for name, data in texts.items():
        if not data:
            raise OptionError(f"text {name} is empty; give a text of at least one byte")
    manifests = [load_manifest(path) for path in paths]
    context = options.context or manifests[0].model.trained_context
    for path, manifest in zip(paths, manifests, strict=True):
        if context > manifest.model.max_positions:
            raise OptionError(
                f"context: got {context}, {path} has {manifest.model.max_positions} positions; give fewer"
            )
    windows = {name: _windows(len(data), context - 1, options.max_bytes) for name, data in texts.items()}
    sizes = {name: sum(stop - start for start, stop in spans) for name, spans in windows.items()}
    reports: list[BundleReport] = []
    with tempfile.TemporaryDirectory(prefix="blt-edge-compare-") as folder:
        _check_room(Path(folder), sum(sizes.values()))
        for index, data in enumerate(texts.values()):
            (Path(folder) / f"text{index}").write_bytes(data)
        asked = {
            "folder": folder,
            "windows": list(windows.values()),
            "prompts": [prompt.hex() for prompt in _prompts(list(texts.values()), options.prompts)],
            "options": asdict(options),
        }
        for path, manifest in zip(paths, manifests, strict=True):
            figures = _run({**asked, "bundle": str(path), "first": not reports}, path, progress)
            reports.append(_report(path, manifest, list(texts), figures, manifests[0]))
    return Comparison(reports, options, context, sizes, describe_machine(options.threads))


def _windows(length: int, size: int, most: int | None) -> list[tuple[int, int]]:
    """Start and end of windows of `size` bytes, as many as `most` bytes allow, spread over the text."""
    spans = [(start, min(start + size, length)) for start in range(0, length, size)]
    if most is None or most >= length:
        return spans
    if most <= size:
        return [(0, most)]
    count = most // size
    return [spans[index * len(spans) // count] for index in range(count)]


def _prompts(texts: Sequence[bytes], count: int) -> list[bytes]:
    """Pieces of the texts in turn, spread over each, none beginning inside a character."""
    prompts = []
    for index in range(count):
        text = texts[index % len(texts)]
        turns = -(-count // len(texts))
        start = max(0, len(text) - _GREEDY_PROMPT_BYTES) * (index // len(texts)) // turns
        while start < len(text) - 1 and text[start] & 0xC0 == 0x80:
            start += 1
        prompts.append(text[start : start + _GREEDY_PROMPT_BYTES])
    return prompts


def _check_room(folder: Path, scored: int) -> None:
    needed, free = scored * _PREDICTION_BYTES, shutil.disk_usage(folder).free
    if needed > free:
        raise CompareError(
            f"{folder.parent}: the first bundle's predictions need {needed} bytes, {free} are free; "
            "set TMPDIR to another disk, or take less text (--max-bytes)"
        )


def _run(request: Mapping[str, Any], path: Path, progress: Progress | None) -> dict[str, Any]:
    def listen(event: Mapping[str, Any]) -> None:
        if progress is not None:
            what, done, total = event["progress"]
            progress(f"{path.name}: {what}", done, total)

    outcome = run_child(__name__, request, listen)
    if isinstance(outcome.error, MemoryError):
        raise CompareError(f"{path}: out of memory; close other programs")
    if outcome.error is not None:
        raise outcome.error if isinstance(outcome.error, OptionError) else CompareError(str(outcome.error))
    if outcome.result is None:
        raise CompareError(
            f"{path}: its process {outcome.death}; close other programs, or leave this bundle out"
        )
    return outcome.result


def _report(
    path: Path, manifest: Manifest, names: Sequence[str], figures: Mapping[str, Any], first: Manifest
) -> BundleReport:
    other = manifest.source.sha256 != first.source.sha256
    measured = {
        **figures,
        "texts": {name: Tally(**sums) for name, sums in zip(names, figures["texts"], strict=True)},
        "greedy_leads": [(lead, length) for lead, length in figures["greedy_leads"]],
    }
    return BundleReport(
        path=str(path),
        precisions={name: stage.precision for name, stage in manifest.stages.items()},
        tables=manifest.embedding.precision,
        graph_bytes=sum(map(manifest.stage_bytes, manifest.stages)),
        table_bytes=manifest.files[manifest.embedding.file].bytes,
        disk_bytes=bytes_on_disk(path),
        note="made from another checkpoint than the first bundle" if other else "",
        **measured,
    )


def draw_comparison(comparison: Comparison, path: Path) -> None:
    """Draw one panel per text into `path`, whose suffix says the format: size against quality.

    Across is the size of graphs and tables together, up the bits per byte; the colour is decoding speed.
    Raises BltError when matplotlib is missing, OSError when the file can't be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BltError(f"a picture needs matplotlib: pip install {requirement('plot')}") from None
    texts = list(comparison.text_bytes)
    figure = Figure(figsize=(1.2 + 5.2 * len(texts), 4.6), layout="constrained")
    panels = figure.subplots(1, len(texts), squeeze=False)[0]
    speeds = [report.decode_bytes_per_second for report in comparison.bundles]
    for panel, text in zip(panels, texts, strict=True):
        points = _draw_panel(panel, comparison, text, speeds)
    bar = figure.colorbar(points, ax=list(panels))
    bar.set_label("decoding, bytes/s")
    machine = comparison.machine
    threads = machine.get("threads")
    limit = f", {threads} thread{'s' * (threads != 1)}" if threads else ""
    figure.suptitle(f"{machine.get('processor')}, {machine.get('cpus')} CPUs{limit}", fontsize=9)
    figure.savefig(path, dpi=150)


def _draw_panel(panel: Any, comparison: Comparison, text: str, speeds: list[float]) -> Any:
    sizes = [(report.graph_bytes + report.table_bytes) / 1e6 for report in comparison.bundles]
    bits = [report.texts[text].bits_per_byte for report in comparison.bundles]
    # One speed alone is no scale.
    top = max(speeds) if max(speeds) > min(speeds) else max(speeds) + 1
    points = panel.scatter(
        sizes, bits, c=speeds, vmin=min(speeds), vmax=top, s=90, edgecolors="black", zorder=3
    )
    panel.axhline(bits[0], linewidth=0.8, linestyle="--", color="gray", zorder=1)
    for report, across, up, place in zip(comparison.bundles, sizes, bits, _places(sizes, bits), strict=True):
        panel.annotate(
            Path(report.path).name,
            (across, up),
            xytext=place,
            textcoords="offset points",
            ha="right" if place[0] < 0 else "left",
            fontsize=8,
            # Names that had to move away say where they belong.
            arrowprops={"arrowstyle": "-", "linewidth": 0.6} if place[1] > _NAME_HEIGHT else None,
        )
    panel.set_xlim(0, 1.15 * max(sizes))
    middle, half = (max(bits) + min(bits)) / 2, _half_range(bits)
    panel.set_ylim(middle - half, middle + half)
    panel.ticklabel_format(useOffset=False)
    panel.set_title(f"{text}, {comparison.text_bytes[text]:,} bytes", fontsize=10)
    panel.set_xlabel("graphs and tables, MB")
    panel.set_ylabel("bits per byte")
    panel.grid(alpha=0.3)
    return points


def _places(sizes: list[float], bits: list[float]) -> list[tuple[float, float]]:
    """Where each name goes, in points from its point: beside it, and above lower names that are near."""
    wide, high = max(sizes), _half_range(bits) * 2 / _PANEL_HEIGHT
    places = [(0.0, 0.0)] * len(sizes)
    taken: list[tuple[float, float]] = []  # where along, and how many points up
    for at in sorted(range(len(sizes)), key=lambda at: bits[at]):
        height = _NAME_HEIGHT
        near = [level for across, level in taken if abs(across - sizes[at]) < 0.25 * wide]
        while any(abs(bits[at] / high + height - level) < _LINE for level in near):
            height += 1
        taken.append((sizes[at], bits[at] / high + height))
        places[at] = (-8.0 if sizes[at] > 0.75 * wide else 8.0, height)
    return places


def _half_range(bits: list[float]) -> float:
    return max(0.7 * (max(bits) - min(bits)), _LEAST_RANGE / 2)

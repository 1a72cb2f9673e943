"""Bundles side by side: size, quality against the first one, speed, memory.

Each bundle is measured in a process of its own (`worker`), one after the other, so that none sees another's
memory; the first bundle's predictions wait for the others in a temporary folder, about 1 KB per byte of text.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from ...export.quality import Tally
from ...runtime.errors import BltError, OptionError
from ...runtime.host import describe_machine
from ...runtime.manifest import Manifest, load_manifest
from . import CompareOptions

__all__ = ["BundleReport", "CompareError", "CompareOptions", "Comparison", "compare_bundles"]

Progress = Callable[[str, int, int], None]

_PREDICTION_BYTES = 4 * 260
_GREEDY_PROMPT_BYTES = 96


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
    texts: dict[str, Tally]
    """Quality on each text."""
    greedy_leads: list[tuple[int, int]]
    """For each prompt: greedy bytes in common with the first bundle's text, and that text's length."""
    prefill_bytes_per_second: float
    """Speed of reading a prompt."""
    decode_bytes_per_second: float
    """Speed of reading one byte after the other, as in generation; all stages counted."""
    load_seconds: float
    """Time to load."""
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
        """Ready for JSON."""
        values = {name: value for name, value in vars(self).items() if name not in ("texts", "note")}
        return {
            **values,
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
    """As they were asked for."""
    context: int
    """Ids in a window."""
    text_bytes: dict[str, int]
    """Bytes scored of each text."""
    machine: dict[str, Any] = field(default_factory=dict)
    """Where it was measured."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "machine": self.machine,
            "options": asdict(self.options),
            "context": self.context,
            "text_bytes": self.text_bytes,
            "bundles": [bundle.to_dict() for bundle in self.bundles],
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
    paths = [Path(bundle) for bundle in bundles]
    if not paths:
        raise OptionError("there is no bundle to compare; give at least one")
    if not texts:
        raise OptionError("there is no text to compare on; give at least one")
    for name, data in texts.items():
        if not data:
            raise OptionError(f"text {name} is empty; give a text of at least one byte")
    manifests = [load_manifest(path) for path in paths]
    context = _context(manifests, paths, options)
    windows = {name: _windows(len(data), context - 1, options.max_bytes) for name, data in texts.items()}
    sizes = {name: sum(stop - start for start, stop in spans) for name, spans in windows.items()}
    reports: list[BundleReport] = []
    with tempfile.TemporaryDirectory(prefix="blt-edge-compare-") as folder:
        _check_room(Path(folder), sum(sizes.values()) if len(paths) > 1 else 0)
        for index, data in enumerate(texts.values()):
            (Path(folder) / f"text{index}").write_bytes(data)
        asked = {
            "folder": folder,
            "windows": list(windows.values()),
            "prompts": [prompt.hex() for prompt in _prompts(list(texts.values()), options.prompts)],
            **{name: getattr(options, name) for name in _PASSED_ON},
        }
        for path, manifest in zip(paths, manifests, strict=True):
            figures = _run({**asked, "bundle": str(path), "first": not reports}, path, progress)
            reports.append(_report(path, manifest, list(texts), figures, manifests[0]))
    return Comparison(reports, options, context, sizes, describe_machine(options.threads))


_PASSED_ON = ("lead_bytes", "prompt_bytes", "new_bytes", "repeat", "device", "threads")


# 1. What to measure.


def _context(manifests: Sequence[Manifest], paths: Sequence[Path], options: CompareOptions) -> int:
    context = options.context or manifests[0].model.trained_context
    for path, manifest in zip(paths, manifests, strict=True):
        if context > manifest.model.max_positions:
            raise OptionError(
                f"context: got {context}, {path} has {manifest.model.max_positions} positions; give fewer"
            )
    return context


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


# 2. The process that measures.


def _run(job: Mapping[str, Any], path: Path, progress: Progress | None) -> dict[str, Any]:
    command = [sys.executable, "-c", f"from {__package__}.worker import main; main()"]
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            # Else a module of the same name in the user's directory would be imported.
            env={**os.environ, "PYTHONSAFEPATH": "1"},
        )
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(json.dumps(job).encode())
            child.stdin.close()
            final = _listen(child.stdout, path, progress)
            child.wait()
        except BrokenPipeError:
            final = None
            child.wait()
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        if final is None:
            raise CompareError(f"{path}: {_reason(child.returncode, errors)}")
    if "error" in final:
        raise (OptionError if final["usage"] else CompareError)(str(final["error"]))
    result: dict[str, Any] = final["result"]
    return result


def _listen(lines: IO[bytes], path: Path, progress: Progress | None) -> dict[str, Any] | None:
    for line in lines:
        message: dict[str, Any] = json.loads(line)
        if "progress" not in message:
            return message
        if progress is not None:
            what, done, total = message["progress"]
            progress(f"{path.name}: {what}", done, total)
    return None


def _reason(code: int, errors: IO[bytes]) -> str:
    if code == -getattr(signal, "SIGKILL", 9):
        return "its process was killed, maybe for memory; close other programs or leave this bundle out"
    errors.seek(0)
    lines = errors.read().decode("utf-8", "replace").strip().splitlines()
    last = f": {lines[-1]}" if lines else ""
    return f"its process ended early with code {code}{last}"


# 3. What came of it.


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
        note="made from another checkpoint than the first bundle" if other else "",
        **measured,
    )

"""Measuring one bundle in a process of its own, so that its memory is its own: the child's side of `compare`.

Reads one JSON job from stdin and writes JSON lines to stdout: {"progress": [what, done, all]}, and at the end
{"result": ...} or {"error": line, "usage": bool}. The first bundle's job also writes its predictions into the
job's folder, where the others find them.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...export.quality import Tally, lead_length
from ...runtime import BltError, BltModel, GenerationOptions, OptionError
from ...runtime.host import PrivatePeak, mapped_resident, peak_resident
from ...runtime.vocabulary import encode

__all__ = ["Job", "main", "measure"]

Floats = NDArray[np.float32]
Window = tuple[int, int]

_CLASSES = 260


@dataclass(frozen=True)
class Job:
    """What to measure."""

    bundle: str
    """The bundle's directory."""
    folder: str
    """Where the texts are, and the first bundle's predictions go: text0, text1 ..."""
    first: bool
    """Whether this is the bundle that the others are compared with."""
    windows: list[list[Window]]
    """For each text the start and end of its windows, each read from BOS."""
    prompts: list[str]
    """Prompts for greedy texts, in hexadecimal."""
    lead_bytes: int
    """Greedy bytes per prompt."""
    prompt_bytes: int
    """Bytes read for timing, taken from the first text."""
    new_bytes: int
    """Bytes read one by one for timing, those that follow."""
    repeat: int
    """Timings, of which the median counts."""
    device: str
    """See `BltModel.load`."""
    threads: int | None
    """See `BltModel.load`."""


def main() -> None:
    """Do the job on stdin."""
    try:
        job = Job(**json.load(sys.stdin))
        _tell(result=measure(job))
    except BltError as error:
        _tell(error=str(error), usage=isinstance(error, OptionError))
    except MemoryError:
        _tell(error=f"{job.bundle}: out of memory; close other programs", usage=False)
    except KeyboardInterrupt:
        sys.exit(130)


def measure(job: Job) -> dict[str, Any]:
    """Figures of one bundle, ready for JSON. Raises BltError."""
    # 1. Memory and speed first: what comes later needs memory of its own.
    _tell(progress=["loading", 0, 0])
    with PrivatePeak() as private:
        started = time.perf_counter()
        model = BltModel.load(job.bundle, job.device, job.threads)
        loaded = time.perf_counter() - started
        sample = _timing_text(job, model)
        _read(model, *sample)
    _tell(progress=["timing", 0, 0])
    timings = [_read(model, *sample) for _ in range(job.repeat)]
    tables = model.path / model.manifest.embedding.file
    figures: dict[str, Any] = {
        "load_seconds": loaded,
        "prefill_bytes_per_second": len(sample[0]) / median(prefill for prefill, _ in timings),
        "decode_bytes_per_second": len(sample[1]) / median(decode for _, decode in timings),
        "peak_resident": peak_resident(),
        "peak_private": private.bytes,
        "tables_resident": mapped_resident(tables),
    }
    # 2. Quality.
    figures["greedy_leads"] = _greedy(job, model)
    figures["texts"] = [asdict(_text(job, model, index)) for index in range(len(job.windows))]
    return figures


def _tell(**message: Any) -> None:
    print(json.dumps(message), flush=True)


# 1. Speed.


def _timing_text(job: Job, model: BltModel) -> tuple[bytes, bytes]:
    """Bytes to read at once, and bytes to read one by one, as many as the model has positions for."""
    wanted = min(job.prompt_bytes + job.new_bytes, model.limits.max_positions - 1)
    text = _bytes(job, 0, 0, wanted)
    text = (text * (wanted // len(text) + 1))[:wanted]
    cut = min(job.prompt_bytes, max(1, wanted - job.new_bytes))
    return text[:cut], text[cut:]


def _read(model: BltModel, prompt: bytes, rest: bytes) -> tuple[float, float]:
    """Seconds for the prompt, and for the rest byte by byte: the same text for every bundle."""
    sequence = model.sequence()
    ids = encode(prompt + rest)
    started = time.perf_counter()
    for _ in sequence.extend(ids[: len(prompt) + 1]):
        pass
    between = time.perf_counter()
    for at in range(len(prompt) + 1, len(ids)):
        sequence.append(ids[at : at + 1])
    return between - started, time.perf_counter() - between


# 2. Greedy texts.


def _greedy(job: Job, model: BltModel) -> list[list[int]]:
    """For each prompt: bytes in common with the first bundle's text, and that text's length."""
    path = Path(job.folder) / "greedy.json"
    expected = [] if job.first else [bytes.fromhex(text) for text in json.loads(path.read_text())]
    options = GenerationOptions(max_new_bytes=job.lead_bytes)
    texts = []
    for done, prompt in enumerate(job.prompts):
        _tell(progress=["greedy texts", done, len(job.prompts)])
        texts.append(model.generate(bytes.fromhex(prompt), options).data)
    if job.first:
        path.write_text(json.dumps([text.hex() for text in texts]))
        expected = texts
    return [[lead_length(own, other), len(other)] for own, other in zip(texts, expected, strict=True)]


# 3. Predictions.


def _text(job: Job, model: BltModel, index: int) -> Tally:
    tally = Tally()
    windows = job.windows[index]
    total, done = sum(stop - start for start, stop in windows), 0
    with _Trace(Path(job.folder) / f"trace{index}", job.first) as trace:
        for start, stop in windows:
            data = _bytes(job, index, start, stop)
            sequence, row = model.sequence(), 0
            for result in sequence.extend(encode(data)):
                # The row after the window's last byte predicts nothing that is there.
                part = data[row : row + len(result.logits)]
                logits = result.logits[: len(part)]
                tally.add_predictions(logits, trace.logits(logits), part)
                row += len(result.logits)
                done += len(part)
                _tell(progress=[f"text {index + 1} of {len(job.windows)}", done, total])
            starts = [at for at in sequence.boundaries.starts if at <= len(data)]
            tally.add_boundaries(starts, trace.starts(starts))
    return tally


def _bytes(job: Job, index: int, start: int, stop: int) -> bytes:
    with (Path(job.folder) / f"text{index}").open("rb") as file:
        file.seek(start)
        return file.read(stop - start)


class _Trace:
    """The first bundle's predictions: written by its own process, read by the others, in the same order."""

    def __init__(self, path: Path, write: bool) -> None:
        self._write = write
        self._file = path.open("wb" if write else "rb")
        self._starts_path = path.with_suffix(".json")
        self._starts: list[list[int]] = [] if write else json.loads(self._starts_path.read_text())
        self._left = iter(self._starts)

    def __enter__(self) -> _Trace:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        if self._write:
            self._starts_path.write_text(json.dumps(self._starts))

    def logits(self, own: Floats) -> Floats:
        """The first bundle's logits where this one's are `own`."""
        if self._write:
            self._file.write(np.ascontiguousarray(own).view(np.uint8).data)
            return own
        data = self._file.read(own.size * 4)
        return np.frombuffer(data, np.float32).reshape(-1, _CLASSES)

    def starts(self, own: list[int]) -> list[int]:
        """The same for patch starts of a window."""
        if self._write:
            self._starts.append(own)
            return own
        return next(self._left)

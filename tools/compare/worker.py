"""Measuring one bundle in a process of its own, so that its memory is its own: the child's side of `compare`.

The first bundle's predictions and greedy texts stay in the request's folder, where the others find them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ...export.quality import Tally, lead_length
from ...runtime import BltModel, GenerationOptions
from ...runtime.child import Tell
from ...runtime.host import PrivatePeak, mapped_resident, peak_resident
from ...runtime.vocabulary import encode
from . import CompareOptions

Say = Callable[[str, int, int], None]
"""say(what is being done, how much is done, of how much)."""


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
    """Prompts for greedy texts."""
    options: CompareOptions


def work(request: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
    """What `compare` runs in a child: the figures of one bundle. Raises BltError."""
    options = CompareOptions(**request["options"])
    prompts = [bytes.fromhex(prompt) for prompt in request["prompts"]]
    own = {**request, "folder": Path(request["folder"]), "prompts": prompts, "options": options}
    return _measure(Request(**own), lambda *progress: tell({"progress": progress}))


def _measure(request: Request, say: Say) -> dict[str, Any]:
    options = request.options
    # 1. Memory and speed first: what comes later needs memory of its own.
    say("loading", 0, 0)
    with PrivatePeak() as private:
        started = time.perf_counter()
        model = BltModel.load(request.bundle, options.device, options.threads)
        loaded = time.perf_counter() - started
        prompt, rest = _timing_text(request, model)
        _seconds(model, prompt, rest)
    say("timing", 0, 0)
    timings = [_seconds(model, prompt, rest) for _ in range(options.repeat)]
    figures: dict[str, Any] = {
        "load_seconds": loaded,
        "prefill_bytes_per_second": len(prompt) / median(prefill for prefill, _ in timings),
        "decode_bytes_per_second": len(rest) / median(decode for _, decode in timings),
        "peak_resident": peak_resident(),
        "peak_private": private.bytes,
        "tables_resident": mapped_resident(model.path / model.manifest.embedding.file),
    }
    # 2. Quality.
    figures["greedy_leads"] = _greedy_leads(request, model, say)
    figures["texts"] = [asdict(_tally(request, model, index, say)) for index in range(len(request.windows))]
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


def _greedy_leads(request: Request, model: BltModel, say: Say) -> list[tuple[int, int]]:
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


def _tally(request: Request, model: BltModel, index: int, say: Say) -> Tally:
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

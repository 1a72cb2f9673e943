"""A profile as rows of one kind, in the manner of llama-bench: a test each, with mean and deviation.

`pp512` reads a prompt of 512 bytes, `tg128 @ d512` generates 128 after it. Speeds are bytes of text a second.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..output import count, counted, size
from .measure import Profile
from .statistics import Spread

COLUMNS = (
    *("model", "source", "bytes", "parameters", "engine", "processor", "cpus", "onnxruntime", "threads"),
    *("draft", "test", "prompt_bytes", "new_bytes", "rounds", "mean", "deviation", "median", "low", "high"),
)
"""Of a row of CSV: sizes in bytes; threads empty on a GPU; the last five in bytes of text a second."""


def table_rows(profile: Profile) -> Iterator[tuple[dict[str, Any], Spread]]:
    """Two rows a case, reading and generating: all `COLUMNS` but the speed, and the speed."""
    machine, manifest = profile.machine, profile.manifest
    same = {
        "model": Path(profile.path).name,
        "source": manifest.source.name,
        "bytes": manifest.total_bytes,
        "parameters": sum(manifest.model.parameters.values()),
        "engine": profile.engine,
        **{name: machine[name] for name in ("processor", "cpus", "onnxruntime")},
        "rounds": profile.options.repeat,
    }
    for case in profile.cases:
        about = {**same, "threads": case.threads, "draft": case.draft, "prompt_bytes": case.prompt_bytes}
        reads = {**about, "test": f"pp{case.prompt_bytes}", "new_bytes": 0}
        generates = {**about, "test": f"tg{case.new_bytes} @ d{case.prompt_bytes}"}
        yield reads, case.prefill.bytes_per_second
        yield {**generates, "new_bytes": case.new_bytes}, case.decode.bytes_per_second


def markdown_text(profile: Profile) -> str:
    """A table to paste, and the machine below it."""
    head = ("model", "size", "params", "engine", "threads", "draft", "test", "bytes/s")
    lines = [
        head,
        tuple("---:" if name in ("size", "params", "threads", "bytes/s") else "---" for name in head),
    ]
    for row, speed in table_rows(profile):
        threads = "" if row["threads"] is None else str(row["threads"])
        cells = (row["model"], size(row["bytes"]), count(row["parameters"]), row["engine"].partition(":")[0])
        lines.append((*cells, threads, row["draft"], row["test"], speed.mean_and_deviation))
    text = "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
    machine = profile.machine
    where = f"{machine['processor']}, {machine['cpus']} CPUs, ONNX Runtime {machine['onnxruntime']}"
    rounds = counted(profile.options.repeat, "round")
    return f"{text}\n{where}; {rounds}, mean ± standard deviation\n"


def csv_text(profile: Profile) -> str:
    """The rows with a header."""
    out = io.StringIO()
    table = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    table.writeheader()
    for row, speed in table_rows(profile):
        table.writerow({**row, **speed.to_dict()})
    return out.getvalue()

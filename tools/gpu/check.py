"""The proof to run wherever there is an NVIDIA GPU: every device and precision against the CPU, and speed.

    python -m blt_edge.tools.gpu.check --json gpu.json

Exports the demo at every precision, builds TensorRT engines, and measures each pair of precision and device
in a process of its own, so that one that crashes or hangs takes no other with it. The JSON names the GPU and
all versions, and lists what could not run, with the reason; it is written after each measurement, so that a
run that is cut short is not lost. Exit code 0 = all that ran agrees with the CPU, and something ran on a GPU;
1 = otherwise. `check.sh` installs what this needs first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ...runtime.backends.tensorrt import TENSORRT_TARGETS
from ...runtime.errors import BltError
from ...runtime.names import DEVICES, PRECISIONS
from ..cli.documents import write_json
from ..doctor.software import versions
from ..profile.statistics import machine

__all__ = ["DEVICES_CHECKED", "check", "main"]

DEVICES_CHECKED = tuple(device for device in DEVICES if device not in ("auto", "cpu"))
_PATIENCE = 900
"""Seconds that one measurement may take, its provider's compiling included."""

Say = Callable[[str], None]
Keep = Callable[[dict[str, Any]], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command-line entry; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", default="demo", help="folder, hub id, or demo (the default)")
    parser.add_argument("--text", type=Path, default=Path("tests/data/alice.txt"))
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--devices", default=",".join(DEVICES_CHECKED))
    parser.add_argument("--new-bytes", type=int, default=128)
    parser.add_argument("--work", type=Path, help="keep bundles and engines in this folder")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    args = parser.parse_args(arguments)
    for option, allowed in (("precisions", PRECISIONS), ("devices", DEVICES_CHECKED)):
        unknown = set(getattr(args, option).split(",")) - set(allowed)
        if unknown:
            parser.error(f"--{option}: got {', '.join(sorted(unknown))}; allowed are {', '.join(allowed)}")
    if not args.text.is_file():
        parser.error(f"--text: {args.text} does not exist")
    with tempfile.TemporaryDirectory(prefix="blt-edge-gpu-") as temporary:
        document = check(
            args.work or Path(temporary),
            args.checkpoint,
            args.text,
            args.precisions.split(","),
            args.devices.split(","),
            args.new_bytes,
            lambda line: print(line, file=sys.stderr, flush=True),
            partial(write_json, args.json),
        )
    _summarize(document)
    print(json.dumps({"passed": document["passed"], "json": str(args.json)}))
    return 0 if document["passed"] else 1


def check(
    work: Path,
    checkpoint: str,
    text: Path,
    precisions: Sequence[str],
    devices: Sequence[str],
    new_bytes: int,
    say: Say,
    keep: Keep,
) -> dict[str, Any]:
    """Measure every precision on every device, in bundles under `work`; the document.

    keep: told of the document as far as it is, after each measurement.
    """
    work.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "machine": machine(),
        "gpus": [],
        "versions": versions(),
        "checkpoint": checkpoint,
        "rows": [],
        "transformers": None,
        "could_not_run": [],
        "passed": False,
        "complete": False,
    }
    for precision in precisions:
        for device in devices:
            found = _measure(work, checkpoint, text, precision, device, new_bytes, say)
            _add(document, device, precision, found)
            keep(document)
    say("transformers on the GPU")
    reference = _run(["reference", str(_folder(checkpoint)), "--text", str(text)])
    if "error" in reference:
        _add(document, "transformers", "fp32", reference)
    else:
        document["transformers"] = reference
    document["complete"] = True
    keep(document)
    return document


def _measure(
    work: Path, checkpoint: str, text: Path, precision: str, device: str, new_bytes: int, say: Say
) -> dict[str, Any]:
    try:
        bundle = _bundle(work, checkpoint, precision, say)
        if device in TENSORRT_TARGETS:
            _build(bundle, device, say)
    except BltError as error:
        return {"error": str(error)}
    except Exception as error:  # one that nobody foresaw must not end the proof of the rest
        return {"error": f"{type(error).__name__}: {error}"}
    say(f"{precision} on {device}")
    command = ["measure", str(bundle), "--device", device, "--text", str(text)]
    return _run([*command, "--new-bytes", str(new_bytes)])


def _add(document: dict[str, Any], device: str, precision: str, found: dict[str, Any]) -> None:
    if "error" in found:
        document["could_not_run"].append({"device": device, "precision": precision, "reason": found["error"]})
        return
    rows = document["rows"]
    rows.append({"device": device, "precision": precision, **found})
    document["gpus"] = sorted({row["engine"]["device"].split(",")[0] for row in rows})
    document["passed"] = not any(row["parity"]["breaches"] for row in rows)


# 1. Bundles and engines.


def _bundle(work: Path, checkpoint: str, precision: str, say: Say) -> Path:
    from ...export import export_checkpoint
    from ...export.quantize import quantize_bundle

    exact = work / "fp32"
    if not exact.exists():
        say("exporting fp32")
        export_checkpoint(checkpoint, exact)
    if precision == "fp32":
        return exact
    made = work / precision
    if not made.exists():
        say(f"quantizing to {precision}")
        quantize_bundle(exact, made, precision=precision)
    return made


def _folder(checkpoint: str) -> Path:
    from ...export import demo

    return Path(demo.__path__[0]) if checkpoint == "demo" else Path(checkpoint)


def _build(bundle: Path, target: str, say: Say) -> None:
    """Build engines for the GPU of this machine, if there are none."""
    from ...export.build_tensorrt import TensorRtOptions, build_engines, plan_tensorrt

    options = TensorRtOptions(target)
    if not plan_tensorrt(bundle, options).there:
        say(f"building {bundle.name} for {target}")
        build_engines(bundle, options)


# 2. Measurements, each in a process of its own.


def _run(arguments: Sequence[str]) -> dict[str, Any]:
    module, *rest = arguments
    command = [sys.executable, "-m", f"blt_edge.tools.gpu.{module}", *rest]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"it took more than {_PATIENCE} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        found: dict[str, Any] = json.loads(lines[-1])
        return found
    told = done.stderr.strip().splitlines()
    end = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    return {"error": f"{end}: {told[-1] if told else 'it said nothing'}"}


# 3. For people.


def _summarize(document: dict[str, Any]) -> None:
    from ..output import print_table

    if document["rows"]:
        columns = (
            "device",
            "precision",
            "parity",
            ">logits max",
            ">ms/byte",
            ">with drafts",
            ">prefill",
            ">first",
        )
        print_table(columns, [_summary(row) for row in document["rows"]])
    reference = document["transformers"]
    if reference:
        print(f"transformers, float32, no cache: {reference['ms_per_byte']:.2f} ms/byte")
    for entry in document["could_not_run"]:
        print(f"could not run: {entry['precision']} on {entry['device']}: {entry['reason']}")
    if not document["rows"]:
        print("nothing ran on a GPU: see blt-edge doctor")


def _summary(row: dict[str, Any]) -> list[str]:
    speed, parity = row["speed"], row["parity"]
    return [
        row["device"],
        row["precision"],
        "; ".join(parity["breaches"]) or "ok",
        f"{parity['logits_max']:.1e}",
        f"{speed['no_drafts']['ms_per_byte']:.2f}",
        f"{speed['auto_drafts']['ms_per_byte']:.2f}",
        f"{speed['prefill_bytes_per_second']:,.0f} B/s",
        f"{speed['no_drafts']['first_byte_ms']:.1f} ms",
    ]


if __name__ == "__main__":
    sys.exit(main())

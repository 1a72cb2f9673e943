"""The proof to run wherever there is an NVIDIA GPU: every device and precision against the CPU, and speed.

    python -m blt_edge.tools.gpu.check --json gpu.json

Exports the demo at every precision, builds TensorRT engines, and measures each pair of precision and device
in a process of its own (`measure`), so that one that crashes or hangs takes no other with it. The JSON names
the GPU and all versions, and lists what could not run, with the reason; it is written after each measurement,
so that a run that is cut short is not lost. Exit code 0 = all that ran agrees with the CPU, and something ran
on a GPU; 1 = otherwise. `check.sh` installs what this needs first.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...runtime.backends.tensorrt import TENSORRT_TARGETS
from ...runtime.child import run_child
from ...runtime.errors import BltError
from ...runtime.files import write_whole
from ...runtime.names import DEVICES, PRECISIONS
from ..doctor.software import versions
from ..output import print_table
from ..profile.statistics import machine

_CHECKED = tuple(device for device in DEVICES if device not in ("auto", "cpu"))
_PATIENCE = 900
"""Seconds that one measurement may take, its provider's compiling included."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", default="demo", help="folder, hub id, or demo (the default)")
    parser.add_argument("--text", type=Path, default=Path("tests/data/alice.txt"))
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--devices", default=",".join(_CHECKED))
    parser.add_argument("--new-bytes", type=int, default=128)
    parser.add_argument("--work", type=Path, help="keep bundles and engines in this folder")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    args = parser.parse_args(arguments)
    for option, allowed in (("precisions", PRECISIONS), ("devices", _CHECKED)):
        chosen = getattr(args, option).split(",")
        unknown = set(chosen) - set(allowed)
        if unknown:
            parser.error(f"--{option}: got {', '.join(sorted(unknown))}; allowed are {', '.join(allowed)}")
        setattr(args, option, chosen)
    if not args.text.is_file():
        parser.error(f"--text: {args.text} does not exist")

    def keep(document: dict[str, Any]) -> None:
        text = json.dumps(document, indent=2) + "\n"
        write_whole(args.json, lambda path: path.write_text(text))

    with tempfile.TemporaryDirectory(prefix="blt-edge-gpu-") as temporary:
        args.work = args.work or Path(temporary)
        document = check(args, keep)
    _summarize(document)
    print(json.dumps({"passed": document["passed"], "json": str(args.json)}))
    return 0 if document["passed"] else 1


def check(args: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure every precision on every device; the document.

    keep: told of the document as far as it is, after each measurement.
    """
    args.work.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "machine": machine(),
        "gpus": [],
        "versions": versions(),
        "checkpoint": args.checkpoint,
        "rows": [],
        "transformers": None,
        "could_not_run": [],
        "passed": False,
        "complete": False,
    }
    rows = document["rows"]
    for precision in args.precisions:
        for device in args.devices:
            found = _measure(args, precision, device)
            if "error" in found:
                document["could_not_run"].append(_failure(device, precision, found))
            else:
                rows.append({"device": device, "precision": precision, **found})
                document["gpus"] = sorted({row["engine"]["device"].split(",")[0] for row in rows})
                document["passed"] = not any(row["parity"]["breaches"] for row in rows)
            keep(document)
    _say("transformers on the GPU")
    reference = _in_child({"transformers": str(_folder(args.checkpoint)), "text": str(args.text)})
    if "error" in reference:
        document["could_not_run"].append(_failure("transformers", "fp32", reference))
    else:
        document["transformers"] = reference
    document["complete"] = True
    keep(document)
    return document


def _failure(device: str, precision: str, found: Mapping[str, Any]) -> dict[str, str]:
    return {"device": device, "precision": precision, "reason": found["error"]}


def _measure(args: argparse.Namespace, precision: str, device: str) -> dict[str, Any]:
    try:
        bundle = _bundle(args.work, args.checkpoint, precision)
        if device in TENSORRT_TARGETS:
            _build(bundle, device)
    except BltError as error:
        return {"error": str(error)}
    except Exception as error:  # one that nobody foresaw must not end the proof of the rest
        return {"error": f"{type(error).__name__}: {error}"}
    _say(f"{precision} on {device}")
    asked = {"bundle": str(bundle), "device": device, "text": str(args.text), "new_bytes": args.new_bytes}
    return _in_child(asked)


def _in_child(request: Mapping[str, Any]) -> dict[str, Any]:
    outcome = run_child("blt_edge.tools.gpu.measure", request, patience=_PATIENCE)
    return outcome.result or {"error": str(outcome.error or f"its process {outcome.death}")}


def _bundle(work: Path, checkpoint: str, precision: str) -> Path:
    from ...export import export_checkpoint
    from ...export.quantize import quantize_bundle

    exact, made = work / "fp32", work / precision
    if not exact.exists():
        _say("exporting fp32")
        export_checkpoint(checkpoint, exact)
    if not made.exists():
        _say(f"quantizing to {precision}")
        quantize_bundle(exact, made, precision=precision)
    return made


def _folder(checkpoint: str) -> Path:
    from ...export import demo

    return Path(demo.__path__[0]) if checkpoint == "demo" else Path(checkpoint)


def _build(bundle: Path, target: str) -> None:
    """Build engines for the GPU of this machine, if there are none."""
    from ...export.build_tensorrt import TensorRtOptions, build_engines, plan_tensorrt

    options = TensorRtOptions(target)
    if not plan_tensorrt(bundle, options).there:
        _say(f"building {bundle.name} for {target}")
        build_engines(bundle, options)


# For people.


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _summarize(document: Mapping[str, Any]) -> None:
    if document["rows"]:
        columns = ("device", "precision", "parity")
        figures = (">logits max", ">ms/byte", ">with drafts", ">prefill", ">first")
        print_table([*columns, *figures], [_summary(row) for row in document["rows"]])
    reference = document["transformers"]
    if reference:
        print(f"transformers, float32, no cache: {reference['ms_per_byte']:.2f} ms/byte")
    for entry in document["could_not_run"]:
        print(f"could not run: {entry['precision']} on {entry['device']}: {entry['reason']}")
    if not document["rows"]:
        print("nothing ran on a GPU: see blt-edge doctor")


def _summary(row: Mapping[str, Any]) -> list[str]:
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

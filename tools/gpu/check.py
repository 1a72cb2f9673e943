"""The proof to run wherever there is an NVIDIA GPU: every device and precision against the CPU, and speed.

    python -m blt_edge.tools.gpu.check --json gpu.json

Exports the demo at every precision, builds TensorRT engines, and measures each pair of precision and device
in a process of its own (`work`), so that one that crashes or hangs takes no other with it: how far it is from
the CPU's results, how fast, and what several texts in one pass get and gain beside each alone; and
transformers on the GPU. The JSON names the GPU and all versions, and
lists what could not run, with the reason; it is written after each measurement, so that a run that is cut
short is not lost. Exit code 0 = all that ran agrees with the CPU, and something ran on a GPU; 1 = otherwise.
`check.sh` installs what this needs first.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ...export import demo
from ...export.packed import check_rows
from ...export.quality import TOLERANCES, Tally, Tolerances, lead_length, least_precise
from ...runtime import BltError, BltModel, BltWarning, GenerationOptions
from ...runtime.backends.tensorrt import TENSORRT_TARGETS
from ...runtime.batch import can_batch
from ...runtime.child import Tell, run_child
from ...runtime.errors import requirement
from ...runtime.files import write_whole
from ...runtime.names import DEVICES, PRECISIONS
from ...runtime.vocabulary import encode
from ..doctor.software import versions
from ..profile.statistics import machine
from ..tables import print_table

_PARITY_BYTES = 1500
_GREEDY_BYTES = 200
_PROMPT_BYTES = 256
_ROUNDS = 5
_REFERENCE_BYTES, _REFERENCE_ROUNDS = 32, 3


def work(request: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
    """The figures that were asked for. Raises BltError when they can't be had."""
    text = Path(request["text"]).read_bytes()
    if "transformers" in request:
        return transformers(Path(request["transformers"]), text)
    return measure(Path(request["bundle"]), request["device"], text, request["new_bytes"])


def measure(bundle: Path, device: str, text: bytes, new_bytes: int) -> dict[str, Any]:
    """Parity and speed of a bundle on a device, as JSON. Raises BltError when it can't run there."""
    model = BltModel.load(bundle, device)
    found = {
        "engine": {"name": model.engine.name, "device": model.engine.device},
        "parity": parity(model, BltModel.load(bundle, "cpu", portable=True), text),
        "speed": speed(model, text, new_bytes),
        "packed": packed(model, text, new_bytes),
    }
    # Calls that we captured, and why one was not; ONNX Runtime and TensorRT-RTX capture by themselves.
    memory: Any = next(iter(model._backends.values())).memory
    graphs = {"captured": getattr(memory, "captured", 0), "refusal": getattr(memory, "refusal", None)}
    return {**found, "cuda_graphs": graphs}


# 1. In the child: parity.


def parity(model: BltModel, cpu: BltModel, text: bytes) -> dict[str, Any]:
    """How far `model` is from the same bundle on the CPU, and what of it is out of its precision's bounds."""
    data = text[:_PARITY_BYTES]
    found, wanted = model.logits(data), cpu.logits(data)
    scale = max(1.0, float(np.abs(wanted).max()))
    tally = Tally()
    tally.add_predictions(found[:-1], wanted[:-1], data)
    tally.add_boundaries(_starts(model, data), _starts(cpu, data))
    options = GenerationOptions(max_new_bytes=_GREEDY_BYTES)
    prompt = text[:_PROMPT_BYTES]
    greedy = lead_length(model.generate(prompt, options).data, cpu.generate(prompt, options).data)
    figures = {
        "logits_max": float(np.abs(found - wanted).max()) / scale,
        "logits_mean": float(np.abs(found - wanted).mean()) / scale,
        "greedy_bytes_equal": greedy,
        "greedy_bytes": _GREEDY_BYTES,
        **{name: value for name, value in tally.to_dict().items() if name != "sums"},
    }
    precision = least_precise(model.manifest)
    allowed = TOLERANCES[precision]
    breaches = _breaches(figures, allowed)
    return {**figures, "precision": precision, "tolerances": asdict(allowed), "breaches": breaches}


def _starts(model: BltModel, data: bytes) -> list[int]:
    return [0, *np.cumsum(model.patch_lengths(data)).tolist()]


def _breaches(figures: dict[str, Any], allowed: Tolerances) -> list[str]:
    most = {"logits_max": allowed.logits, "logits_mean": allowed.logits_mean}
    most |= dict.fromkeys(("false_boundaries", "missed_boundaries"), allowed.boundaries)
    least: dict[str, float] = {"argmax_agreement": allowed.argmax}
    if allowed.exact:
        least["greedy_bytes_equal"] = _GREEDY_BYTES
    else:
        most["mean_kl_bits"] = allowed.divergence
    # Turned round, so that what is no number is out of bounds.
    high = [name for name, bound in most.items() if not figures[name] <= bound]
    low = [name for name, bound in least.items() if not figures[name] >= bound]
    return [
        *(f"{name} {figures[name]:.3g} > {most[name]:g}" for name in high),
        *(f"{name} {figures[name]:.4g} < {least[name]:g}" for name in low),
    ]


# 2. In the child: speed.


def speed(model: BltModel, text: bytes, new_bytes: int) -> dict[str, Any]:
    """Medians of several rounds, the first left out: it compiles and captures."""
    positions = model.limits.max_positions
    prompt = text[: min(_PROMPT_BYTES, positions // 2)]
    return {
        "prompt_bytes": len(prompt),
        "new_bytes": new_bytes,
        "rounds": _ROUNDS,
        "prefill_bytes_per_second": _prefill(model, text[: min(4 * _PROMPT_BYTES, positions - 1)]),
        "no_drafts": _decode(model, prompt, new_bytes, "none"),
        "auto_drafts": _decode(model, prompt, new_bytes, "auto"),
    }


def _prefill(model: BltModel, data: bytes) -> float:
    rates = []
    for _ in range(_ROUNDS + 1):
        started = time.perf_counter()
        model.sequence().append(encode(data))
        rates.append(len(data) / (time.perf_counter() - started))
    return median(rates[1:])


def _decode(model: BltModel, prompt: bytes, new_bytes: int, draft: str) -> dict[str, Any]:
    # Greedy: all rounds are the same text.
    runs = [
        model.generate(prompt, GenerationOptions(max_new_bytes=new_bytes, draft=draft)).stats
        for _ in range(_ROUNDS + 1)
    ][1:]
    each = [1000 * stats.decode_seconds / max(1, stats.new_bytes) for stats in runs]
    last = runs[-1]
    return {
        "ms_per_byte": median(each),
        "ms_per_byte_spread": [min(each), max(each)],
        "first_byte_ms": median(1000 * stats.first_byte_seconds for stats in runs),
        "stage_ms_per_byte": {
            name: 1000 * seconds / max(1, last.new_bytes) for name, seconds in last.stage_seconds.items()
        },
        "acceptance": last.accepted / last.drafted if last.drafted else None,
    }


# 3. In the child: several texts in one pass.


def packed(model: BltModel, text: bytes, new_bytes: int) -> dict[str, Any] | None:
    """Several texts together beside each alone; None where the device has no graphs for several.

    A graph that is refused, or computes something else, is a breach: texts then go on one by one. So is a
    float32 text that is continued otherwise; where weights are rounded a tie may fall the other way.
    """
    if not model.rows or not can_batch():
        return None
    texts = max(model.rows)
    size = min(_PROMPT_BYTES, model.limits.max_positions // 2) // 4
    prompts = [text[size * number : size * (number + 1) - number] for number in range(texts)]
    options = GenerationOptions(max_new_bytes=new_bytes, draft="none")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model.generate_many(prompts, options)  # loads the graphs and compares them
        started = time.perf_counter()
        together = [one.data for one in model.generate_many(prompts, options)]
        ended = time.perf_counter()
        alone = [model.generate(prompt, options).data for prompt in prompts]
        alone_seconds = time.perf_counter() - ended
    equal = sum(one == other for one, other in zip(together, alone, strict=True))
    breaches = [str(each.message) for each in told if issubclass(each.category, BltWarning)]
    if TOLERANCES[least_precise(model.manifest)].exact and equal < texts:
        breaches.append(f"{texts - equal} of {texts} texts are continued otherwise together than alone")
    return {
        "rows": list(model.rows),
        "texts": texts,
        "equal": equal,
        "bytes_per_second": sum(map(len, together)) / (ended - started),
        "alone_bytes_per_second": sum(map(len, alone)) / alone_seconds,
        "breaches": breaches,
    }


# 4. In the child: transformers, as its users run a BLT: no cache, since it has none that works.


def transformers(checkpoint: Path, text: bytes) -> dict[str, Any]:
    """Milliseconds a byte of `generate(use_cache=False)` in float32 after a prompt of 256 bytes.

    Raises BltError when torch has no GPU here.
    """
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise BltError(f"{name} is not installed: pip install {requirement('validate')}")
    import torch

    if not torch.cuda.is_available():
        raise BltError(f"torch {torch.__version__} sees no GPU; a build for this CUDA version is needed")
    from transformers import BltForCausalLM

    settings = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = BltForCausalLM.from_pretrained(checkpoint, **settings).cuda()
    ids = torch.from_numpy(encode(text[:_PROMPT_BYTES])[None]).cuda()
    each = []
    for _ in range(_REFERENCE_ROUNDS + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        with torch.no_grad():
            made = model.generate(
                ids,
                max_new_tokens=_REFERENCE_BYTES,
                min_new_tokens=_REFERENCE_BYTES,
                do_sample=False,
                use_cache=False,
                suppress_tokens=[0, 1, 3],
            )
        torch.cuda.synchronize()
        each.append(1000 * (time.perf_counter() - started) / (made.shape[1] - ids.shape[1]))
    return {"ms_per_byte": median(each[1:]), "dtype": "float32", "device": torch.cuda.get_device_name(0)}


_CHECKED = tuple(device for device in DEVICES if device not in ("auto", "cpu"))
_PATIENCE = 900
"""Seconds that one measurement may take, its provider's compiling included."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", default="demo", help="folder, hub id, or demo (the default)")
    parser.add_argument("--text", type=Path, default=Path("tests/data/alice.txt"))
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--devices", default=",".join(_CHECKED))
    parser.add_argument("--new-bytes", type=int, default=128)
    parser.add_argument("--rows", default="2,4", help="for how many texts at once there are graphs, or none")
    parser.add_argument("--work", type=Path, help="keep bundles and engines in this folder")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    args = parser.parse_args(arguments)
    for option, allowed in (("precisions", PRECISIONS), ("devices", _CHECKED)):
        chosen = getattr(args, option).split(",")
        unknown = set(chosen) - set(allowed)
        if unknown:
            parser.error(f"--{option}: got {', '.join(sorted(unknown))}; allowed are {', '.join(allowed)}")
        setattr(args, option, chosen)
    try:
        args.rows = check_rows([] if args.rows == "none" else [int(part) for part in args.rows.split(",")])
    except ValueError as error:  # an OptionError, too
        parser.error(f"--rows: {error}; such as 2,4, or none")
    if not args.text.is_file():
        parser.error(f"--text: {args.text} does not exist")

    def keep(document: dict[str, Any]) -> None:
        write_whole(args.json, lambda path: path.write_text(json.dumps(document, indent=2) + "\n"))

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
                document["passed"] = not any(_breaches_of(row) for row in rows)
            keep(document)
    _say("transformers on the GPU")
    folder = demo.__path__[0] if args.checkpoint == "demo" else args.checkpoint
    reference = _in_child({"transformers": folder, "text": str(args.text)})
    if "error" in reference:
        document["could_not_run"].append(_failure("transformers", "fp32", reference))
    else:
        document["transformers"] = reference
    document["complete"] = True
    keep(document)
    return document


def _breaches_of(row: Mapping[str, Any]) -> list[str]:
    return [*row["parity"]["breaches"], *((row.get("packed") or {}).get("breaches", ()))]


def _failure(device: str, precision: str, found: Mapping[str, Any]) -> dict[str, str]:
    return {"device": device, "precision": precision, "reason": found["error"]}


def _measure(args: argparse.Namespace, precision: str, device: str) -> dict[str, Any]:
    try:
        bundle = _bundle(args.work, args.checkpoint, precision, args.rows)
        if device in TENSORRT_TARGETS:
            from ...export.build_tensorrt import TensorRtOptions, build_engines, plan_tensorrt

            options = TensorRtOptions(device, rows=args.rows)
            if plan_tensorrt(bundle, options).missing:
                _say(f"building {bundle.name} for {device}")
                build_engines(bundle, options)
    except BltError as error:
        return {"error": str(error)}
    except Exception as error:  # one that nobody foresaw must not end the proof of the rest
        return {"error": f"{type(error).__name__}: {error}"}
    _say(f"{precision} on {device}")
    asked = {"bundle": str(bundle), "device": device, "text": str(args.text), "new_bytes": args.new_bytes}
    return _in_child(asked)


def _in_child(request: Mapping[str, Any]) -> dict[str, Any]:
    outcome = run_child("blt_edge.tools.gpu.check", request, patience=_PATIENCE)
    return outcome.result or {"error": str(outcome.error or f"its process {outcome.death}")}


def _bundle(work: Path, checkpoint: str, precision: str, rows: tuple[int, ...]) -> Path:
    from ...export import export_checkpoint
    from ...export.quantize import quantize_bundle

    exact, made = work / "fp32", work / precision
    if not exact.exists():
        _say("exporting fp32")
        export_checkpoint(checkpoint, exact, rows=rows)
    if not made.exists():
        _say(f"quantizing to {precision}")
        quantize_bundle(exact, made, precision=precision)
    return made


# For people.


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _summarize(document: Mapping[str, Any]) -> None:
    if document["rows"]:
        columns = ("device", "precision", "parity")
        figures = (">logits max", ">ms/byte", ">with drafts", ">prefill", ">first", ">several texts")
        print_table([*columns, *figures], [_summary(row) for row in document["rows"]])
    reference = document["transformers"]
    if reference:
        print(f"transformers, float32, no cache: {reference['ms_per_byte']:.2f} ms/byte")
    for entry in document["could_not_run"]:
        print(f"could not run: {entry['precision']} on {entry['device']}: {entry['reason']}")
    if not document["rows"]:
        print("nothing ran on a GPU: see blt-edge doctor")


def _summary(row: Mapping[str, Any]) -> list[str]:
    speed, parity, packed = row["speed"], row["parity"], row["packed"]
    return [
        row["device"],
        row["precision"],
        "; ".join(_breaches_of(row)) or "ok",
        f"{parity['logits_max']:.1e}",
        f"{speed['no_drafts']['ms_per_byte']:.2f}",
        f"{speed['auto_drafts']['ms_per_byte']:.2f}",
        f"{speed['prefill_bytes_per_second']:,.0f} B/s",
        f"{speed['no_drafts']['first_byte_ms']:.1f} ms",
        f"{packed['texts']}: {packed['bytes_per_second']:,.0f} B/s" if packed else "",
    ]


if __name__ == "__main__":
    sys.exit(main())

"""One bundle on one device: how far from the CPU's results, and how fast; or transformers on the GPU.

`check` calls it in a process of its own (`work`).
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ...export.quality import TOLERANCES, Tally, Tolerances, lead_length, least_precise
from ...runtime import BltError, BltModel, GenerationOptions
from ...runtime.child import Tell
from ...runtime.vocabulary import encode

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
    }
    # Calls that we captured, and why one was not; ONNX Runtime and TensorRT-RTX capture by themselves.
    memory: Any = next(iter(model._backends.values())).memory
    graphs = {"captured": getattr(memory, "captured", 0), "refusal": getattr(memory, "refusal", None)}
    return {**found, "cuda_graphs": graphs}


# 1. Parity.


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
    """The figures that are out of bounds, in words."""
    most = {"logits_max": allowed.logits, "logits_mean": allowed.logits_mean}
    least = {
        "argmax_agreement": allowed.argmax,
        "boundary_precision": allowed.boundaries,
        "boundary_recall": allowed.boundaries,
    }
    if allowed.boundaries < 1.0:
        most["mean_kl_bits"] = allowed.divergence
    else:
        least["greedy_bytes_equal"] = _GREEDY_BYTES
    # Turned round, so that what is no number is out of bounds.
    high = [name for name, bound in most.items() if not figures[name] <= bound]
    low = [name for name, bound in least.items() if not figures[name] >= bound]
    return [
        *(f"{name} {figures[name]:.3g} > {most[name]:g}" for name in high),
        *(f"{name} {figures[name]:.4g} < {least[name]:g}" for name in low),
    ]


# 2. Speed.


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


# 3. transformers, as its users run a BLT: no cache, since it has none that works.


def transformers(checkpoint: Path, text: bytes) -> dict[str, Any]:
    """Milliseconds a byte of `generate(use_cache=False)` in float32 after a prompt of 256 bytes.

    Raises BltError when torch has no GPU here.
    """
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise BltError(f"{name} is not installed: pip install 'blt-edge[validate]'")
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

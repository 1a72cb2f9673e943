"""transformers on the GPU, as its users run a BLT: no cache, since it has none that works.

    python -m blt_edge.tools.gpu.reference CHECKPOINT --text FILE

Prints one JSON document, {"error": ...} when torch has no GPU here.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

__all__ = ["measure"]

_PROMPT_BYTES = 256
_ROUNDS = 3


def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--new-bytes", type=int, default=32)
    args = parser.parse_args()
    print(json.dumps(measure(args.checkpoint, args.text.read_bytes(), args.new_bytes)))


def measure(checkpoint: Path, text: bytes, new_bytes: int) -> dict[str, Any]:
    """Milliseconds a byte of `generate(use_cache=False)` in float32 after a prompt of 256 bytes."""
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            return {"error": f"{name} is not installed: pip install 'blt-edge[validate]'"}
    import torch

    if not torch.cuda.is_available():
        return {"error": f"torch {torch.__version__} sees no GPU; a build for this CUDA version is needed"}
    from transformers import BltForCausalLM

    from ...runtime.vocabulary import encode

    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = BltForCausalLM.from_pretrained(checkpoint, **options).cuda()
    ids = torch.from_numpy(encode(text[:_PROMPT_BYTES])[None]).cuda()
    each = []
    for _ in range(_ROUNDS + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        with torch.no_grad():
            made = model.generate(
                ids,
                max_new_tokens=new_bytes,
                min_new_tokens=new_bytes,
                do_sample=False,
                use_cache=False,
                suppress_tokens=[0, 1, 3],
            )
        torch.cuda.synchronize()
        each.append(1000 * (time.perf_counter() - started) / (made.shape[1] - ids.shape[1]))
    return {"ms_per_byte": median(each[1:]), "dtype": "float32", "device": torch.cuda.get_device_name(0)}


if __name__ == "__main__":
    main()

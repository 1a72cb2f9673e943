"""How much faster than transformers is cached decoding, at a given context, on the same machine in one run?

Theory: transformers' BLT has no working cache, so each new byte recomputes the whole context: its time
grows with the context. The cached runtime touches each weight once per byte (the global transformer's
once per patch) and its windowed caches. Rounds alternate between the two; the ratio is that of the medians.

    python -m blt_edge.tools.bench.decode --bundle demo-bundle --checkpoint export/demo --text FILE
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from ...runtime import BltModel, GenerationOptions
from .common import Spread, machine, print_json

__all__ = ["main"]


def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", required=True, type=Path)
    parser.add_argument(
        "--checkpoint", required=True, type=Path, help="Hugging Face folder of the same model"
    )
    parser.add_argument("--text", required=True, type=Path, help="prompts are taken from here")
    parser.add_argument("--context", type=int, default=512, help="prompt bytes")
    parser.add_argument("--new-bytes", type=int, default=200, help="bytes that the runtime generates a round")
    parser.add_argument(
        "--reference-bytes", type=int, default=16, help="bytes that transformers generates a round"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    model = BltModel.load(args.bundle, threads=args.threads)
    reference = _load_reference(args.checkpoint, args.threads)
    text = args.text.read_bytes()
    print(f"{machine()}; {args.threads} threads; {args.context} bytes of context; float32")
    print(f"{'round':>5}  {'runtime B/s':>12}  {'transformers B/s':>16}  same bytes")
    cached, uncached = [], []
    for number in range(args.rounds):
        start = 2000 + number * args.context
        prompt = text[start : start + args.context]
        stats, data = _decode(model, prompt, args.new_bytes)
        speed, expected = _decode_reference(reference, prompt, args.reference_bytes)
        cached.append(stats)
        uncached.append(speed)
        same = data[: len(expected)] == expected
        print(f"{number:>5}  {stats:>12.1f}  {speed:>16.2f}  {'yes' if same else 'NO'}")
    fast, slow = Spread.of(cached), Spread.of(uncached)
    ratio = fast.median / slow.median
    print(f"runtime {fast} bytes/s, transformers {slow} bytes/s: {ratio:.1f} times as fast")
    print_json(
        {
            "benchmark": "decode",
            "context": args.context,
            "threads": args.threads,
            "runtime_bytes_per_second": fast.to_dict(),
            "transformers_bytes_per_second": slow.to_dict(),
            "ratio": ratio,
        }
    )


def _decode(model: BltModel, prompt: bytes, count: int) -> tuple[float, bytes]:
    result = model.generate(prompt, GenerationOptions(max_new_bytes=count))
    return result.stats.bytes_per_second, result.data


def _load_reference(folder: Path, threads: int):  # type: ignore[no-untyped-def]  # a transformers model
    import torch
    from transformers import BltForCausalLM

    torch.set_num_threads(threads)
    return BltForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def _decode_reference(reference, prompt: bytes, count: int) -> tuple[float, bytes]:  # type: ignore[no-untyped-def]
    import torch

    ids = torch.tensor([[1, *(byte + 4 for byte in prompt)]])
    options = {"use_cache": False, "do_sample": False, "suppress_tokens": [0, 1, 3], "eos_token_id": 2}
    started = time.perf_counter()
    with torch.no_grad():
        out = reference.generate(ids, max_new_tokens=count, pad_token_id=0, **options)[0, ids.shape[1] :]
    seconds = time.perf_counter() - started
    data = bytes(token - 4 for token in out.tolist() if token >= 4)
    return len(out) / seconds, data


if __name__ == "__main__":
    main()

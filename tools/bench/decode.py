"""How much faster than transformers is cached decoding, at a given context, on the same machine in one run?

Theory: transformers' BLT has no working cache, so each new byte recomputes the whole context: its time
grows with the context. The cached runtime touches each weight once per byte (the global transformer's
once per patch) and its windowed caches. Rounds alternate between the two; the ratio is that of the medians.
Compiling (`--compile`) fuses the reference's small operations, but still recomputes the whole context.

    python -m blt_edge.tools.bench.decode --bundle demo-bundle --checkpoint export/demo --text FILE
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from ...runtime import BltModel, GenerationOptions
from .engine import Spread, machine, print_json

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
    parser.add_argument(
        "--compile", action="store_true", help="also transformers under torch.compile (needs a C++ compiler)"
    )
    parser.add_argument("--draft", default="none", help="where the runtime's guesses come from")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    model = BltModel.load(args.bundle, threads=args.threads)
    text = args.text.read_bytes()
    prompts = [text[2000 + number * args.context :][: args.context] for number in range(args.rounds)]
    references = {"transformers": _load_reference(args.checkpoint, args.threads)}
    document: dict[str, Any] = {
        "benchmark": "decode",
        "context": args.context,
        "threads": args.threads,
        "draft": args.draft,
    }
    if args.compile:
        references["compiled"] = _load_reference(args.checkpoint, args.threads)
        seconds = _compile(references["compiled"], text[: args.context], args.reference_bytes)
        document["compile_seconds"] = seconds
        print(f"torch.compile and its first {args.reference_bytes} bytes: {seconds:.0f} s")
    print(f"{machine()}; {args.threads} threads; {args.context} bytes of context")
    print(f"{args.bundle}; engine: {model.engine}; draft: {args.draft}")
    columns = "".join(f"{name} B/s".rjust(18) for name in references)
    print(f"{'round':>5}  {'runtime B/s':>12}{columns}  same bytes")
    cached: list[float] = []
    uncached: dict[str, list[float]] = {name: [] for name in references}
    for number, prompt in enumerate(prompts):
        speed, data = _decode(model, prompt, args.new_bytes, args.draft)
        cached.append(speed)
        same = True
        for name, reference in references.items():
            slow_speed, expected = _decode_reference(reference, prompt, args.reference_bytes)
            uncached[name].append(slow_speed)
            same = same and data[: len(expected)] == expected
        speeds = "".join(f"{values[-1]:>18.2f}" for values in uncached.values())
        print(f"{number:>5}  {speed:>12.1f}{speeds}  {'yes' if same else 'NO'}")
    _report(cached, uncached, document)


def _report(cached: list[float], uncached: dict[str, list[float]], document: dict[str, Any]) -> None:
    fast = Spread.of(cached)
    document["runtime_bytes_per_second"] = fast.to_dict()
    for name, values in uncached.items():
        slow = Spread.of(values)
        ratio = fast.median / slow.median
        print(f"runtime {fast} bytes/s, {name} {slow} bytes/s: {ratio:.1f} times as fast")
        document[f"{name}_bytes_per_second"] = slow.to_dict()
        document["ratio" if name == "transformers" else f"ratio_{name}"] = ratio
    print_json(document)


def _decode(model: BltModel, prompt: bytes, count: int, draft: str) -> tuple[float, bytes]:
    result = model.generate(prompt, GenerationOptions(max_new_bytes=count, draft=draft))
    return result.stats.bytes_per_second, result.data


def _load_reference(folder: Path, threads: int):  # type: ignore[no-untyped-def]  # a transformers model
    import torch
    from transformers import BltForCausalLM

    torch.set_num_threads(threads)
    return BltForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def _compile(reference, prompt: bytes, count: int) -> float:  # type: ignore[no-untyped-def]
    # Seconds of compiling, which the first pass does. Dynamic shapes: else each new byte compiles again.
    import torch

    started = time.perf_counter()
    reference.forward = torch.compile(reference.forward, dynamic=True)
    _decode_reference(reference, prompt, count)
    return time.perf_counter() - started


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

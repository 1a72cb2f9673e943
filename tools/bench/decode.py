"""How much faster than transformers is cached decoding, at a given context, on the same machine in one run?

Theory: transformers' BLT has no working cache, so each new byte recomputes the whole context: its time
grows with the context. The cached runtime touches each weight once per byte (the global transformer's
once per patch) and its windowed caches. Rounds alternate between the two; the ratio is that of the medians.
Compiling (`--compile`) fuses the reference's small operations, but still recomputes the whole context.

    python -m blt_edge.tools.bench.decode --bundle demo-bundle --checkpoint export/demo --text FILE
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ...runtime import BltModel, GenerationOptions
from ..profile.statistics import Spread, machine
from .common import options, print_json


def main() -> None:
    parser = options(__doc__, rounds=5)
    add = parser.add_argument
    add("--checkpoint", required=True, type=Path, help="Hugging Face folder of the same model")
    add("--text", required=True, type=Path, help="prompts are taken from here")
    add("--context", type=int, default=512, help="prompt bytes")
    add("--new-bytes", type=int, default=200, help="bytes that the runtime generates a round")
    add("--reference-bytes", type=int, default=16, help="bytes that transformers generates a round")
    add("--compile", action="store_true", help="also transformers under torch.compile (needs a C++ compiler)")
    add("--draft", default="none", help="where the runtime's guesses come from")
    args = parser.parse_args()

    model = BltModel.load(args.bundle, threads=args.threads)
    text = args.text.read_bytes()
    settings = GenerationOptions(args.new_bytes, draft=args.draft)
    references = {"transformers": _load_reference(args.checkpoint, args.threads)}
    document: dict[str, Any] = {"benchmark": "decode", "context": args.context, "threads": args.threads}
    document["draft"] = args.draft
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
    for number in range(args.rounds):
        prompt = text[2000 + number * args.context :][: args.context]
        result = model.generate(prompt, settings)
        cached.append(result.stats.bytes_per_second)
        same = True
        for name, reference in references.items():
            speed, expected = _decode_reference(reference, prompt, args.reference_bytes)
            uncached[name].append(speed)
            same = same and result.data[: len(expected)] == expected
        speeds = "".join(f"{values[-1]:>18.2f}" for values in uncached.values())
        print(f"{number:>5}  {cached[-1]:>12.1f}{speeds}  {'yes' if same else 'NO'}")
    fast = Spread.of(cached)
    document["runtime_bytes_per_second"] = fast.to_dict()
    for name, values in uncached.items():
        slow = Spread.of(values)
        ratio = fast.median / slow.median
        print(f"runtime {fast} bytes/s, {name} {slow} bytes/s: {ratio:.1f} times as fast")
        document[f"{name}_bytes_per_second"] = slow.to_dict()
        document["ratio" if name == "transformers" else f"ratio_{name}"] = ratio
    print_json(document)


def _load_reference(folder: Path, threads: int) -> Any:
    import torch
    from transformers import BltForCausalLM

    torch.set_num_threads(threads)
    return BltForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def _compile(reference: Any, prompt: bytes, count: int) -> float:
    """Seconds of compiling, which the first pass does. Dynamic shapes: else each new byte compiles again."""
    import torch

    started = time.perf_counter()
    reference.forward = torch.compile(reference.forward, dynamic=True)
    _decode_reference(reference, prompt, count)
    return time.perf_counter() - started


def _decode_reference(reference: Any, prompt: bytes, count: int) -> tuple[float, bytes]:
    """Ids a second, and the new bytes."""
    import torch

    ids = torch.tensor([[1, *(byte + 4 for byte in prompt)]])
    choices = {"use_cache": False, "do_sample": False, "suppress_tokens": [0, 1, 3], "eos_token_id": 2}
    started = time.perf_counter()
    with torch.no_grad():
        out = reference.generate(ids, max_new_tokens=count, pad_token_id=0, **choices)[0, ids.shape[1] :]
    seconds = time.perf_counter() - started
    return len(out) / seconds, bytes(token - 4 for token in out.tolist() if token >= 4)


if __name__ == "__main__":
    main()

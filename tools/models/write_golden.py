"""Write a checkpoint's golden file: what transformers computes of a fixed text, for checks without torch.

    python -m blt_edge.tools.models.write_golden CHECKPOINT [-o FILE] [-n BYTES]

CHECKPOINT is a folder in the Hugging Face layout. The file goes beside its weights as `golden.safetensors`
and must be written again whenever they change.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ...export.golden import GOLDEN_NAME, read_golden, write_golden
from ...runtime.errors import BltError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 the checkpoint can't be run, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="write_golden", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("checkpoint", type=Path, help="folder in the Hugging Face layout")
    add("-o", "--output", type=Path, help=f"file to write (default: CHECKPOINT/{GOLDEN_NAME})")
    add("-n", "--max-new-bytes", type=_count, default=200, help="greedy bytes (default: 200)")
    options = parser.parse_args(arguments)
    if not options.checkpoint.is_dir():
        print(f"{options.checkpoint}: no such folder; give a checkpoint's folder", file=sys.stderr)
        return 2
    try:
        path = write_golden(options.checkpoint, options.output, options.max_new_bytes)
        golden = read_golden(path)
    except (BltError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(path)
    print(
        f"{path.stat().st_size:,} bytes: {len(golden.data)} bytes of text in {len(golden.patch_lengths)} "
        f"patches, {len(golden.greedy)} greedy bytes, by {golden.name}",
        file=sys.stderr,
    )
    return 0


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) > 4096:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 4096")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())

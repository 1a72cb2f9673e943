"""Which precision each stage gets: what a user may write, and what the short words mean.

| precision | weights                                          | activations                      |
|-----------|--------------------------------------------------|----------------------------------|
| fp32      | float32                                          | float32                          |
| fp16      | float16                                          | float16 inside matrix products   |
| int8      | int8, one scale for each output                  | int8 on one calibrated scale     |
| int8w     | int8, one scale for each block of inputs         | float32                          |
| int4      | int4, one scale for each block of inputs         | float32                          |

Whatever the stage's precision, norms, softmax, the cache, the patcher's embedding, and the heads that make
logits and entropies stay float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..runtime.errors import OptionError
from ..runtime.fields import shown
from ..runtime.names import PRECISIONS

BLOCK_SIZES = (32, 64, 128)
"""Weights that may share a scale: what ONNX Runtime's fused product and TensorRT both take."""

LARGE_MATRIX = 1 << 19
"""Weights of a matrix from which on its blocks are large where nobody chose their size.

Larger blocks round a little worse, whatever the matrix, and gain more the larger it is: 4-bit products of 256
inputs and outputs 8 %, of 512 15 %, of 768 and more a quarter (docs/results.md).
"""

MIXES: Mapping[str, Mapping[str, str]] = {
    "fp32": {"patcher": "fp32", "encoder": "fp32", "latent": "fp32", "decoder": "fp32"},
    "fp16": {"patcher": "fp16", "encoder": "fp16", "latent": "fp16", "decoder": "fp16"},
    "int8": {"patcher": "int8w", "encoder": "int8w", "latent": "int8", "decoder": "int8"},
    "int8w": {"patcher": "int8w", "encoder": "int8w", "latent": "int8w", "decoder": "int8w"},
    "int4": {"patcher": "int8w", "encoder": "int8w", "latent": "int4", "decoder": "int4"},
}
"""What a single word means for each stage.

The patcher keeps 8 bits and float32 activations: its errors move patch boundaries. So does the encoder: it
is the smallest stage, everything after it reads its output, and its input, a sum of embeddings, fits one
int8 grid worst.
"""


def parse_precision(text: str, stages: Sequence[str]) -> dict[str, str]:
    """`text` as a precision for each of `stages`, in their order.

    `text` is a word of `MIXES`, or a list such as "patcher=fp32,encoder=int8,latent=int4,decoder=int8", or
    both: "int4,decoder=int8w" changes one stage of a mix. A stage that neither names stays fp32.

    Raises OptionError for an unknown word, stage or precision, and for a stage named twice.
    """
    result = dict.fromkeys(stages, "fp32")
    named: set[str] = set()
    for place, item in enumerate(text.split(",")):
        stage, equals, precision = (part.strip() for part in item.partition("="))
        if not equals:
            if place or stage not in MIXES:
                raise OptionError(
                    f"precision: got {shown(text)}, allowed are {', '.join(MIXES)}, and lists of stages "
                    f"such as {stages[-1]}=int8 ({', '.join(stages)})"
                )
            result.update({name: MIXES[stage][name] for name in stages})
            continue
        if stage not in stages:
            raise OptionError(f"precision: got stage {shown(stage)}, this model has {', '.join(stages)}")
        if precision not in PRECISIONS:
            raise OptionError(
                f"precision: got {shown(precision)} for {stage}, allowed are {', '.join(PRECISIONS)}"
            )
        if stage in named:
            raise OptionError(f"precision: {stage} is named twice; name each stage once")
        named.add(stage)
        result[stage] = precision
    return result


def format_precision(precisions: Mapping[str, str]) -> str:
    """The shortest spelling that `parse_precision` reads back: a mix's word, a list of stages, or both."""
    spellings = []
    for word, mix in MIXES.items():
        others = [f"{stage}={named}" for stage, named in precisions.items() if mix[stage] != named]
        # What a list leaves out stays fp32.
        spellings.append(",".join(others if word == "fp32" and others else (word, *others)))
    return min(spellings, key=len)


def needs_ranges(precisions: Mapping[str, str]) -> bool:
    """Whether any stage quantizes activations, so that their ranges have to be collected first."""
    return "int8" in precisions.values()


def check_block_size(block_size: int | None) -> None:
    """Raises OptionError when `block_size` is neither None nor one of `BLOCK_SIZES`."""
    if block_size is not None and (isinstance(block_size, bool) or block_size not in BLOCK_SIZES):
        raise OptionError(
            f"block size: got {block_size!r}, allowed are {', '.join(map(str, BLOCK_SIZES))}, and None to go "
            "by the matrix"
        )


def block_size_for(inputs: int, outputs: int) -> int | None:
    """How many of a matrix's inputs share a scale where nobody chose; None: no size divides them.

    Of `LARGE_MATRIX` weights or more the largest size that divides the inputs, else the smallest.
    """
    sizes = [size for size in BLOCK_SIZES if inputs % size == 0]
    if not sizes:
        return None
    return sizes[-1] if inputs * outputs >= LARGE_MATRIX else sizes[0]

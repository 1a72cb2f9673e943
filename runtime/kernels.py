"""Which of ONNX Runtime's kernels compute on this processor, and where that matters.

A family is a choice that MLAS, ONNX Runtime's library of kernels, makes once from what the processor can do.
"""

from __future__ import annotations

from collections.abc import Collection

from .fields import plain_text
from .host import MOST_NAME, describe_processor

__all__ = ["kernel_family", "kernels_matter"]

# MLAS chooses in the constructor of `MLAS_PLATFORM` (onnxruntime/core/mlas/lib/platform.cpp): a table of
# products over blocks (QNBitGemmDispatch) and kernels for products of integers, by these instructions.
#
# * Without AVX2, or without Arm's dot product, the table has no rounded products: blocks are multiplied in
#   float32, and activations are not rounded at all.
# * On Arm with dot product 4-bit products are KleidiAI's: one scale for a whole row of activations, and
#   weights' scales cut to bfloat16. 8-bit products round block by block, as both do on x86.
# * The others round alike and differ in the order of sums. In float32 that is the last bits; where
#   activations are rounded, a last bit decides now and then which way, and layers add it up.
#
# On the demo, ONNX Runtime 1.32, the mean difference of logits is 0.05% of their scale (int8w, int4) to 0.2%
# (int8) between AVX2 and AVX-512 VNNI, 0.05% to 0.2% between x86 and Arm, and as much between Arm with and
# without i8mm: to a quantized bundle each is a processor of its own. In float32 it is 0.00001%.
#
# AMX comes to the same sums of integers. SVE and SME change float32 sums only, and the processors that have
# them nearly all have i8mm. What a GPU computes is named by who opens it (`devices`).
_X86 = ("x86_64", "amd64")
_ARM = ("aarch64", "arm64")
_X86_NAME = "x86-64"
# Together they are what MLAS calls AVX512 core; the first processors with AVX-512 had the foundation alone.
_AVX512_CORE = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}


def kernel_family() -> str:
    """The family of this CPU, such as "aarch64 with dot product": for people, and to be compared.

    Where the system does not tell what the processor can do, that is part of the name.
    """
    processor = describe_processor()
    machine, features = processor["machine"].lower(), set(processor["features"].split())
    if machine not in (*_X86, *_ARM):  # there MLAS has one choice, or none that rounds
        return plain_text(machine or "unknown processor", MOST_NAME)
    name = _X86_NAME if machine in _X86 else "aarch64"
    if not features:
        return f"{name}, instructions unknown"
    return f"{name} {_on_x86(features) if machine in _X86 else _on_arm(features)}"


def kernels_matter(precisions: Collection[str], families: Collection[str]) -> bool:
    """Whether stages of these precisions give other results in one of these families than in another, by more
    than the order of sums in float32.

    float16 is multiplied in float32 on x86, but in float16 on Arm and on GPUs.
    """
    if set(precisions) <= {"fp32", "fp16"}:
        return "fp16" in precisions and not all(name.startswith(_X86_NAME) for name in families)
    return True


def _on_x86(features: set[str]) -> str:
    if not {"avx2", "fma"} <= features:
        return "without AVX2"
    if features >= _AVX512_CORE:
        return "with AVX-512 VNNI" if "avx512_vnni" in features else "with AVX-512"
    return "with AVX-VNNI" if "avx_vnni" in features else "with AVX2"


def _on_arm(features: set[str]) -> str:
    if "i8mm" in features:
        return "with i8mm"
    return "with dot product" if "asimddp" in features else "without dot product"

"""Rewriting a fused stage graph so that it keeps keys and values in 8 bits.

At one position a step attention waits for the cache, so a quarter of its bytes takes less time. ONNX
Runtime's `GroupQueryAttention` rounds new keys and values as it appends them, and multiplies what it reads by
scales, in float32:

    past.N.key, past.N.value [B, Hkv, C, head_dim] int8     a number times its channel's scale
    cache_scale.N.key, cache_scale.N.value                  float32 [1, Hkv, 1, head_dim], constants

A chunk of many positions reads the cache once for all of them and computes longer than it reads; there the
operator's products over float32 are faster (docs/results.md), and the graph as it was is the better one. All
else, weights included, stays as it is, so the new graph is of the same weights' file.

What this does not know: files, where scales come from, who reads which cache when.
"""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..runtime.errors import BltError
from .attention import DOMAIN

__all__ = ["narrow_caches"]

_CACHED = re.compile(r"(past|present)\.(\d+)\.(key|value)")
_KINDS = ("key", "value")
# Of the operator's inputs: past key and value, and the scales of both, the last two of fourteen.
_PAST, _SCALES = 3, 12
_ATTRIBUTES = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}


def narrow_caches(model: onnx.ModelProto, scales: npt.NDArray[np.float32], file: str) -> onnx.ModelProto:
    """The graph with 8-bit caches of a stage graph with fused attention; `model` is not changed.

    scales [2 * layers, Hkv, head_dim] float32, all > 0: of keys, then values, of each layer in turn. file:
    where the graph came from, for the error. Raises BltError when it is not what this version writes.
    """
    narrowed = onnx.ModelProto()
    narrowed.CopyFrom(model)
    graph = narrowed.graph
    layers, rest = divmod(len(scales), len(_KINDS))
    assert not rest
    attention = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    if len(attention) != layers or any(node.domain != DOMAIN for node in attention):
        raise BltError(f"{file}: its attention is not fused in {layers} layers; build it again")
    for layer, node in enumerate(attention):
        given = [*node.input, *[""] * (_SCALES - len(node.input))]
        cached = [f"past.{layer}.{kind}" for kind in _KINDS]
        if given[_PAST : _PAST + 2] != cached or len(given) != _SCALES:
            raise BltError(f"{file}: its caches are not what this version writes; build it again")
        for place, kind in enumerate(_KINDS):
            name = f"cache_scale.{layer}.{kind}"
            values = scales[2 * layer + place][np.newaxis, :, np.newaxis]
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
            given.append(name)
        node.input[:] = given
        # An optimized graph has what the attributes are by default.
        kept = [each for each in node.attribute if each.name not in _ATTRIBUTES]
        node.ClearField("attribute")
        node.attribute.extend(
            [*kept, *(helper.make_attribute(name, value) for name, value in _ATTRIBUTES.items())]
        )
    for values_ in (graph.input, graph.output, graph.value_info):
        for value in values_:
            if _CACHED.fullmatch(value.name):
                value.type.tensor_type.elem_type = TensorProto.INT8
    return narrowed

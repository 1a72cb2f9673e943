"""Operators outside the ONNX standard, as the installed ONNX Runtime has them on this processor.

An engine takes their meaning for granted, and versions differ: up to 1.23 `GroupQueryAttention` lets a window
see one key more than from 1.24 on. So they are run on a few numbers first, which finds that for versions that
nobody has tried, too.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..graphs.attention import DOMAIN, attention_node
from ..graphs.block_products import block_product, write_block_products
from ..graphs.prefill_products import ROW_STEPS, write_prefill_products
from ..runtime.backends.ort_session import (
    import_onnxruntime,
    int8_saturates,
    save_optimized,
    session_options,
)
from ..runtime.errors import BackendError

__all__ = [
    "check_version",
    "multiplies_blocks",
    "multiplies_integers",
    "prefill_bits",
    "save_for_prefill",
    "window_offset",
]

OLDEST = (1, 22)
"""ONNX Runtime's first version whose fused attention takes positions."""

Floats = npt.NDArray[np.float32]

# Of the operator that is tried.
_HEADS, _KV_HEADS, _WIDTH, _WINDOW, _CAPACITY = 4, 2, 16, 4, 16
# Kernels differ by how many rows there are.
_ROWS = (1, 17, 40, 130)


def check_version(
    what: str,
    first: tuple[int, int] = OLDEST,
    otherwise: str = "run the portable graphs, which need no engine",
) -> None:
    """Raise BackendError in one line when ONNX Runtime is older than `first`.

    what: needs a newer one. otherwise: what to do where there is none.
    """
    version = import_onnxruntime().__version__
    parts = [int(part) for part in version.split(".")[:2] if part.isdecimal()]
    if len(parts) == 2 and tuple(parts) < first:
        oldest = ".".join(map(str, first))
        raise BackendError(
            f"{what} needs ONNX Runtime {oldest} or newer, here it is {version}; pip install "
            f"'onnxruntime>={oldest}', or {otherwise}"
        )


@cache
def window_offset() -> int | None:
    """What `local_window_size` must have added so that a window of w keys sees w keys, the newest included.

    None when fused attention can't be had: the operator refuses our inputs or computes something else.
    """
    if not _attends_right(None, -1):
        return None
    return next((offset for offset in (0, -1, 1) if _attends_right(_WINDOW, _WINDOW + offset)), None)


@cache
def multiplies_blocks(bits: int) -> bool:
    """Whether the product over blocks of 4 or 8 bits is right once it was saved and loaded as engines are."""
    model = block_product(128, 32, bits)
    weight, scales = (
        tensor.numpy().astype(np.float32)
        for name in ("weight", "scales")
        if (tensor := model.graph.initializers[name].const_value) is not None
    )
    x = np.random.default_rng(0).standard_normal((3, len(weight))).astype(np.float32)
    wanted = x @ (weight * scales.repeat(len(weight) // len(scales), axis=0))
    write_block_products(model, bits)
    with TemporaryDirectory() as folder:
        try:
            found = _saved_and_run(model, Path(folder), "int4" if bits == 4 else "int8w", x)
        except Exception:  # ONNX Runtime raises many kinds; whatever it says, it can't be had
            return False
    # Inputs are rounded to int8.
    return bool(np.abs(found - wanted).max() <= 0.05 * np.abs(wanted).max())


def prefill_bits() -> int:
    """Bits of the weights that chunks are multiplied with: what this processor's products hold exactly."""
    return 7 if int8_saturates() else 8


def save_for_prefill(model: bytes, weights: Path, graph: Path) -> None:
    """`save_optimized` for chunks, whose many rows pay for laying out a weight anew in each pass: half of the
    disk, and nothing to do at a load.
    """
    save_optimized(model, weights, "fp32", graph, prepacked=False)


@cache
def multiplies_integers() -> bool:
    """Whether products of chunks are exact, whatever the integers, once they were saved as engines are."""
    model = block_product(128, 32, 8)
    write_prefill_products(model, prefill_bits())
    weight, steps = (
        tensor.numpy().astype(np.float64)
        for name in ("weight.prefill", "weight.prefill_scales")
        if (tensor := model.graph.initializers[name].const_value) is not None
    )
    random = np.random.default_rng(1)
    with TemporaryDirectory() as folder:
        try:
            session = _saved(model, Path(folder))
            for rows in _ROWS:
                x = random.standard_normal((rows, len(weight))).astype(np.float32)
                x[::3] = np.sign(x[::3])  # the largest integers, where sums overflow first
                x[::6] = 1
                scale = np.abs(x).max(axis=1, keepdims=True).astype(np.float64) / ROW_STEPS
                wanted = np.rint(x / scale) @ weight * steps * scale
                found = session.run(None, {"x": x})[0]
                # An integer is a hundredth of what one that overflows is off by.
                if not np.abs(found - wanted).max() <= 1e-3 * np.abs(wanted).max():
                    return False
        except Exception:  # ONNX Runtime raises many kinds; whatever it says, it can't be had
            return False
    return True


def _saved(model: ir.Model, folder: Path) -> Any:
    ir.save(model, folder / "packed.onnx", external_data="packed.data")
    graph = folder / "graph.onnx"
    save_for_prefill((folder / "packed.onnx").read_bytes(), folder, graph)
    return _loaded(graph, "fp32")


def _saved_and_run(model: ir.Model, folder: Path, precision: str, x: Floats) -> Floats:
    ir.save(model, folder / "packed.onnx", external_data="packed.data", size_threshold_bytes=0)
    graph = folder / "graph.onnx"
    save_optimized((folder / "packed.onnx").read_bytes(), folder, precision, graph)
    result: Floats = _loaded(graph, precision).run(None, {"x": x})[0]
    return result


def _loaded(graph: Path, precision: str) -> Any:
    ort = import_onnxruntime()
    options = session_options(ort, precision, 1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


# Attention: the operator beside plain numpy, whose cache is a list of all positions.


def _attends_right(window: int | None, attribute: int) -> bool:
    try:
        session = _attention(attribute)
        for past, count in ((0, 1), (0, 6), (7, 1), (7, 3)):
            random = np.random.default_rng(past + count)
            shape = (past + count, _HEADS + 2 * _KV_HEADS, _WIDTH)
            joined = random.standard_normal(shape).astype(np.float32)
            wanted, keys, values = _attend(joined, window)
            found = session.run(["mixed"], _feeds(joined[past:], keys[:past], values[:past]))[0][0]
            if not np.allclose(found, wanted[past:], rtol=0, atol=1e-4):
                return False
    except Exception:  # ONNX Runtime raises many kinds; whatever it says, it does not take our inputs
        return False
    return True


def _feeds(joined: Floats, *cached: Floats) -> dict[str, npt.NDArray[Any]]:
    """Inputs for `joined` [n, H + 2 Hkv, width], read after `cached` keys and values [past, Hkv, width]."""
    past, count = len(cached[0]), len(joined)
    buffers = np.zeros((2, 1, _KV_HEADS, _CAPACITY, _WIDTH), np.float32)
    for buffer, known in zip(buffers, cached, strict=True):
        buffer[0, :, :past] = known.transpose(1, 0, 2)
    cos, sin = _rotation(_CAPACITY)
    return {
        "joined": joined.reshape(1, count, -1),
        "past_key": buffers[0],
        "past_value": buffers[1],
        "past_length": np.array([past + count - 1], np.int32),
        "total_length": np.array(past + count, np.int32),
        "cos": cos,
        "sin": sin,
        "positions": np.arange(past, past + count, dtype=np.int64)[None],
    }


def _rotation(count: int) -> tuple[Floats, Floats]:
    angles = np.arange(count, dtype=np.float32)[:, None] / 3 ** np.arange(_WIDTH // 2, dtype=np.float32)
    return np.cos(angles), np.sin(angles)


def _attend(joined: Floats, window: int | None) -> tuple[Floats, Floats, Floats]:
    """Mixed values [n, heads * width], rotated keys and values [n, kv heads, width] of n positions."""
    count = len(joined)
    cos, sin = (part[:, None] for part in _rotation(count))
    first, second = np.split(joined[:, : _HEADS + _KV_HEADS], 2, axis=-1)
    rotated = np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    queries, keys, values = rotated[:, :_HEADS], rotated[:, _HEADS:], joined[:, _HEADS + _KV_HEADS :]
    group = _HEADS // _KV_HEADS
    scores = np.einsum("qhd,khd->hqk", queries, keys.repeat(group, 1)) / np.sqrt(_WIDTH)
    distance = np.arange(count)[:, None] - np.arange(count)
    seen = (distance >= 0) & (distance < (window or count))
    weights = np.where(seen, np.exp(scores), 0)
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("hqk,khd->qhd", weights, values.repeat(group, 1))
    return mixed.reshape(count, -1).astype(np.float32), keys, values


def _attention(window: int) -> Any:
    """A session of nothing but the operator, whose `local_window_size` is `window`."""
    cached = np.zeros((0, _KV_HEADS, _WIDTH), np.float32)
    feeds = _feeds(np.zeros((1, _HEADS + 2 * _KV_HEADS, _WIDTH), np.float32), cached, cached)
    joined, *others = inputs = [
        ir.Value(
            name=name,
            # One position here, more later.
            shape=ir.Shape(
                [1, "count", *array.shape[2:]] if name in ("joined", "positions") else array.shape
            ),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        )
        for name, array in feeds.items()
    ]
    node = attention_node(joined, others, heads=_HEADS, kv_heads=_KV_HEADS, window=window, name="attention")
    for output, name in zip(node.outputs, ("mixed", "key", "value"), strict=True):
        output.name = name
        output.type = joined.type
    opsets = {"": 20, DOMAIN: 1}
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports=opsets, name="probe")
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

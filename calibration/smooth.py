"""Moving the difficulty of activations into weights before both are quantized (SmoothQuant, 2211.10438).

A channel of an activation that is much larger than the others costs a per-tensor grid its resolution.
Dividing the channel by s where it is made and multiplying the weight's row that reads it by s changes no
result, and levels the channels. An activation can be divided where it is made when that is

- a norm whose output enters weight products only: its weight is divided;
- the gated product of a feed-forward: the columns of the joined projection that make `up`;
- attention's output: the columns that make `value`, which its query heads share. The cache then holds divided
  values, consistently.

Other activations stay as they are. What it does not know: texts, how ranges were found.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..graphs.quantize import WeightFactors, linear_products
from ..graphs.surgery import foreign_graph, input_of, made_by, weights_from
from ..runtime.errors import OptionError
from ..runtime.manifest import load_manifest
from .observers import Ranges

__all__ = ["DEFAULT_STRENGTH", "Migration", "Smoothing", "find_migrations", "find_smoothing"]

Floats = npt.NDArray[np.float32]
Columns = npt.NDArray[np.int64]

DEFAULT_STRENGTH = 0.5
"""Half of the difference goes into the weights, the paper's default."""

# Beyond this a factor says more about a dead channel than about a loud one.
_MOST = 1e4


@dataclass(frozen=True)
class Migration:
    """An activation that can be divided where it is made."""

    source: str
    """Name of the norm's or projection's weight that makes it."""
    columns: Columns
    """int64 [K]: the output of `source` that each channel comes from; several channels may share one."""
    weights: tuple[str, ...]
    """Names of all weights [K, N] that read it."""


@dataclass(frozen=True)
class Smoothing:
    """Factors to change weights by, and what that does to activations."""

    factors: dict[str, WeightFactors]
    """By name of a norm's or product's weight: what it is multiplied with (`quantize.Recipe.factors`)."""
    divisors: dict[str, Floats]
    """By name of a product's weight: float32 [K] that its input is divided by after smoothing."""


def find_smoothing(
    bundle: str | Path,
    ranges: Ranges,
    *,
    strength: float = DEFAULT_STRENGTH,
    stages: Collection[str] | None = None,
) -> Smoothing:
    """Factors for the stages of a float32 bundle (None = all) from the channel maxima in `ranges`.

    s_k = max|X_k|^strength / max|W_k|^(1 - strength) for channel k: strength 0 leaves activations as they
    are, 1 makes their channels alike. Weights are read one at a time. The
    limits in `ranges` are not those of the smoothed model: collect again with `divisors`. Raises OptionError
    for a strength outside 0 to 1.
    """
    check_strength(strength)
    directory = Path(bundle)
    manifest = load_manifest(directory)
    rows: dict[str, Floats] = {}
    columns: dict[str, Floats] = {}
    for stage, spec in manifest.stages.items():
        if stages is not None and stage not in stages:
            continue
        with foreign_graph(directory / spec.file):
            model = ir.load(directory / spec.file)
            weights_from(model, directory / spec.data)
            graph = model.graph
            migrations = find_migrations(graph)
        for migration in migrations:
            divisor = _divisor(graph, migration, ranges, strength)
            rows.update(dict.fromkeys(migration.weights, divisor))
            shape = graph.initializers[migration.source].shape
            assert shape is not None
            unchanged = np.ones(int(shape.numpy()[-1]), np.float32)
            columns.setdefault(migration.source, unchanged)[migration.columns] = 1 / divisor
    factors = {name: WeightFactors(rows.get(name), columns.get(name)) for name in {**columns, **rows}}
    return Smoothing(factors, rows)


def check_strength(strength: float) -> None:
    """Raise OptionError for a strength outside 0 to 1."""
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength <= 1:
        raise OptionError(f"smooth: got {strength!r}, a number from 0 to 1 is needed")


def _divisor(graph: ir.Graph, migration: Migration, ranges: Ranges, strength: float) -> Floats:
    activation = ranges.channel_max(migration.weights[0]).astype(np.float64)
    weight = np.max([_row_max(graph.initializers[name]) for name in migration.weights], axis=0)
    shared = np.zeros((2, int(migration.columns.max()) + 1))
    np.maximum.at(shared[0], migration.columns, activation)
    np.maximum.at(shared[1], migration.columns, weight)
    activation, weight = shared[:, migration.columns]
    alive = (activation > 0) & (weight > 0)
    factors = np.ones(len(alive))
    factors[alive] = activation[alive] ** strength / weight[alive] ** (1 - strength)
    # What all channels have in common helps nobody: keep weights and activations at their size.
    if alive.any():
        factors[alive] /= np.exp(np.log(factors[alive]).mean())
    return np.clip(factors, 1 / _MOST, _MOST).astype(np.float32)


def _row_max(weight: ir.Value) -> npt.NDArray[np.float64]:
    tensor = weight.const_value
    assert tensor is not None
    values = tensor.numpy()
    largest: npt.NDArray[np.float64] = np.maximum(values.max(axis=1), -values.min(axis=1)).astype(np.float64)
    del values  # a file that is still looked at cannot be unmapped
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return largest


# Where activations come from, read off the graph.


def find_migrations(graph: ir.Graph) -> list[Migration]:
    """The activations of a float32 stage graph that can be divided where they are made, in graph order."""
    by_value: dict[str, list[ir.Node]] = {}
    for node in linear_products(graph):
        by_value.setdefault(str(input_of(node, 0).name), []).append(node)
    found = []
    for nodes in by_value.values():
        value = input_of(nodes[0], 0)
        readers = [user for user, _ in value.uses() if user.op_type != "Shape"]
        if value.is_graph_output() or len(readers) != len(nodes):
            continue  # somebody else reads it too, and would see it divided
        origin = _norm(value) or _gated(value) or _attended(value)
        if origin is not None:
            found.append(Migration(*origin, tuple(str(input_of(node, 1).name) for node in nodes)))
    return found


_Origin = tuple[str, Columns]
"""`source` and `columns` of a `Migration`."""


def _norm(value: ir.Value) -> _Origin | None:
    product = made_by(value, "Mul")
    if product is None or made_by(input_of(product, 0), "Div") is None:
        return None
    weight = input_of(product, 1)
    if not weight.is_initializer() or weight.shape is None:
        return None
    return str(weight.name), np.arange(int(weight.shape.numpy()[0]))


def _gated(value: ir.Value) -> _Origin | None:
    product = made_by(value, "Mul")
    split = None if product is None else made_by(input_of(product, 1), "Split")
    if product is None or split is None or len(split.outputs) != 2:
        return None
    up, joined = split.outputs[1], input_of(split, 0)
    projection = _projection(joined)
    if input_of(product, 1) is not up or len(up.uses()) != 1 or len(joined.uses()) != 1 or projection is None:
        return None
    name, outputs = projection
    return name, np.arange(outputs // 2, outputs)


def _attended(value: ir.Value) -> _Origin | None:
    # From the end: Reshape, Transpose, Reshape, Add, MatMul(weights, value), and value from Split, Transpose,
    # Reshape, product.
    mixed = _chain(value, "Reshape", "Transpose", "Reshape")
    joined = None if mixed is None else made_by(mixed, "Add")
    if joined is None:
        return None
    past, new = (made_by(input_of(joined, place), "MatMul") for place in (0, 1))
    if past is None or new is None or not input_of(past, 1).is_graph_input():
        return None
    values, cached = input_of(new, 1), input_of(past, 1)
    split = made_by(values, "Split")
    projected = None if split is None else _chain(input_of(split, 0), "Transpose", "Reshape")
    projection = None if projected is None else _projection(projected)
    if split is None or projection is None or values is not split.outputs[1] or cached.shape is None:
        return None
    name, outputs = projection
    kv_heads, head_dim = int(cached.shape[1]), int(cached.shape[3])  # type: ignore[arg-type]
    heads = outputs // head_dim - 2 * kv_heads
    by_head = outputs - kv_heads * head_dim + np.arange(kv_heads * head_dim).reshape(kv_heads, head_dim)
    return name, by_head.repeat(heads // kv_heads, axis=0).reshape(-1)


def _chain(value: ir.Value, *operators: str) -> ir.Value | None:
    """Backwards from `value` through these operators' first inputs; None when it is made otherwise."""
    for operator in operators:
        node = made_by(value, operator)
        if node is None:
            return None
        value = input_of(node, 0)
    return value


def _projection(value: ir.Value) -> tuple[str, int] | None:
    """Name and outputs of the matrix in the product that makes `value`."""
    node = made_by(value, "MatMul")
    weight = None if node is None else input_of(node, 1)
    if weight is None or not weight.is_initializer() or weight.shape is None:
        return None
    return str(weight.name), int(weight.shape.numpy()[1])

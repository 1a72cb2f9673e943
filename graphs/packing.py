"""Rewriting a stage graph for one text into one that takes the new bytes of several texts at once.

Products with weights cost nearly the same for a few rows as for one; attention belongs to one text. So a
packed graph of R texts takes the new positions of all of them behind one another in one axis: norms, products
and heads run on all N at once, and what reads a text's past is there once for each text, over its own part.

A graph is rewritten when it is finished, whatever its precision, with attention spelled out or fused, before
or after ONNX Runtime has optimized it; weights stay the initializers that they are, in the same file:

    rows int64 [R]                               how many of the N positions are each text's, all >= 1
    byte_ids, byte_embeds, positions, ...        [1, N, ...], as before
    row{r}.past.{l}.key, .value                  [1, Hkv, past{r}, head_dim], text r's own
    row{r}.past_positions                        int64 [1, past{r}], where attention is spelled out
    row{r}.past_length, row{r}.total_length      int32 [1] and [], where it is fused
    row{r}.patch_values                          [slots{r}, V], the decoder's, in which text r's part of
                                                 patch_index counts
    row{r}.new_kv                                output [2 * layers, 1, Hkv, new{r}, head_dim], or
    row{r}.present.{l}.key, .value               outputs, the buffers of row{r}.past.*
    entropy, logits, byte_states, patch_values   outputs [1, N, ...]

Which nodes are a text's own is read off the values that they take, not their names, which an optimizer
changes: all that depends on the past, up to the next product with weights; back from there, all that is made
of the product before. What this does not know: files, weights' values, what an engine makes of the graph.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

from ..runtime.backends.signatures import ROWS, row_name
from ..runtime.errors import BltError
from ..runtime.names import MOST_ROWS

__all__ = ["pack_rows"]

# Inputs that are each text's own, but for its cache; outputs likewise.
_OWN = ("past_positions", "past_length", "total_length", "patch_values")
_OWN_RESULT = re.compile(r"new_kv|present\.\d+\.(key|value)")
_CACHED = re.compile(r"past\.\d+\.(key|value)")
_TAKEN = re.compile(r"row\d+\.|rows(\.|$)")
# The axis of positions, where texts are parted and joined.
_AXIS = 1
# Steps that treat each number by itself: they stay with the product that they prepare values for.
_PREPARING = ("QuantizeLinear", "DequantizeLinear", "Cast", "Identity")


def pack_rows(model: onnx.ModelProto, rows: int, file: str) -> onnx.ModelProto:
    """The packed graph of `rows` texts, 2 to MOST_ROWS, of a stage graph for one; `model` is not changed.

    file: where the graph came from, for the error. Raises BltError when it is not what this version writes.
    """
    assert 2 <= rows <= MOST_ROWS, rows
    graph = model.graph
    try:
        nodes = _Packer(graph, rows).nodes()
        packed = onnx.ModelProto()
        packed.CopyFrom(model)
        for kind in ("node", "input", "output", "value_info"):
            packed.graph.ClearField(kind)
        packed.graph.node.extend(nodes)
        packed.graph.input.extend(_packed_inputs(graph.input, rows))
        packed.graph.output.extend(_packed_outputs(graph.output, rows))
    except _ForeignError as error:
        raise BltError(f"{file}: it can't be packed ({error}); export it again") from error
    return packed


class _ForeignError(Exception):
    """Not a graph that this version writes; the text says why."""


# 1. Inputs and outputs.


def _is_own(name: str) -> bool:
    return name in _OWN or _CACHED.fullmatch(name) is not None


def _packed_inputs(inputs: Iterable[ValueInfoProto], rows: int) -> Iterator[ValueInfoProto]:
    own = []
    for value in inputs:
        if _is_own(value.name):
            own.append(value)
        else:
            yield _one_batch(value)
    yield helper.make_tensor_value_info(ROWS, TensorProto.INT64, [rows])
    for row in range(rows):
        yield from (_of_row(value, row) for value in own)


def _packed_outputs(outputs: Iterable[ValueInfoProto], rows: int) -> Iterator[ValueInfoProto]:
    own = []
    for value in outputs:
        if _OWN_RESULT.fullmatch(value.name):
            own.append(value)
        else:
            yield _one_batch(value)
    for row in range(rows):
        yield from (_of_row(value, row) for value in own)


def _one_batch(value: ValueInfoProto) -> ValueInfoProto:
    copy = ValueInfoProto()
    copy.CopyFrom(value)
    for dim in copy.type.tensor_type.shape.dim:
        if dim.dim_param == "batch":
            dim.dim_value = 1
    return copy


def _of_row(value: ValueInfoProto, row: int) -> ValueInfoProto:
    copy = _one_batch(value)
    copy.name = row_name(row, value.name)
    for dim in copy.type.tensor_type.shape.dim:
        if dim.dim_param in ("past", "patch_slots"):
            dim.dim_param = f"{dim.dim_param.rpartition('_')[2]}{row}"
        elif dim.dim_param:
            dim.dim_param = f"new{row}"
    return copy


# 2. Nodes.


class _Packer:
    """Finds what is each text's own in a graph, and writes its nodes anew."""

    def __init__(self, graph: onnx.GraphProto, rows: int) -> None:
        self._graph, self._rows = graph, rows
        self._inputs = {value.name for value in graph.input}
        self._outputs = {value.name for value in graph.output}
        if "positions" not in self._inputs:
            raise _ForeignError("it has no positions")
        self._maker: dict[str, int] = {}
        self._users: dict[str, list[int]] = {}
        self._varying = self._check_nodes()
        self._own = self._find_own()
        self._written: list[NodeProto] = []
        self._split: set[str] = set()
        self._joined: set[str] = set()

    def _check_nodes(self) -> set[str]:
        """Values that depend on an input. Refuses what no graph of ours has."""
        known = {tensor.name for tensor in self._graph.initializer}
        if known & self._inputs:
            raise _ForeignError("an input has a default value")
        varying = set(self._inputs)
        known |= varying
        if self._graph.sparse_initializer:
            raise _ForeignError("it has sparse weights")
        for place, node in enumerate(self._graph.node):
            if any(each.type in (each.GRAPH, each.GRAPHS) for each in node.attribute):
                raise _ForeignError("it has subgraphs")
            given = [name for name in node.input if name]
            made = [name for name in node.output if name]
            if not made or not known.issuperset(given) or not known.isdisjoint(made):
                raise _ForeignError("its nodes are not in order")
            known.update(made)
            for name in given:
                self._users.setdefault(name, []).append(place)
            self._maker.update(dict.fromkeys(made, place))
            if not varying.isdisjoint(given):
                varying.update(made)
        if any(_TAKEN.match(name) for name in (*known, *(node.name for node in self._graph.node))):
            raise _ForeignError("it is packed already")
        if not self._outputs <= self._maker.keys():
            raise _ForeignError("an output is made by no node")
        return varying

    # What is each text's own.

    def _find_own(self) -> set[int]:
        """Places of the nodes that are there once for each text."""
        own: set[int] = set()
        seeds = [place for name in self._inputs if _is_own(name) for place in self._users.get(name, ())]
        seeds += [self._maker[name] for name in self._outputs if _OWN_RESULT.fullmatch(name)]
        waiting = list(seeds)
        while waiting:
            place = waiting.pop()
            if place in own:
                continue
            own.add(place)
            node = self._graph.node[place]
            waiting += self._before(node)
            if "patch_values" in node.input:
                # A patch's values for each position: from here on positions are alike again.
                if node.op_type != "Gather":
                    raise _ForeignError("patch values are not gathered")
            else:
                waiting += [
                    user
                    for name in node.output
                    for user in self._users.get(name, ())
                    if not self._multiplies_weights(self._graph.node[user])
                ]
        # What only prepares values for a product runs on all positions at once.
        for place in sorted(own, reverse=True):
            node = self._graph.node[place]
            if node.op_type in _PREPARING and self._leaves(node, own):
                own.discard(place)
        for place in own:
            for name in self._graph.node[place].output:
                if name in self._outputs and not _OWN_RESULT.fullmatch(name):
                    raise _ForeignError(f"output {name[:60]!r} depends on the past without a product between")
        return own

    def _before(self, node: NodeProto) -> Iterator[int]:
        """Nodes that make what a text's own node takes, back to the last product with weights."""
        if node.op_type == "Shape":
            return
        for name in node.input:
            if name in self._varying and name in self._maker:
                place = self._maker[name]
                if not self._multiplies_weights(self._graph.node[place]):
                    yield place

    def _leaves(self, node: NodeProto, own: set[int]) -> bool:
        """Whether a node's results are for nodes of all texts only."""
        users = [user for name in node.output for user in self._users.get(name, ())]
        last = not self._outputs.isdisjoint(node.output)
        return bool(users) and not last and own.isdisjoint(users) and self._varying.issuperset(node.input[:1])

    def _multiplies_weights(self, node: NodeProto) -> bool:
        if "MatMul" not in node.op_type and node.op_type != "Gemm":
            return False
        return any(name and name not in self._varying for name in node.input[1:])

    # Writing.

    def nodes(self) -> list[NodeProto]:
        """The packed graph's nodes, in order."""
        for place, node in enumerate(self._graph.node):
            if place not in self._own:
                for name in node.input:
                    if self._maker.get(name) in self._own:
                        self._join(name)
                self._written.append(node)
                continue
            taken = [self._taken(node, name) for name in node.input]
            for row in range(self._rows):
                copy = NodeProto()
                copy.CopyFrom(node)
                copy.name = row_name(row, node.name or f"{node.op_type}_{place}")
                copy.input[:] = [row_name(row, name) if each else name for name, each in taken]
                copy.output[:] = [row_name(row, name) if name else "" for name in node.output]
                self._written.append(copy)
        return self._written

    def _taken(self, node: NodeProto, name: str) -> tuple[str, bool]:
        """What a text's own node takes for an input: (name, whether each text has its own)."""
        if name not in self._varying:
            return name, False
        if _is_own(name) or self._maker.get(name) in self._own:
            return name, True
        if node.op_type == "Shape":
            # Only the first two sizes are asked for, and positions have them, too.
            sizes = {each.name: each.i for each in node.attribute}
            if not 0 <= sizes.get("start", 0) < sizes.get("end", 3) <= 2:
                raise _ForeignError("it asks for sizes of what no text has alone")
            name = "positions"
        if name not in self._split:
            self._split.add(name)
            parts = [row_name(row, name) for row in range(self._rows)]
            self._written.append(helper.make_node("Split", [name, ROWS], parts, f"{ROWS}.{name}", axis=_AXIS))
        return name, True

    def _join(self, name: str) -> None:
        """Put the texts' parts of a value [1, n, ...] behind one another."""
        if name not in self._joined:
            self._joined.add(name)
            parts = [row_name(row, name) for row in range(self._rows)]
            self._written.append(helper.make_node("Concat", parts, [name], f"{ROWS}.{name}", axis=_AXIS))

"""What a stage graph must take and give, as the manifest describes it.

A bundle is untrusted: a graph of other shapes than its manifest says would be bound to buffers of the
wrong size. Backends compare the loaded graph with this before they run it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..errors import BundleError
from ..files import open_plain
from ..manifest import Manifest, StageSpec

__all__ = [
    "ROWS",
    "Shapes",
    "Signature",
    "check_signature",
    "check_weights_file",
    "input_type",
    "is_of_a_row",
    "new_axis",
    "output_shapes",
    "packed_signature",
    "row_name",
    "stage_inputs",
    "stage_outputs",
    "stage_signature",
]

Shapes = dict[str, tuple["int | str", ...]]
"""Tensor name -> its axes: a number, or the name of a dynamic axis."""

Signature = tuple[Shapes, Shapes]
"""A graph's (inputs, outputs)."""

ROWS = "rows"
"""The input of a packed graph that says how many positions each text has."""

# What a text's own axes are called in a packed graph, with the text's number behind.
_OF_A_ROW = {"past": "past", "patch_slots": "slots", "bytes": "new", "patches": "new"}
_WHOLE_NUMBERS = ("byte_ids", "patch_index", "patch_lengths", "past_positions", "positions", "rows")
_ROW = re.compile(r"row\d+\.")


def new_axis(stage: str) -> str:
    """What the axis of new positions is called in a stage's graph."""
    return "patches" if stage == "latent" else "bytes"


def stage_signature(manifest: Manifest, stage: str, *, fused: bool = False) -> Signature:
    """Inputs and outputs of a stage's graph.

    fused: with fused attention, over a cache whose positions lie in order.
    """
    return stage_inputs(manifest, stage, fused=fused), stage_outputs(manifest, stage, fused=fused)


def stage_inputs(manifest: Manifest, stage: str, *, fused: bool = False) -> Shapes:
    """Inputs of a stage's graph; fused: as for `stage_signature`."""
    spec, width = manifest.stages[stage], manifest.model.width
    axis = new_axis(stage)
    own: dict[str, Shapes] = {
        "patcher": {"byte_ids": ("batch", axis)},
        "encoder": {"byte_embeds": ("batch", axis, width)},
        "latent": {"patch_bytes": ("batch", axis, "patch_length", width), "patch_lengths": ("batch", axis)},
        "decoder": {
            "byte_states": ("batch", axis, width),
            "patch_values": ("patch_slots", spec.patch_values or 0),
            "patch_index": ("batch", axis),
        },
    }
    told: Shapes = {"past_positions": ("batch", "past")}
    if fused:
        told = {"past_length": ("batch",), "total_length": ()}
    return {**own[stage], "positions": ("batch", axis), **told, **_cache(spec, "past")}


def stage_outputs(manifest: Manifest, stage: str, *, fused: bool = False) -> Shapes:
    """Outputs of a stage's graph; fused: as for `stage_signature`."""
    spec, model = manifest.stages[stage], manifest.model
    axis = new_axis(stage)
    logits: Shapes = {"logits": ("batch", axis, model.vocab_size)}
    own: dict[str, Shapes] = {
        "patcher": {"entropy": ("batch", axis), **logits},
        "encoder": {"byte_states": ("batch", axis, model.width)},
        "latent": {"patch_values": ("batch", axis, spec.patch_values or 0)},
        "decoder": logits,
    }
    if fused:
        return {**own[stage], **_cache(spec, "present")}
    return {**own[stage], "new_kv": (2 * spec.layers, "batch", spec.kv_heads, axis, spec.head_dim)}


def row_name(row: int, name: str) -> str:
    """What an input or output that belongs to one text is called in a packed graph."""
    return f"row{row}.{name}"


def is_of_a_row(name: str) -> bool:
    """Whether an input or output of a packed graph is called as `row_name` does."""
    return _ROW.match(name) is not None


def packed_signature(manifest: Manifest, stage: str, rows: int, *, fused: bool = False) -> Signature:
    """Inputs and outputs of a stage's graph for `rows` texts, whose new positions share one axis.

    "rows" int64 [rows] tells how many of them are each text's; a text's past is its own.
    """
    inputs, outputs = stage_signature(manifest, stage, fused=fused)
    # New positions of all, [1, N, ...]; everything else is there once a text, its axes too.
    own = {*inputs, *outputs} - {"past_positions", "past_length", "total_length", "patch_values", "new_kv"}
    if stage == "latent":
        own.add("patch_values")
    own = {name for name in own if not name.startswith(("past.", "present."))}
    told: list[Shapes] = [{ROWS: (rows,)}, {}]
    for shapes, found in zip(told, (inputs, outputs), strict=True):
        for name, axes in found.items():
            if name in own:
                shapes[name] = tuple(1 if one == "batch" else one for one in axes)
        for row in range(rows):
            for name, axes in found.items():
                if name not in own:
                    each = (1 if one == "batch" else one for one in axes)
                    shapes[row_name(row, name)] = tuple(
                        f"{_OF_A_ROW[one]}{row}" if isinstance(one, str) else one for one in each
                    )
    return told[0], told[1]


def _cache(spec: StageSpec, when: str) -> Shapes:
    return {
        f"{when}.{layer}.{kind}": ("batch", spec.kv_heads, "past", spec.head_dim)
        for layer in range(spec.layers)
        for kind in ("key", "value")
    }


def input_type(name: str) -> type[np.generic]:
    """int64 or float32, in packed graphs too; outputs are float32, all of them."""
    return np.int64 if _ROW.sub("", name, count=1) in _WHOLE_NUMBERS else np.float32


def output_shapes(signature: Signature, given: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes of a graph's outputs when its inputs are `given` these shapes."""
    inputs, outputs = signature
    sizes: dict[str, int] = {}
    for name, shape in given.items():
        for axis, size in zip(inputs[name], shape, strict=True):
            if isinstance(axis, str):
                sizes[axis] = size
    return {
        name: tuple(sizes[axis] if isinstance(axis, str) else axis for axis in axes)
        for name, axes in outputs.items()
    }


def check_signature(file: str, expected: Signature, found: Signature) -> None:
    """Raise BundleError naming the first input or output of `file` that is not as expected."""
    for kind, wanted, there in zip(("input", "output"), expected, found, strict=True):
        for name in [*wanted, *there]:
            if wanted.get(name) != there.get(name):
                raise BundleError(
                    f"{file}: {kind} {name[:60]!r} is {_shown(there.get(name))}, the manifest asks for "
                    f"{_shown(wanted.get(name))}; export the checkpoint again"
                )


def check_weights_file(graph: Path, data: str) -> None:
    """Raise BundleError when a graph's file names another file than `data`, beside it, for its weights.

    Up to 1.23 ONNX Runtime follows a path that leaves the directory. A graph names a file in an entry of key
    "location" (tag and length of the entry, then of key and value): all of them have to be as any serializer
    writes them, so nothing passes that a reader might see otherwise.
    """
    with open_plain(graph) as file:
        content = file.read()
    name = data.encode()
    entry = b"\x0a\x08location\x12" + bytes([len(name)]) + name
    assert len(entry) < 128, "its length takes one byte"
    wanted = b"\x6a" + bytes([len(entry)]) + entry
    if content.count(b"location") != content.count(wanted):
        raise BundleError(
            f"{graph.name}: its weights do not all lie in {data}; copy the bundle again or export the "
            "checkpoint again"
        )


def _shown(axes: tuple[int | str, ...] | None) -> str:
    """Axes for a message: names come from a graph that nobody vouches for."""
    if axes is None:
        return "absent"
    text = f"[{', '.join(map(str, axes))}]"
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 120 else f"{text[:116]}...]"

"""Words that users, bundles and the runtime share. No import: whoever shows or checks a word pays nothing."""

from __future__ import annotations

MANIFEST_NAME = "manifest.json"

CHAT_TEMPLATE_NAME = "chat_template.jinja"
"""What turns a conversation into a text, in checkpoints and in bundles."""

VOCAB_SIZE = 260
"""Number of ids: four special ones, then the 256 bytes."""

BOS = 1
"""The id that every text begins with."""

EOS = 2
"""The id that ends a text, of every model."""

BYTE_OFFSET = 4
"""The id of byte 0; the ids below it are special."""

STAGES = ("patcher", "encoder", "latent", "decoder")
"""The stage graphs, in the order in which they run."""

PRECISIONS = ("fp32", "fp16", "int8", "int8w", "int4")
"""What a stage's weights are stored as; "int8w" rounds weights in blocks and leaves activations alone."""

BLOCK_PRECISIONS = ("int8w", "int4")
"""Those whose weights are in blocks with a scale each."""

SEARCHES = ("mse", "rtn")
"""How the scale of a weight's integers is found."""

TABLE_PRECISIONS = {"float16": "fp16", "float32": "fp32", "int8": "int8", "int4": "int4"}
"""What the embedding tables are stored as: the manifest's word, and the user's."""

CALIBRATION_METHODS = ("minmax", "percentile", "entropy", "mse")
"""How the range of an activation is chosen from what was seen."""

PATCHING_MODES = ("entropy", "space", "static", "byte")
"""By what patches begin."""

DEVICES = ("auto", "cpu", "tensorrt", "tensorrt-rtx", "cuda", "ort-tensorrt", "ort-tensorrt-rtx")
"""What a model can be loaded on."""

DRAFTS = ("auto", "none", "decoder", "patcher", "lookup")
"""Where guesses at the next bytes may come from (`drafting`): `auto` goes by what pays, `none` makes none."""

MOST_ROWS = 64
"""Texts that one packed graph may take: attention is there once for each of them."""

CHUNK_POSITIONS = 34
"""Passes of so many new positions or more are a prompt's chunks, for which a stage may have its own graph.
A byte and the longest draft behind it are fewer: steps and guesses share a graph."""

CACHES = ("float32", "int8")
"""What an engine for ONNX Runtime keeps keys and values as, while a text goes on."""


def graph_file(stage: str, caches: str = "float32") -> str:
    """Name of a stage's graph in an engine for ONNX Runtime. caches: what it reads, one of `CACHES`."""
    return f"{stage}.onnx" if caches == "float32" else f"{stage}.{caches}.onnx"


def packed_graph_file(stage: str, rows: int, caches: str = "float32") -> str:
    """Name of a stage's graph for so many texts at once, in a bundle and in an engine for ONNX Runtime.

    caches: as for `graph_file`.
    """
    return f"{graph_file(stage, caches).removesuffix('.onnx')}.rows{rows}.onnx"


def prefill_graph_file(stage: str) -> str:
    """Name of the graph with which a stage of an engine for ONNX Runtime reads chunks in int8."""
    return f"{stage}.prefill.onnx"

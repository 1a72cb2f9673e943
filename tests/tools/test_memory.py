"""The memory that is foretold of a text's state, against what the runtime takes."""

from __future__ import annotations

from blt_edge.runtime import BltModel
from blt_edge.runtime.manifest import load_manifest
from blt_edge.runtime.vocabulary import encode
from blt_edge.tools.memory import state_memory


def test_state_memory_is_what_the_runtime_takes(tiny_model) -> None:
    model = BltModel.load(tiny_model.bundle, threads=1)
    foretold = state_memory(model.manifest)
    sequence = model.sequence()
    text = bytes(range(256)) * 2
    sequence.append(encode(text[: foretold.positions - 1]))
    assert sequence.length == foretold.positions
    taken = sequence.state_bytes
    patches = foretold.patches * foretold.per_patch
    # The global cache is made for as many patches as it may need at once, and buffers are powers of two.
    assert foretold.at_full_length - patches <= taken + foretold.per_patch
    most = foretold.fixed + foretold.windowed + foretold.positions * foretold.per_patch
    assert taken <= 1.5 * most


def test_state_memory_of_a_longer_chunk_is_larger(tiny_model) -> None:
    manifest = load_manifest(tiny_model.bundle)
    assert state_memory(manifest, prefill_chunk=512).fixed > state_memory(manifest).fixed
    assert state_memory(manifest, rollback=0).windowed < state_memory(manifest).windowed

"""The memory that is foretold of a text's state, against what the runtime takes."""

from __future__ import annotations

from blt_edge.runtime import BltModel
from blt_edge.runtime.vocabulary import encode
from blt_edge.tools.memory import state_memory


def test_state_memory_is_what_the_runtime_takes(model: BltModel) -> None:
    foretold = state_memory(model.manifest)
    sequence = model.sequence()
    sequence.append(encode((bytes(range(256)) * 2)[: foretold.positions - 1]))
    assert sequence.length == foretold.positions
    taken = sequence.state_bytes
    patches = foretold.patches * foretold.per_patch
    # The global cache is made for as many patches as it may need at once, and buffers are powers of two.
    assert foretold.at_full_length - patches <= taken + foretold.per_patch
    assert taken <= 1.5 * (foretold.fixed + foretold.windowed + foretold.positions * foretold.per_patch)
    assert state_memory(model.manifest, prefill_chunk=512).fixed > foretold.fixed
    assert state_memory(model.manifest, rollback=0).windowed < foretold.windowed

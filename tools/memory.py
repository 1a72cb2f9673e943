"""What running a bundle will take of memory, foretold from its manifest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..runtime.manifest import Manifest, StageSpec

# Resident bytes for each byte of a stage's weights, by whether an engine is used. Float16 is widened;
# integers are laid out anew in private memory, or come with a second layout in the engine, of which a part is
# touched.
_RESIDENT: dict[bool, dict[str, float]] = {
    True: {"fp16": 2.0, "int8": 1.4, "int8w": 1.4, "int4": 1.4},
    False: {"fp16": 3.0, "int8": 2.0, "int8w": 2.0, "int4": 2.0},
}
_PROGRAM = 80_000_000
"""Python, numpy and the engine themselves, in bytes."""


@dataclass(frozen=True)
class StateMemory:
    """Memory of one text's state: caches in float32 and recent states. Bytes."""

    positions: int
    """The longest text in ids, BOS included."""
    per_byte: int
    """The caches that grow with every byte, until their windows are full."""
    per_patch: int
    """The cache that grows with every patch, to the end of the text."""
    fixed: int
    """Recent patch values, byte states and logits, whatever the text's length."""
    windowed: int
    """The caches of bytes at the longest text."""
    patches: int
    """Patches of the longest text at `bytes_per_patch`."""
    bytes_per_patch: float
    """Assumed for `patches`: what the patching rule fixes, else 4."""
    open_patch: int
    """Byte states of the longest patch there can be, on top of all."""
    longest_patch: int
    """That patch's bytes: `max_patch_length`, else the position limit."""

    @property
    def at_full_length(self) -> int:
        """The longest text's state, but for `open_patch`."""
        return self.fixed + self.windowed + self.patches * self.per_patch


def running_memory(
    manifest: Manifest,
    *,
    prepared: bool,
    positions: int,
    prefill_chunk: int = 256,
    int8_prefill: Iterable[str] = (),
) -> dict[str, int]:
    """Estimated resident memory for a text of so many ids, by part, in bytes; the tables' pages left out.

    prepared: whether an engine for this device is used (`blt-edge build`). int8_prefill: its stages that read
    chunks in int8, whose weights are there in that form, too.
    """
    weights = sum(
        manifest.files[spec.data].bytes * _RESIDENT[prepared].get(spec.precision, 1.0)
        for spec in manifest.stages.values()
    )
    weights += sum(manifest.stages[stage].parameters for stage in int8_prefill)
    state = state_memory(manifest, prefill_chunk=prefill_chunk, positions=positions, prepared=prepared)
    # A chunk's activations: about what its states and patch values take.
    return {"weights": round(weights), "state": state.at_full_length + state.fixed, "program": _PROGRAM}


def state_memory(
    manifest: Manifest,
    *,
    prefill_chunk: int = 256,
    rollback: int = 64,
    positions: int | None = None,
    prepared: bool = False,
) -> StateMemory:
    """What the runtime will hold for one text, by the manifest; the defaults are `BltModel.load`'s.

    positions: ids of the text; None is as many as the model has. prepared: whether an engine for this device
    is used, whose windows slide through somewhat larger buffers.
    """
    limit, width = manifest.model.max_positions, manifest.model.width
    limit = limit if positions is None else max(1, min(limit, positions))
    rule, stages = manifest.patching, manifest.stages
    idle = {"latent"} if rule.needs_entropy else {"latent", "patcher"}
    local = [spec for name, spec in stages.items() if name not in idle]
    values = stages["decoder"].patch_values or 0
    longest = min(rule.max_patch_length or limit, limit)
    typical = 4.0
    if rule.mode == "byte":
        typical, longest = 1.0, 1
    elif rule.mode == "static" and rule.patch_size:
        typical, longest = float(rule.patch_size), min(longest, rule.patch_size)
    typical = min(typical, longest)
    slots = prefill_chunk + rollback + 2
    slack = max(64, prefill_chunk) if prepared else 0
    return StateMemory(
        positions=limit,
        per_byte=sum(map(_position_bytes, local)),
        per_patch=_position_bytes(stages["latent"]),
        fixed=4 * (slots * values + (prefill_chunk + rollback) * width + (rollback + 1) * 260),
        windowed=sum(
            _position_bytes(spec) * _capacity(spec, limit, rollback, slack if spec.fusable else 0)
            for spec in local
        ),
        patches=round(limit / typical),
        bytes_per_patch=typical,
        open_patch=4 * width * longest,
        longest_patch=longest,
    )


def _position_bytes(spec: StageSpec) -> int:
    """Keys and values of all layers in float32, and the position's number."""
    return 4 * 2 * spec.layers * spec.kv_heads * spec.head_dim + 8


def _capacity(spec: StageSpec, limit: int, rollback: int, slack: int) -> int:
    return limit if spec.window is None else max(1, min(limit, spec.window - 1 + rollback + slack))

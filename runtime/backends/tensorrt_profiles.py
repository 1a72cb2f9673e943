"""What TensorRT engines of a bundle are built for: the range of every axis, and whether a call is within it.

Every stage has two optimization profiles, `PREFILL` and `DECODE`, over ranges that follow from the manifest
and from `EngineLimits`. A plan for several texts has one, over a few new positions of each: a chunk of a
prompt is enough rows for products by itself, so it runs alone, and the plan's working memory stays small.
What this does not know: how engines are built, found and run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import BackendError, BltError, BundleError
from ..fields import Fields, checked_int
from ..manifest import Axis, Manifest
from .base import EngineLimits
from .signatures import new_axis

__all__ = [
    "DECODE",
    "PREFILL",
    "PROFILED_PADDING",
    "ProfileAxes",
    "Profiles",
    "build_command",
    "check_shape",
    "choose_profile",
    "packed_plan_file",
    "plan_file",
    "read_limits",
]

PREFILL, DECODE = 0, 1
"""The profiles' indices in a plan."""

PROFILED_PADDING = 2
"""`StageBackend.padding` of an engine whose memory is that of the largest pass its profiles allow."""

# Bytes or patches that one pass in the decode profile takes at most: one, or a draft with its guesses.
_DECODE_POSITIONS = 16
# What one text may bring to a pass over several: a byte with its guesses, or what is left of a prompt; and
# patches, which are padded to the longest of all texts.
_PACKED_POSITIONS, _PACKED_PATCHES = 32, 8
# Longest patch where the patching rule has no limit of its own.
_LONGEST_PATCH = 512
_MOST = 2**31 - 1

ProfileAxes = dict[str, Axis]
"""One profile of one stage: the smallest, tuned-for and largest size of each of its dynamic axes."""


def plan_file(stage: str) -> str:
    """Name of a stage's plan in an engine's directory."""
    return f"{stage}.plan"


def packed_plan_file(stage: str, rows: int) -> str:
    """Name of a stage's plan for so many texts at once, in the same directory."""
    return f"{stage}.rows{rows}.plan"


def build_command(directory: Path, target: str) -> str:
    """What a user types to build engines of a bundle."""
    return f"blt-edge build {directory} --target {target}"


# 1. What engines are built for.


@dataclass(frozen=True)
class Profiles:
    """The two profiles of each stage."""

    limits: EngineLimits
    """What they follow from."""
    stages: dict[str, tuple[ProfileAxes, ProfileAxes]]
    """By stage, (prefill, decode)."""

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        *,
        max_bytes: int | None = None,
        max_patches: int | None = None,
        max_patch_length: int | None = None,
        max_batch: int = 1,
        prefill_chunk: int = 256,
        rollback: int = 64,
    ) -> Profiles:
        """The one table of what engines are built for. Raises OptionError naming a limit beyond the graphs'.

        None takes: as long a text as the model has positions for, as many patches of it as the latent stage
        was made for, and patches up to what the patching rule allows, or 512 bytes.
        """
        axes, positions = manifest.axes, manifest.model.max_positions
        longest = min(positions, _axis_max(manifest, "patch_length"))
        texts = checked_int("max_bytes", positions if max_bytes is None else max_bytes, 1, positions)
        if max_patches is None:
            max_patches = min(texts, manifest.stages["latent"].max_positions)
        if max_patch_length is None:
            max_patch_length = _longest_patch(manifest, texts)
        most = min(axes["bytes"].max, axes["patches"].max)
        limits = EngineLimits(
            max_bytes=texts,
            max_patches=checked_int("max_patches", max_patches, 1, texts),
            max_patch_length=checked_int("max_patch_length", max_patch_length, 1, longest),
            max_batch=checked_int("max_batch", max_batch, 1, axes["batch"].max),
            prefill_chunk=checked_int("prefill_chunk", prefill_chunk, 1, most),
            rollback=checked_int("rollback", rollback, 0, axes["bytes"].max),
        )
        stages = {
            stage: (_axes(manifest, stage, limits, PREFILL), _axes(manifest, stage, limits, DECODE))
            for stage in manifest.stages
        }
        return cls(limits, stages)

    def packed_positions(self, stage: str) -> int:
        """Most new positions of one text in a pass over several."""
        most = _PACKED_PATCHES if stage == "latent" else _PACKED_POSITIONS
        return min(most, self.limits.prefill_chunk)

    def packed(self, stage: str, rows: int) -> ProfileAxes:
        """The one profile of a stage's plan for `rows` texts, by the axes of a packed graph; "rows" has the
        range of each of that input's values, which add up to the positions in what it is tuned for."""
        decode, most = self.stages[stage][DECODE], self.packed_positions(stage)
        axes = {"rows": Axis(1, 1, most), new_axis(stage): Axis(rows, rows, rows * most)}
        if "patch_length" in decode:
            axes["patch_length"] = decode["patch_length"]
        for row in range(rows):
            axes[f"past{row}"] = decode["past"]
            if "patch_slots" in decode:
                axes[f"slots{row}"] = decode["patch_slots"]
        return axes

    def to_dict(self) -> dict[str, Any]:
        """As JSON: sizes as [smallest, tuned for, largest]."""

        def sizes(axes: ProfileAxes) -> dict[str, list[int]]:
            return {name: [axis.min, axis.opt, axis.max] for name, axis in axes.items()}

        stages = {
            stage: {"prefill": sizes(prefill), "decode": sizes(decode)}
            for stage, (prefill, decode) in self.stages.items()
        }
        return {"limits": asdict(self.limits), "stages": stages}

    @classmethod
    def from_dict(cls, data: object, manifest: Manifest) -> Profiles:
        """Read what `to_dict` gave.

        Raises BundleError when it is not what this version derives for `manifest` from the same limits.
        """
        try:
            known = cls.of(manifest, **asdict(read_limits(data)))
        except (BltError, ValueError) as error:
            raise BundleError("its profiles are damaged") from error
        if known.to_dict() != data:
            raise BundleError("it was built with the profiles of another version")
        return known


def read_limits(data: object) -> EngineLimits:
    """The limits in what `Profiles.to_dict` gave. Raises BundleError when there are none."""
    names = [field.name for field in fields(EngineLimits)]
    limits = Fields(data, "profiles").part(
        "limits", lambda inner: {name: inner.whole(name, 0, _MOST) for name in names}
    )
    return EngineLimits(**limits)


def _longest_patch(manifest: Manifest, texts: int) -> int:
    rule = manifest.patching
    if rule.mode == "byte":
        return 1
    lengths = [rule.max_patch_length, rule.patch_size if rule.mode == "static" else None]
    longest = min((length for length in lengths if length is not None), default=_LONGEST_PATCH)
    return min(longest, texts, _axis_max(manifest, "patch_length"))


def _axis_max(manifest: Manifest, axis: str) -> int:
    return manifest.axes[axis].max if axis in manifest.axes else manifest.model.max_positions


def _axes(manifest: Manifest, stage: str, limits: EngineLimits, profile: int) -> ProfileAxes:
    chunk, few = limits.prefill_chunk, min(_DECODE_POSITIONS, limits.prefill_chunk)
    # A prompt's passes take half a chunk or more; its patches have some four bytes.
    positions = Axis(1, 1, few) if profile == DECODE else Axis(1, max(1, chunk // 2), chunk)
    axes = {"batch": Axis(1, 1, limits.max_batch)}
    if stage == "latent":
        axes["patches"] = Axis(1, min(positions.opt, max(1, chunk // 8)), positions.max)
        longest = 1 << (limits.max_patch_length - 1).bit_length()  # patches are padded to powers of two
        if profile == PREFILL:
            # A pass holds so many bytes at most, padding included, or one patch: more patches than the decode
            # profile takes are short ones. Saying so keeps the engine's memory small.
            share = max(1, PROFILED_PADDING * chunk // (few + 1))
            longest = min(longest, 1 << (share.bit_length() - 1))
        axes["patch_length"] = Axis(1, min(8, longest), longest)
        axes["past"] = Axis(1, min(512, limits.max_patches), limits.max_patches)
        return axes
    axes["bytes"] = positions
    if stage == "decoder":
        slots = chunk + limits.rollback + 2
        axes["patch_slots"] = Axis(1, slots, slots)
    window = manifest.stages[stage].window
    if window is None:
        axes["past"] = Axis(1, min(512, limits.max_bytes), limits.max_bytes)
    else:
        largest = max(1, min(limits.max_bytes, window - 1 + limits.rollback))
        axes["past"] = Axis(1, largest, largest)
    return axes


# 2. Does a call fit?


def choose_profile(profiles: Profiles, stage: str, sizes: Mapping[str, int], build: str) -> int:
    """Index of the profile for a call with axes of these sizes: decode for few positions, else prefill.

    build: the command that builds engines, for the error. Raises BackendError as `check_shape`.
    """
    axis = new_axis(stage)
    # For few positions the decode profile takes all that the other does.
    few = sizes.get(axis, 1) <= profiles.stages[stage][DECODE][axis].max
    index = DECODE if few else PREFILL
    check_shape(profiles, stage, index, sizes, build)
    return index


def check_shape(profiles: Profiles, stage: str, index: int, sizes: Mapping[str, int], build: str) -> None:
    """Raise BackendError naming the first axis that is out of a profile's range, and what to build."""
    for name, size in sizes.items():
        axis = profiles.stages[stage][index][name]
        if not axis.min <= size <= axis.max:
            raise BackendError(
                f"{stage}: {name} is {size}, the engine was built for {axis.min} to {axis.max}; "
                + _remedy(profiles.limits, stage, name, size, build)
            )


def _remedy(limits: EngineLimits, stage: str, axis: str, size: int, build: str) -> str:
    if size < 1:
        return "give at least one"
    options = {
        "batch": "--max-batch",
        "bytes": "--prefill-chunk",
        "patches": "--prefill-chunk",
        "patch_length": "--max-patch-length",
    }
    if stage == "latent":
        options["past"] = "--max-patches"
    elif size > limits.max_bytes:
        options["past"] = "--max-bytes"
    if axis in options:
        return f"{build} {options[axis]} {size}"
    return (
        f"load the model with prefill_chunk up to {limits.prefill_chunk} and rollback up to {limits.rollback}"
    )

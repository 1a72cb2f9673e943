"""TensorRT engines of a bundle: the range of every axis they are built for, and whether one fits here.

An engine form lies in `engines/TARGET-FINGERPRINT/` as other forms do (`engines`): a plan for each stage, all
with two optimization profiles, `PREFILL` and `DECODE`, over the ranges of `Profiles`. Engines move neither
between versions nor between GPUs: one that was made for something else is refused, with the reason.
What this does not know: how engines are built and run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import BackendError, BltError, BundleError
from ..fields import Fields, checked_int
from ..manifest import Axis, Manifest
from ..self_test import Reach

__all__ = [
    "DECODE",
    "DECODE_POSITIONS",
    "PREFILL",
    "ProfileAxes",
    "ProfileLimits",
    "Profiles",
    "check_shape",
    "choose_profile",
    "plan_file",
    "profile_limits",
    "profiles",
]

PREFILL, DECODE = 0, 1
"""The profiles' indices in a plan."""
DECODE_POSITIONS = 16
"""Bytes or patches that one pass in the decode profile takes at most: one, or a draft with its guesses."""
_LONGEST_PATCH = 512
"""Longest patch where the patching rule has no limit of its own."""
_MOST = 2**31 - 1

ProfileAxes = dict[str, Axis]
"""One profile of one stage: the smallest, tuned-for and largest size of each of its dynamic axes."""


# 1. What engines are built for.


@dataclass(frozen=True)
class ProfileLimits:
    """What texts and passes engines have to take."""

    max_bytes: int
    """Longest text in ids, BOS included."""
    max_patches: int
    """Most patches of a text."""
    max_patch_length: int
    """Longest patch in bytes; the runtime pads to powers of two."""
    max_batch: int = 1
    """Texts at a time."""
    prefill_chunk: int = 256
    """Bytes that one pass takes at most."""
    rollback: int = 64
    """Bytes that can be taken back without computing them again."""

    @property
    def reach(self) -> Reach:
        """The same for a self-test."""
        return Reach(
            self.max_bytes, self.max_patches, self.max_patch_length, self.prefill_chunk, self.rollback
        )


def profile_limits(
    manifest: Manifest,
    *,
    max_bytes: int | None = None,
    max_patches: int | None = None,
    max_patch_length: int | None = None,
    max_batch: int = 1,
    prefill_chunk: int = 256,
    rollback: int = 64,
) -> ProfileLimits:
    """Limits within what the graphs take. Raises OptionError naming one that is not.

    None takes: as long a text as the model has positions for, as many patches of it as the latent stage was
    made for, and patches up to what the patching rule allows, or 512 bytes.
    """
    axes, positions = manifest.axes, manifest.model.max_positions
    texts = checked_int("max_bytes", positions if max_bytes is None else max_bytes, 1, positions)
    patches = min(texts, manifest.stages["latent"].max_positions) if max_patches is None else max_patches
    longest = _longest_patch(manifest, texts) if max_patch_length is None else max_patch_length
    chunk = checked_int("prefill_chunk", prefill_chunk, 1, min(axes["bytes"].max, axes["patches"].max))
    return ProfileLimits(
        max_bytes=texts,
        max_patches=checked_int("max_patches", patches, 1, texts),
        max_patch_length=checked_int(
            "max_patch_length", longest, 1, min(positions, _axis_max(manifest, "patch_length"))
        ),
        max_batch=checked_int("max_batch", max_batch, 1, axes["batch"].max),
        prefill_chunk=chunk,
        rollback=checked_int("rollback", rollback, 0, axes["bytes"].max),
    )


def _longest_patch(manifest: Manifest, texts: int) -> int:
    rule = manifest.patching
    if rule.mode == "byte":
        return 1
    lengths = [rule.max_patch_length, rule.patch_size if rule.mode == "static" else None]
    longest = min((length for length in lengths if length is not None), default=_LONGEST_PATCH)
    return min(longest, texts, _axis_max(manifest, "patch_length"))


def _axis_max(manifest: Manifest, axis: str) -> int:
    return manifest.axes[axis].max if axis in manifest.axes else manifest.model.max_positions


@dataclass(frozen=True)
class Profiles:
    """The two profiles of each stage."""

    limits: ProfileLimits
    """What they follow from."""
    stages: dict[str, tuple[ProfileAxes, ProfileAxes]]
    """By stage, (prefill, decode)."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON: sizes as [smallest, tuned for, largest]."""
        stages = {
            stage: {name: _plain_axes(axes) for name, axes in zip(("prefill", "decode"), pair, strict=True)}
            for stage, pair in self.stages.items()
        }
        return {"limits": asdict(self.limits), "stages": stages}

    @classmethod
    def from_dict(cls, data: object, manifest: Manifest) -> Profiles:
        """Read what `to_dict` gave.

        Raises BundleError when it is not what this version derives for `manifest` from the same limits.
        """
        try:
            known = profiles(manifest, _read_limits(data))
        except (BltError, ValueError) as error:
            raise BundleError("its profiles are damaged") from error
        if known.to_dict() != data:
            raise BundleError("it was built with the profiles of another version")
        return known


def _plain_axes(axes: ProfileAxes) -> dict[str, list[int]]:
    return {name: [axis.min, axis.opt, axis.max] for name, axis in axes.items()}


def _read_limits(data: object) -> ProfileLimits:
    names = ProfileLimits.__dataclass_fields__
    limits = Fields(data, "profiles").part(
        "limits", lambda fields: {name: fields.whole(name, 0, _MOST) for name in names}
    )
    return ProfileLimits(**limits)


def profiles(manifest: Manifest, limits: ProfileLimits) -> Profiles:
    """The one table of what engines are built for. Raises OptionError for limits that are out of range."""
    limits = profile_limits(manifest, **asdict(limits))
    stages = {
        stage: (_axes(manifest, stage, limits, PREFILL), _axes(manifest, stage, limits, DECODE))
        for stage in manifest.stages
    }
    return Profiles(limits, stages)


def _axes(manifest: Manifest, stage: str, limits: ProfileLimits, profile: int) -> ProfileAxes:
    decode = profile == DECODE
    few = min(DECODE_POSITIONS, limits.prefill_chunk)
    # A prompt's passes take half a chunk or more; its patches have some four bytes.
    positions = (
        Axis(1, 1, few) if decode else Axis(1, max(1, limits.prefill_chunk // 2), limits.prefill_chunk)
    )
    axes = {"batch": Axis(1, 1, limits.max_batch)}
    if stage == "latent":
        axes["patches"] = Axis(1, min(positions.opt, max(1, limits.prefill_chunk // 8)), positions.max)
        longest = _padded(limits.max_patch_length)
        if not decode:
            # A pass holds twice a chunk at most, padding included, or one patch: more patches than the decode
            # profile takes are short ones. Saying so keeps the engine's memory small.
            share = max(1, 2 * limits.prefill_chunk // (few + 1))
            longest = min(longest, 1 << (share.bit_length() - 1))
        axes["patch_length"] = Axis(1, min(8, longest), longest)
        axes["past"] = Axis(1, min(512, limits.max_patches), limits.max_patches)
        return axes
    axes["bytes"] = positions
    if stage == "decoder":
        slots = limits.prefill_chunk + limits.rollback + 2
        axes["patch_slots"] = Axis(1, slots, slots)
    window = manifest.stages[stage].window
    if window is None:
        axes["past"] = Axis(1, min(512, limits.max_bytes), limits.max_bytes)
    else:
        largest = max(1, min(limits.max_bytes, window - 1 + limits.rollback))
        axes["past"] = Axis(1, largest, largest)
    return axes


def _padded(length: int) -> int:
    """The power of two that a patch of this length is padded to."""
    return 1 << (length - 1).bit_length()


# 2. Does a call fit?


def choose_profile(profiles: Profiles, stage: str, sizes: Mapping[str, int], build: str) -> int:
    """Index of the profile for a call with axes of these sizes: decode if it fits, else prefill.

    build: the command that builds engines, for the error. Raises BackendError as `check_shape`.
    """
    for index in (DECODE, PREFILL):
        axes = profiles.stages[stage][index]
        if all(axes[name].min <= size <= axes[name].max for name, size in sizes.items()):
            return index
    own = profiles.stages[stage][DECODE]["patches" if stage == "latent" else "bytes"]
    few = all(size <= own.max for name, size in sizes.items() if name in ("bytes", "patches"))
    check_shape(profiles, stage, DECODE if few else PREFILL, sizes, build)
    raise AssertionError("a shape that fits no profile fits one")


def check_shape(profiles: Profiles, stage: str, index: int, sizes: Mapping[str, int], build: str) -> None:
    """Raise BackendError naming the first axis that is out of a profile's range, and what to build.

    build: the command that builds engines, such as "blt-edge build BUNDLE --target tensorrt".
    """
    for name, size in sizes.items():
        axis = profiles.stages[stage][index][name]
        if not axis.min <= size <= axis.max:
            raise BackendError(
                f"{stage}: {name} is {size}, the engine was built for {axis.min} to {axis.max}; "
                + _remedy(profiles.limits, stage, name, size, build)
            )


def _remedy(limits: ProfileLimits, stage: str, axis: str, size: int, build: str) -> str:
    if size < 1:
        return "give at least one"
    option = {
        "batch": f"--max-batch {size}",
        "bytes": f"--prefill-chunk {size}",
        "patches": f"--prefill-chunk {size}",
        "patch_length": f"--max-patch-length {size}",
    }.get(axis, "")
    if axis == "past" and stage == "latent":
        option = f"--max-patches {size}"
    elif axis == "past" and size > limits.max_bytes:
        option = f"--max-bytes {size}"
    if option:
        return f"{build} {option}"
    return (
        f"load the model with prefill_chunk up to {limits.prefill_chunk} and rollback up to {limits.rollback}"
    )


# 3. Which form fits this machine?


def plan_file(stage: str) -> str:
    """Name of a stage's engine in a form."""
    return f"{stage}.plan"

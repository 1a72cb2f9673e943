"""What TensorRT engines are built for, and which calls they take: no TensorRT is needed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from blt_edge.runtime.backends.signatures import new_axis, packed_signature
from blt_edge.runtime.backends.tensorrt_profiles import (
    DECODE,
    PREFILL,
    PROFILED_PADDING,
    Profiles,
    check_shape,
    choose_profile,
)
from blt_edge.runtime.cache import RingCache
from blt_edge.runtime.errors import BackendError, OptionError
from blt_edge.runtime.manifest import Axis
from blt_edge.runtime.names import STAGES
from blt_edge.runtime.patching import PatchingRule
from blt_edge.runtime.sequence import _patch_group
from blt_edge.runtime.stages import next_power_of_two
from hypothesis import given
from hypothesis import strategies as st
from support.bundles import describe

BUILD = "blt-edge build b --target tensorrt"


# 1. The table.


def test_the_table_of_a_small_model() -> None:
    """512 positions, patcher and encoder and decoder with windows of 16, a latent stage without."""
    stages = Profiles.of(describe()).to_dict()["stages"]
    assert stages["encoder"] == {
        "prefill": {"batch": [1, 1, 1], "bytes": [1, 128, 256], "past": [1, 79, 79]},  # window - 1 + 64
        "decode": {"batch": [1, 1, 1], "bytes": [1, 1, 16], "past": [1, 79, 79]},
    }
    alike = {"batch": [1, 1, 1], "past": [1, 512, 512]}
    assert stages["latent"] == {
        "prefill": {**alike, "patches": [1, 32, 256], "patch_length": [1, 8, 16]},
        "decode": {**alike, "patches": [1, 1, 16], "patch_length": [1, 8, 512]},
    }
    assert stages["decoder"]["decode"]["patch_slots"] == [1, 322, 322]  # 256 + 64 + 2


def test_limits_are_followed() -> None:
    manifest = describe()
    decoder = replace(manifest.stages["decoder"], window=None)
    unwindowed = replace(manifest, stages={**manifest.stages, "decoder": decoder})
    limits = {"max_bytes": 40, "max_patches": 20, "max_patch_length": 33, "max_batch": 4}
    table = Profiles.of(unwindowed, **limits, prefill_chunk=100, rollback=5).stages
    assert table["encoder"][PREFILL]["past"] == Axis(1, 20, 20)  # 15 + 5
    assert table["decoder"][PREFILL]["past"] == Axis(1, 40, 40)
    assert table["latent"][PREFILL]["past"] == Axis(1, 20, 20)
    assert table["latent"][DECODE]["patch_length"] == Axis(1, 8, 64)  # padded
    assert table["encoder"][PREFILL]["bytes"] == Axis(1, 50, 100)
    assert {axes["batch"] for pair in table.values() for axes in pair} == {Axis(1, 1, 4)}


@pytest.mark.parametrize(
    ("rule", "longest"),
    [
        (PatchingRule("entropy", threshold=1.0), 512),
        (PatchingRule("entropy", threshold=1.0, max_patch_length=20), 32),
        (PatchingRule("byte"), 1),
        (PatchingRule("static", patch_size=6), 8),
    ],
)
def test_the_longest_patch_follows_from_the_rule(rule: PatchingRule, longest: int) -> None:
    table = Profiles.of(replace(describe(), patching=rule))
    assert table.stages["latent"][DECODE]["patch_length"].max == longest


@pytest.mark.parametrize(
    ("limit", "value", "least", "most"),
    [
        ("max_bytes", 0, 1, 512),
        ("max_bytes", 513, 1, 512),
        ("max_patches", 513, 1, 512),
        ("max_patches", True, 1, 512),
        ("max_batch", 9, 1, 8),
        ("prefill_chunk", 257, 1, 256),
        ("max_patch_length", 513, 1, 512),
        ("rollback", -1, 0, 256),
    ],
)
def test_limits_beyond_the_graphs_are_refused(limit: str, value: Any, least: int, most: int) -> None:
    with pytest.raises(OptionError, match=f"{limit} is {value}; .* from {least} to {most}$"):
        Profiles.of(describe(), **{limit: value})


LIMITS = st.fixed_dictionaries(
    {
        "max_bytes": st.integers(1, 512),
        "prefill_chunk": st.integers(1, 256),
        "rollback": st.integers(0, 100),
        "max_batch": st.integers(1, 8),
        "max_patch_length": st.integers(1, 512),
    }
)


@given(LIMITS)
def test_every_range_is_in_order(options: dict[str, int]) -> None:
    table = Profiles.of(describe(), **options)
    for pair in table.stages.values():
        assert pair[PREFILL].keys() == pair[DECODE].keys()
        for axes in pair:
            assert all(1 <= axis.min <= axis.opt <= axis.max for axis in axes.values())
    assert Profiles.from_dict(json.loads(json.dumps(table.to_dict())), describe()) == table


@given(LIMITS, st.data())
def test_every_pass_of_the_runtime_fits_a_profile(options: dict[str, int], data: st.DataObject) -> None:
    """Patches of any lengths, grouped as the runtime groups them, and caches as they grow."""
    table = Profiles.of(describe(), **options)
    limits = table.limits
    # 1. A chunk of patches, some of them open since long ago.
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=limits.prefill_chunk))
    lengths[0] = data.draw(st.integers(1, limits.max_patch_length))
    lengths = [min(length, limits.max_patch_length) for length in lengths]
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    done = 0
    while done < len(lengths):
        group = _patch_group(starts, done, len(lengths), PROFILED_PADDING * limits.prefill_chunk)
        padded = next_power_of_two(max(lengths[done : done + group]))
        sizes = {"batch": 1, "patches": group, "patch_length": padded, "past": 1}
        choose_profile(table, "latent", sizes, BUILD)
        done += group
    # 2. A ring of the encoder's, at every capacity.
    cache = RingCache(1, 1, 1, window=16, rollback=limits.rollback, limit=limits.max_bytes)
    while cache.length < limits.max_bytes:
        count = min(data.draw(st.integers(1, limits.prefill_chunk)), limits.max_bytes - cache.length)
        cache.reserve(count)
        sizes = {"batch": 1, "bytes": count, "past": cache.capacity}
        assert choose_profile(table, "encoder", sizes, BUILD) == (DECODE if count <= 16 else PREFILL)
        cache.length += count


def test_several_texts_bring_few_positions_each() -> None:
    profiles = Profiles.of(describe(), max_patches=100)
    assert profiles.packed("decoder", 2) == {
        "rows": Axis(1, 1, 32),
        "bytes": Axis(2, 2, 64),
        **{f"past{row}": Axis(1, 79, 79) for row in range(2)},
        **{f"slots{row}": Axis(1, 322, 322) for row in range(2)},
    }
    assert profiles.packed("latent", 3) == {
        "rows": Axis(1, 1, 8),
        "patches": Axis(3, 3, 24),
        "patch_length": Axis(1, 8, 512),
        **{f"past{row}": Axis(1, 100, 100) for row in range(3)},
    }
    few = Profiles.of(describe(), prefill_chunk=5)
    assert [few.packed_positions(stage) for stage in STAGES] == [5, 5, 5, 5]
    assert few.packed("patcher", 64)["bytes"] == Axis(64, 64, 320)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("rows", [2, 5, 64])
def test_every_axis_of_a_packed_graph_has_a_range_and_sizes_add_up(stage: str, rows: int) -> None:
    manifest = describe()
    axes = Profiles.of(manifest).packed(stage, rows)
    inputs, _ = packed_signature(manifest, stage, rows)
    named = {axis for shape in inputs.values() for axis in shape if isinstance(axis, str)}
    assert named == {*axes} - {"rows"}
    positions, each = axes[new_axis(stage)], axes["rows"]
    for bound in ("min", "opt", "max"):
        assert getattr(positions, bound) == rows * getattr(each, bound)


# 2. Shapes out of range.

OPTIONS = "load the model with prefill_chunk up to 256 and rollback up to 64"


@pytest.mark.parametrize(
    ("stage", "sizes", "said", "remedy"),
    [
        ("latent", {"patches": 1, "past": 513}, "past is 513", f"512; {BUILD} --max-patches 513"),
        (
            "latent",
            {"patches": 2, "patch_length": 1024},
            "patch_length is 1024",
            f"512; {BUILD} --max-patch-length 1024",
        ),
        (
            "latent",
            {"patches": 100, "patch_length": 32},
            "patch_length is 32",
            f"16; {BUILD} --max-patch-length 32",
        ),
        ("encoder", {"bytes": 300}, "bytes is 300", f"256; {BUILD} --prefill-chunk 300"),
        ("encoder", {"bytes": 0}, "bytes is 0", "16; give at least one"),
        ("encoder", {"bytes": 1, "past": 600}, "past is 600", f"79; {BUILD} --max-bytes 600"),
        ("encoder", {"bytes": 1, "past": 80}, "past is 80", f"79; {OPTIONS}"),
        ("decoder", {"bytes": 1, "batch": 2}, "batch is 2", f"1; {BUILD} --max-batch 2"),
        ("decoder", {"bytes": 1, "patch_slots": 323}, "patch_slots is 323", f"322; {OPTIONS}"),
    ],
)
def test_a_shape_out_of_range(stage: str, sizes: dict[str, int], said: str, remedy: str) -> None:
    with pytest.raises(BackendError) as caught:
        choose_profile(Profiles.of(describe()), stage, sizes, BUILD)
    assert str(caught.value) == f"{stage}: {said}, the engine was built for 1 to {remedy}"


def test_a_shape_is_checked_against_one_profile() -> None:
    table = Profiles.of(describe())
    check_shape(table, "encoder", PREFILL, {"bytes": 17, "past": 79}, BUILD)
    with pytest.raises(BackendError, match="bytes is 17, the engine was built for 1 to 16"):
        check_shape(table, "encoder", DECODE, {"bytes": 17, "past": 79}, BUILD)

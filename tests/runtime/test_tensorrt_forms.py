"""What engines are built for, and which of them fit a machine: no TensorRT is needed."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))

from blt_edge.runtime.backends.tensorrt import Flavour
from blt_edge.runtime.backends.tensorrt_profiles import (
    DECODE,
    PREFILL,
    Profiles,
    check_shape,
    choose_profile,
    plan_file,
    profile_limits,
    profiles,
)
from blt_edge.runtime.cache import RingCache
from blt_edge.runtime.engines import (
    Engine,
    describe_tensorrt,
    engine_profiles,
    find_tensorrt_engine,
    form_path,
    render_engine,
)
from blt_edge.runtime.errors import BackendError, BundleError, OptionError
from blt_edge.runtime.integrity import file_record
from blt_edge.runtime.manifest import Axis, Manifest
from blt_edge.runtime.patching import PatchingRule
from blt_edge.runtime.self_test import SELF_TEST_NAME
from blt_edge.runtime.sequence import _patch_group
from blt_edge.runtime.stages import next_power_of_two
from support.bundles import describe, write_bundle

ORIN = Flavour("tensorrt", "10.3.0.26", None)
RTX = Flavour("tensorrt-rtx", "1.7.1.116", None)
BUILD = "blt-edge build b --target tensorrt"


def ranges(axes: dict[str, Axis]) -> dict[str, tuple[int, int, int]]:
    return {name: (axis.min, axis.opt, axis.max) for name, axis in axes.items()}


# 1. The table.


def test_the_table_of_a_small_model() -> None:
    """512 positions, patcher and encoder and decoder with windows of 16, a latent stage without."""
    table = profiles(describe(), profile_limits(describe()))
    assert ranges(table.stages["encoder"][PREFILL]) == {
        "batch": (1, 1, 1),
        "bytes": (1, 128, 256),
        "past": (1, 79, 79),  # window - 1 + 64
    }
    assert ranges(table.stages["encoder"][DECODE]) == {
        "batch": (1, 1, 1),
        "bytes": (1, 1, 16),
        "past": (1, 79, 79),
    }
    assert ranges(table.stages["latent"][PREFILL]) == {
        "batch": (1, 1, 1),
        "patches": (1, 32, 256),
        "patch_length": (1, 8, 16),
        "past": (1, 512, 512),
    }
    assert ranges(table.stages["latent"][DECODE]) == {
        "batch": (1, 1, 1),
        "patches": (1, 1, 16),
        "patch_length": (1, 8, 512),
        "past": (1, 512, 512),
    }
    assert table.stages["decoder"][DECODE]["patch_slots"] == Axis(1, 322, 322)  # 256 + 64 + 2


def test_limits_are_followed() -> None:
    manifest = describe()
    unwindowed = replace(
        manifest, stages={**manifest.stages, "decoder": replace(manifest.stages["decoder"], window=None)}
    )
    limits = profile_limits(
        unwindowed,
        max_bytes=40,
        max_patches=20,
        max_patch_length=33,
        max_batch=4,
        prefill_chunk=100,
        rollback=5,
    )
    table = profiles(unwindowed, limits).stages
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
    manifest = replace(describe(), patching=rule)
    table = profiles(manifest, profile_limits(manifest))
    assert table.stages["latent"][DECODE]["patch_length"].max == longest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_bytes": 0}, "max_bytes is 0; allowed is a whole number from 1 to 512"),
        ({"max_bytes": 513}, "max_bytes is 513; allowed is a whole number from 1 to 512"),
        ({"max_bytes": 10, "max_patches": 11}, "max_patches is 11; allowed is a whole number from 1 to 10"),
        ({"max_batch": 9}, "max_batch is 9; allowed is a whole number from 1 to 8"),
        ({"prefill_chunk": 257}, "prefill_chunk is 257; allowed is a whole number from 1 to 256"),
        ({"max_patch_length": 513}, "max_patch_length is 513; allowed is a whole number from 1 to 512"),
        ({"rollback": -1}, "rollback is -1; allowed is a whole number from 0 to 256"),
        ({"max_patches": True}, "max_patches is True; allowed is a whole number from 1 to 512"),
    ],
)
def test_limits_beyond_the_graphs_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        profile_limits(describe(), **options)


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
    table = profiles(describe(), profile_limits(describe(), **options))
    for pair in table.stages.values():
        assert pair[PREFILL].keys() == pair[DECODE].keys()
        for axes in pair:
            assert all(1 <= axis.min <= axis.opt <= axis.max for axis in axes.values())
    assert Profiles.from_dict(json.loads(json.dumps(table.to_dict())), describe()) == table


@given(LIMITS, st.data())
def test_every_pass_of_the_runtime_fits_a_profile(options: dict[str, int], data: st.DataObject) -> None:
    """Patches of any lengths, grouped as the runtime groups them, and caches as they grow."""
    manifest = describe()
    table = profiles(manifest, profile_limits(manifest, **options))
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
        group = _patch_group(starts, done, len(lengths), 2 * limits.prefill_chunk)
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


# 2. Shapes out of range.


@pytest.mark.parametrize(
    ("stage", "sizes", "message"),
    [
        (
            "latent",
            {"patches": 1, "past": 513},
            f"latent: past is 513, the engine was built for 1 to 512; {BUILD} --max-patches 513",
        ),
        (
            "latent",
            {"patches": 2, "patch_length": 1024, "past": 1},
            "latent: patch_length is 1024, the engine was built for 1 to 512; "
            f"{BUILD} --max-patch-length 1024",
        ),
        (
            "latent",
            {"patches": 100, "patch_length": 32},
            f"latent: patch_length is 32, the engine was built for 1 to 16; {BUILD} --max-patch-length 32",
        ),
        (
            "encoder",
            {"bytes": 300},
            f"encoder: bytes is 300, the engine was built for 1 to 256; {BUILD} --prefill-chunk 300",
        ),
        ("encoder", {"bytes": 0}, "encoder: bytes is 0, the engine was built for 1 to 16; give at least one"),
        (
            "encoder",
            {"bytes": 1, "past": 600},
            f"encoder: past is 600, the engine was built for 1 to 79; {BUILD} --max-bytes 600",
        ),
        (
            "encoder",
            {"bytes": 1, "past": 80},
            "encoder: past is 80, the engine was built for 1 to 79; load the model with prefill_chunk up to "
            "256 and rollback up to 64",
        ),
        (
            "decoder",
            {"bytes": 1, "batch": 2},
            f"decoder: batch is 2, the engine was built for 1 to 1; {BUILD} --max-batch 2",
        ),
        (
            "decoder",
            {"bytes": 1, "patch_slots": 323},
            "decoder: patch_slots is 323, the engine was built for 1 to 322; load the model with "
            "prefill_chunk up to 256 and rollback up to 64",
        ),
    ],
)
def test_a_shape_out_of_range(stage: str, sizes: dict[str, int], message: str) -> None:
    table = profiles(describe(), profile_limits(describe()))
    with pytest.raises(BackendError) as caught:
        choose_profile(table, stage, sizes, BUILD)
    assert str(caught.value) == message


def test_a_shape_is_checked_against_one_profile() -> None:
    table = profiles(describe(), profile_limits(describe()))
    check_shape(table, "encoder", PREFILL, {"bytes": 17, "past": 79}, BUILD)
    with pytest.raises(BackendError, match="bytes is 17, the engine was built for 1 to 16"):
        check_shape(table, "encoder", DECODE, {"bytes": 17, "past": 79}, BUILD)


# 3. Forms.


def write_form(
    bundle: Path,
    manifest: Manifest,
    flavour: Flavour = ORIN,
    capabilities: tuple[str, ...] = ("8.7",),
    **limits: int,
) -> Path:
    """A form whose plans are noise."""
    table = profiles(manifest, profile_limits(manifest, **limits))
    description = describe_tensorrt(manifest, flavour, capabilities, table)
    form = form_path(bundle, description)
    form.mkdir(parents=True)
    for stage in manifest.stages:
        (form / plan_file(stage)).write_bytes(stage.encode() * 100)
    (form / SELF_TEST_NAME).write_bytes(b"")
    files = {path.name: file_record(path) for path in form.iterdir()}
    (form / "engine.json").write_text(render_engine(description, files))
    return form


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "b")
    return tmp_path / "b"


@pytest.fixture
def manifest(bundle: Path) -> Manifest:
    from blt_edge.runtime.manifest import load_manifest

    return load_manifest(bundle)


def find(bundle: Path, manifest: Manifest, **options: Any) -> Engine:
    flavour, capability = options.pop("flavour", ORIN), options.pop("capability", "8.7")
    return find_tensorrt_engine(bundle, manifest, flavour, capability, **options)


def refused(bundle: Path, manifest: Manifest, reason: str, **options: Any) -> None:
    engine = find(bundle, manifest, **options)
    assert (engine.name, engine.directory) == ("portable graphs", None)
    assert reason in str(engine.reason)
    assert "\n" not in str(engine.reason)
    assert f"blt-edge build {bundle} --target " in str(engine.reason)


def test_engines_that_fit_are_found(bundle: Path, manifest: Manifest) -> None:
    form = write_form(bundle, manifest, max_patches=100)
    engine = find(bundle, manifest, full=True)
    assert engine == Engine(f"engines/{form.name}", None, form)
    assert engine_profiles(engine, manifest).limits.max_patches == 100
    refused(bundle, manifest, "TensorRT-RTX has no engines here; ", flavour=RTX)
    several = write_form(bundle, manifest, RTX, ("8.9", "8.6"))
    assert find(bundle, manifest, flavour=RTX, capability="8.6").directory == several
    assert find(bundle, manifest, flavour=RTX, capability="8.9").directory == several
    assert find(bundle, manifest).directory == form


def test_nothing_was_built(bundle: Path, manifest: Manifest) -> None:
    refused(
        bundle, manifest, f"TensorRT has no engines here; blt-edge build {bundle} --target tensorrt makes"
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"flavour": replace(ORIN, version="10.16.0")},
            "was built by TensorRT '10.3.0.26', here it is '10.16.0'",
        ),
        ({"capability": "11.0"}, "was built for compute capability 8.7, here it is 11.0"),
        ({"prefill_chunk": 256}, "was built for a prefill_chunk of up to 128, here it is 256"),
        ({"rollback": 65, "prefill_chunk": 128}, "was built for a rollback of up to 64, here it is 65"),
    ],
)
def test_engines_for_something_else(
    bundle: Path, manifest: Manifest, options: dict[str, Any], reason: str
) -> None:
    write_form(bundle, manifest, prefill_chunk=128)
    assert find(bundle, manifest, prefill_chunk=100).directory is not None
    refused(bundle, manifest, reason, **options)


@pytest.mark.parametrize("stage", ["patcher", "latent"])
@pytest.mark.parametrize("part", ["file", "data", "precision"])
def test_engines_for_other_graphs(bundle: Path, manifest: Manifest, stage: str, part: str) -> None:
    write_form(bundle, manifest)
    spec = manifest.stages[stage]
    if part == "precision":
        other = replace(manifest, stages={**manifest.stages, stage: replace(spec, precision="fp16")})
    else:
        name = getattr(spec, part)
        changed = replace(manifest.files[name], sha256="0" * 64)
        other = manifest.with_files({**manifest.files, name: changed})
    refused(bundle, other, "was built for other graphs")


def test_the_nearest_miss_is_told(bundle: Path, manifest: Manifest) -> None:
    write_form(bundle, manifest, replace(ORIN, version="10.0"))
    write_form(bundle, manifest, capabilities=("8.9",))
    refused(bundle, manifest, "was built for compute capability 8.9, here it is 8.7")


def test_of_several_those_for_the_longest_texts(bundle: Path, manifest: Manifest) -> None:
    long = write_form(bundle, manifest, max_bytes=500, max_patches=100)
    write_form(bundle, manifest, max_bytes=80)
    longer = write_form(bundle, manifest, max_bytes=500, max_patches=200)
    assert find(bundle, manifest).directory == longer
    (longer / "latent.plan").write_bytes(b"x")
    assert find(bundle, manifest).directory == long


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda form: (form / "latent.plan").unlink(), "latent.plan is missing"),
        (lambda form: (form / "latent.plan").write_bytes(b"x" * 600), "latent.plan was changed after it was"),
        (lambda form: (form / "latent.plan").write_bytes(b"x"), "latent.plan is truncated"),
        (lambda form: (form / "engine.json").unlink(), "has a damaged engine.json"),
        (lambda form: (form / "engine.json").write_text("[" * 100_000), "has a damaged engine.json"),
        (lambda form: (form / "engine.json").write_text("{}"), "has a damaged engine.json"),
    ],
)
def test_damaged_engines(
    bundle: Path, manifest: Manifest, spoil: Callable[[Path], object], reason: str
) -> None:
    spoil(write_form(bundle, manifest))
    refused(bundle, manifest, reason)


def test_engines_of_an_earlier_version(bundle: Path, manifest: Manifest) -> None:
    """Sound by themselves, at their right path, and of another meaning."""
    form = write_form(bundle, manifest)
    change(form, lambda told: told.update(blt_edge_form=1))
    form.rename(form_path(bundle, json.loads((form / "engine.json").read_text())["description"]))
    refused(bundle, manifest, "was built by another version of blt-edge; blt-edge build ")
    assert find(bundle, manifest).directory is None
    newer = write_form(bundle, manifest, max_patches=100)
    assert find(bundle, manifest).directory == newer


def change(form: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    payload = json.loads((form / "engine.json").read_text())
    edit(payload["description"])
    (form / "engine.json").write_text(json.dumps(payload))


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda told: told["profiles"]["limits"].update(max_patches=100), "profiles of another version"),
        (lambda told: told["profiles"]["limits"].update(max_patches=-1), "its profiles are damaged"),
        (lambda told: told["profiles"]["limits"].update(max_bytes=10**9), "its profiles are damaged"),
        (lambda told: told["profiles"]["limits"].update(extra=1), "its profiles are damaged"),
        (lambda told: told["profiles"]["limits"].pop("rollback"), "its profiles are damaged"),
        (lambda told: told["profiles"].pop("limits"), "its profiles are damaged"),
        (lambda told: told.update(profiles=[]), "its profiles are damaged"),
        (
            lambda told: told["profiles"]["stages"]["latent"]["decode"].update(past=[9, 3, 1]),
            "profiles of another version",
        ),
        (lambda told: told.update(compute_capabilities="8.7"), "has a damaged engine.json"),
        (lambda told: told.update(compute_capabilities=[8.7]), "has a damaged engine.json"),
        (lambda told: told.update(target="onnxruntime"), "has a damaged engine.json"),
        (lambda told: told.update(version=None), "was built by TensorRT 'None'"),
        (lambda told: told.update(version="1" * 1000), f"was built by TensorRT '{'1' * 60}', here"),
        (lambda told: told.update(blt_edge_form=1), "was built by another version of blt-edge"),
        (lambda told: told.pop("blt_edge_form"), "was built by another version of blt-edge"),
        (lambda told: told.update(more=1), "has a damaged engine.json"),
    ],
)
def test_a_changed_description(
    bundle: Path, manifest: Manifest, edit: Callable[[dict[str, Any]], object], reason: str
) -> None:
    change(write_form(bundle, manifest), edit)
    refused(bundle, manifest, reason)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


KEYS = ("blt_edge_form", "version", "target", "compute_capabilities", "stages", "profiles", "options")


@given(st.sampled_from(KEYS), JSON)
def test_no_description_makes_it_raise(key: str, value: object) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder, "b")
        manifest = write_bundle(bundle)
        change(write_form(bundle, manifest), lambda told: told.update({key: value}))
        assert find(bundle, manifest).directory is None


def test_links_and_strangers_are_passed_over(bundle: Path, manifest: Manifest) -> None:
    form = write_form(bundle, manifest)
    shutil.move(form, bundle / "elsewhere")
    form.symlink_to(bundle / "elsewhere")
    (bundle / "engines" / "tensorrt-file").write_text("x")
    (bundle / "engines" / ".tensorrt-0123.partial-1-0123abcd").mkdir()
    engine = find(bundle, manifest)
    assert engine.directory is None


def test_damaged_profiles_are_refused_when_they_are_read(bundle: Path, manifest: Manifest) -> None:
    form = write_form(bundle, manifest)
    (form / "engine.json").write_text("{}")
    with pytest.raises(BundleError, match="its profiles are damaged"):
        engine_profiles(Engine("x", None, form), manifest)

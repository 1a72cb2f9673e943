"""The runs that a load repeats: what they hold in the cache, and what counts as different."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from blt_edge.runtime import BltModel, BundleError
from blt_edge.runtime.backends.base import EngineLimits
from blt_edge.runtime.manifest import StageSpec, load_manifest
from blt_edge.runtime.self_test import (
    LOAD_ROWS,
    STAGE_TOLERANCES,
    TEXT,
    Hold,
    Run,
    Traced,
    _percent,
    allowed,
    first_breach,
    keys_values,
    load_steps,
    read_self_test,
    text_inputs,
)
from blt_edge.runtime.vocabulary import encode
from hypothesis import given
from hypothesis import strategies as st

SPEC = StageSpec("x.onnx", "x.onnx.data", "fp32", 2, 3, 4, 10, 600, 1)


@given(
    window=st.one_of(st.none(), st.integers(1, 700)),
    most=st.integers(1, 900),
    rows=st.integers(1, 300),
    rollback=st.integers(0, 70),
)
def test_a_load_runs_few_rows_past_the_window(
    window: int | None, most: int, rows: int, rollback: int
) -> None:
    steps = load_steps(
        "encoder",
        replace(SPEC, window=window, max_positions=most),
        EngineLimits(most, most, 8, 1, rows, rollback),
    )
    length = total = 0
    for step in steps:
        if isinstance(step, Hold):
            assert step.count > 0
            length = step.first + step.count
        else:
            assert isinstance(step, Run)
            assert 1 <= step.rows <= rows
            length, total = length + step.rows, total + step.rows
    assert 1 <= total <= LOAD_ROWS
    assert length <= most
    held = 0 if window is None else window - 1 + min(8, rollback)
    if held and most > held + 20:
        assert isinstance(steps[0], Hold)
        assert steps[0].count == held


def test_what_the_window_must_not_see_is_loud() -> None:
    held = Hold(3, 14)
    plain = keys_values(SPEC, replace(held, edge=False, unseen=False))
    assert plain.shape == (4, 1, 3, 14, 4)
    assert 1.5 < np.abs(plain).max() <= 1.7
    assert len(np.unique(plain[:, :, :, :, 0])) > 100
    loud = keys_values(SPEC, held) / plain
    # The next position, 17, sees 8 to 16 and itself: of the 14 that are held, the last nine.
    keys, values = loud[::2, 0, 0, :, 0], loud[1::2, 0, 0, :, 0]
    np.testing.assert_allclose(keys[:, :6], 8)
    np.testing.assert_allclose(keys[:, 6:], 1)
    np.testing.assert_allclose(values[:, :5], 80)
    np.testing.assert_allclose(values[:, 5], 10)
    np.testing.assert_allclose(values[:, 6:], 1)
    only_edge = keys_values(SPEC, replace(held, unseen=False)) / plain
    np.testing.assert_allclose(only_edge[1::2, 0, 0, :, 0] > 1, [[index == 5 for index in range(14)]] * 2)


def test_the_noise_is_the_same_everywhere() -> None:
    first = keys_values(replace(SPEC, window=None), Hold(0, 2)).reshape(-1)[:3]
    np.testing.assert_allclose(first, [-0.7434623, 0.8337734, 1.6821250], atol=1e-6)


def traced(*values: float) -> list[Traced]:
    return [
        Traced(index, 1, {"entropy": np.array([value], np.float32)}) for index, value in enumerate(values)
    ]


def breach(precision: str, found: list[float], wanted: list[float]) -> float | None:
    outputs = [run.outputs for run in traced(*wanted)]
    result = first_breach(precision, traced(*found), outputs, allowed(precision, alike=False))
    return None if result is None else result.share


def test_what_counts_as_different() -> None:
    assert breach("fp32", [1.0, 2.0], [1.0, 2.00005]) is None
    assert breach("fp32", [1.0, 2.0], [1.0, 2.001]) == pytest.approx(0.0005, rel=1e-2)
    assert breach("int4", [1.0, 2.0], [1.1, 2.0]) is None
    assert breach("int4", [1.0, 2.0], [2.0, 2.0]) == pytest.approx(0.5)
    # A value that happens to be next to nothing is not measured by itself.
    assert breach("int4", [1.0, 2.0, 0.002], [1.0, 2.0, 0.001]) is None
    assert breach("int4", [1.0, 2.0, 0.6], [1.0, 2.0, 0.001]) == pytest.approx(0.6, rel=1e-2)


@pytest.mark.parametrize("precision", STAGE_TOLERANCES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_always_different(precision: str, bad: float) -> None:
    assert breach(precision, [bad, 1.0], [1.0, 1.0]) == np.inf
    assert breach(precision, [1.0, 1.0], [bad, 1.0]) == np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert breach(precision, [bad, 1.0], [bad, 1.0]) == np.inf


@pytest.mark.parametrize("precision", STAGE_TOLERANCES)
def test_what_was_expected_may_be_of_any_size(precision: str) -> None:
    # Its squares are beyond float32: a norm taken there would allow everything.
    assert breach(precision, [1.0, 1.0], [1e30, 1e30]) == pytest.approx(1.0)
    assert breach(precision, [1e30, 1e30], [1e30, 1e30]) is None


def test_figures_for_people() -> None:
    assert [_percent(share) for share in (0.0712, 1e-4, 22.0, np.inf)] == [
        "7.1 %",
        "0.01 %",
        "2200 %",
        "an infinite amount",
    ]
    assert str(Traced(7, 1, {})) == "position 7"
    assert str(Traced(7, 3, {})) == "positions 7 to 9 in one pass"


def test_inputs_are_the_text(tiny_bundle: Path) -> None:
    model = BltModel.load(tiny_bundle, "cpu")
    inputs = text_inputs(model.manifest, model._table, 300)
    wanted = encode(TEXT * 3)[:300]
    np.testing.assert_array_equal(inputs["patcher"]["byte_ids"], wanted)
    np.testing.assert_array_equal(inputs["encoder"]["byte_embeds"], model._table.embed(wanted, 300))


def test_a_file_of_another_size_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    manifest, limits, path = load_manifest(tiny_bundle), EngineLimits(400, 400, 8), tmp_path / "self_test.bin"
    path.write_bytes(b"")
    with pytest.raises(BundleError, match=r"^self_test\.bin has not the (\d+) bytes") as caught:
        read_self_test(path, manifest, limits)
    size = int(str(caught.value).split()[4])
    for wrong in (size - 1, size + 1):
        path.write_bytes(bytes(wrong))
        with pytest.raises(BundleError, match=f"has not the {size} bytes"):
            read_self_test(path, manifest, limits)
    path.write_bytes(bytes(size))
    arrays = read_self_test(path, manifest, limits)
    assert sum(array.nbytes for array in arrays.values()) == size
    assert arrays["states"].shape == (LOAD_ROWS, manifest.model.width)

"""Packed products over blocks compute what the spelled-out ones do, to the rounding of their inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from blt_edge.graphs.block_products import PRODUCT, block_product, write_block_products
from support.block_graphs import exact, run


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("rows", [1, 5])
def test_the_product_is_the_same(bits: int, block: int, rows: int) -> None:
    model = block_product(256, block, bits)
    # One input a block, a power of two each: rounding to int8 changes nothing, so the product is exact.
    x = np.zeros((rows, 256), np.float32)
    for row in range(rows):
        x[row, np.arange(row, 256, block)] = 2.0 ** (row - 1)
    wanted = exact(model, x)
    assert write_block_products(model, bits) == 1
    assert [node.op_type for node in model.graph] == [PRODUCT]
    assert set(model.graph.initializers) == {"weight.packed", "scales.packed"}
    np.testing.assert_allclose(run(model, x), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("bits", [4, 8])
def test_inputs_are_rounded_by_block_and_row(bits: int) -> None:
    model = block_product(128, 32, bits)
    x = np.random.default_rng(0).standard_normal((6, 128)).astype(np.float32)
    wanted = exact(model, x)
    write_block_products(model, bits)
    found = run(model, x)
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()
    # One row may be summed in another order than six (without AVX-512 it is); a scale of another row's would
    # be a thousand times as much.
    assert np.abs(run(model, x[2:3]) - found[2:3]).max() < 1e-6 * np.abs(wanted).max()


def test_other_bits_are_left_alone() -> None:
    model = block_product(64, 32, 4)
    before = [node.op_type for node in model.graph]
    assert write_block_products(model, 8) == 0
    assert [node.op_type for node in model.graph] == before


@pytest.mark.parametrize(
    "spoil",
    [
        lambda unpack: unpack.attributes.pop("block_size"),
        lambda unpack: unpack.attributes.pop("axis"),
        lambda unpack: setattr(unpack, "op_type", "Cast"),
    ],
)
def test_what_is_no_product_over_blocks_is_left_alone(spoil: Any) -> None:
    model = block_product(64, 32, 4)
    spoil(next(iter(model.graph)))
    assert write_block_products(model, 4) == 0


def test_packed_weights_are_written_one_by_one(tmp_path: Path) -> None:
    model = block_product(64, 32, 8)
    write_block_products(model, 8)
    packed = [value.const_value for value in model.graph.initializers.values()]
    assert all(isinstance(tensor, ir.LazyTensor) for tensor in packed)
    ir.save(model, tmp_path / "graph.onnx", external_data="graph.onnx.data", size_threshold_bytes=0)
    assert (tmp_path / "graph.onnx.data").stat().st_size >= 64 * 64 + 4 * 64 * 2

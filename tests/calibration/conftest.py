"""A tiny float32 bundle to calibrate, its checkpoint, and what its reference sees in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from blt_edge.export.reference import Reference

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grouped-query attention everywhere, short windows, 400 positions, patches of many lengths."""
    from support.random_models import RandomModel, base_config, write_random_model

    model = RandomModel(
        "calibrated",
        base_config(
            global_width=48,
            local_attention_window_len=24,
            patcher={"sliding_window": 32, "num_key_value_heads": 2},
            encoder={"max_position_embeddings": 400, "num_key_value_heads": 2},
            decoder={"num_key_value_heads": 2},
            global_stack={"num_key_value_heads": 1},
        ),
        share=0.3,
    )
    folder: Path = tmp_path_factory.mktemp("calibrated") / "checkpoint"
    folder.mkdir()
    return write_random_model(model, folder)


@pytest.fixture(scope="session")
def float_bundle(checkpoint: Path) -> Path:
    """Its float32 bundle."""
    from blt_edge.export import export_checkpoint

    return export_checkpoint(checkpoint, checkpoint.parent / "bundle")


@pytest.fixture(scope="session")
def reference(checkpoint: Path) -> Reference:
    """Its model in transformers, or in numpy where that is not installed."""
    from support.numpy_blt import load_reference

    return load_reference(checkpoint)


@pytest.fixture(scope="session")
def texts() -> list[Path]:
    """Two texts: English, and many scripts."""
    return [DATA / "alice.txt", DATA / "udhr_sample.txt"]


def linear_inputs(reference: Reference, data: bytes) -> dict[str, np.ndarray[Any, Any]]:
    """What enters each linear layer in one pass over a text: by transformers' module name, [rows, K]."""
    from support.numpy_blt import NumpyReference

    if isinstance(reference, NumpyReference):
        return reference.linear_inputs(data)
    import torch
    from blt_edge.export.reference import byte_ids

    kept: dict[str, np.ndarray[Any, Any]] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, inputs: tuple[Any, ...]) -> None:
            assert name not in kept, "one pass calls each layer once"
            array = inputs[0].detach().numpy()
            kept[name] = array.reshape(-1, array.shape[-1]).copy()

        return hook

    modules = reference._model.named_modules()
    hooks = [
        module.register_forward_pre_hook(keep(name))
        for name, module in modules
        if isinstance(module, torch.nn.Linear)
    ]
    try:
        reference._model(torch.tensor([byte_ids(data)]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return kept


@pytest.fixture(scope="session")
def watch_linears() -> Any:
    """`linear_inputs`, for the tests."""
    return linear_inputs

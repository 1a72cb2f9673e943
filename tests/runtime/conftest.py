"""Bundles for the runtime's own tests: of noise, and of a tiny model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from blt_edge.runtime import BltModel

sys.path.insert(0, str(Path(__file__).parents[1]))

from blt_edge.runtime.manifest import Manifest, load_manifest
from support.bundles import write_bundle
from support.random_models import RandomModel, base_config, write_random_model

# Windows that the texts cross many times, a roll-back limit that they pass, and patches of many lengths.
TINY = RandomModel(
    "tiny",
    base_config(
        local_attention_window_len=8,
        patcher={"sliding_window": 12, "num_key_value_heads": 2},
        decoder={"num_key_value_heads": 2},
        encoder={"max_position_embeddings": 400},
    ),
    share=0.3,
)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of `TINY`, which has 400 positions."""
    from blt_edge.export import export_checkpoint

    folder = tmp_path_factory.mktemp("tiny")
    write_random_model(TINY, folder / "checkpoint")
    return export_checkpoint(folder / "checkpoint", folder / "bundle")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle whose graphs are noise."""
    write_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def manifest(bundle: Path) -> Manifest:
    """The description of `bundle`."""
    return load_manifest(bundle)


@pytest.fixture(scope="session")
def model(tiny_bundle: Path) -> BltModel:
    """That bundle, loaded as a user would."""
    return BltModel.load(tiny_bundle, device="cpu", threads=1)


@pytest.fixture(scope="session")
def tight(tiny_bundle: Path) -> BltModel:
    """The same with small limits: prompts of several chunks, and roll-backs that read again."""
    return BltModel.load(tiny_bundle, threads=1, prefill_chunk=16, rollback=12)


@pytest.fixture(scope="session")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, BltModel]]:
    """One bundle loaded in every way in which caches lie; see `support.state_walks`."""
    from support.state_walks import LAYOUTS, export_wide, loaded

    bundle = export_wide(tmp_path_factory.mktemp("wide"))
    scratch = tmp_path_factory.mktemp("layouts")
    with ExitStack() as stack:
        yield {layout: stack.enter_context(loaded(bundle, layout, scratch)) for layout in LAYOUTS}


@pytest.fixture(params=["ring", "ordered", "tensorrt", "cuda"])
def any_layout(request: pytest.FixtureRequest, layouts: dict[str, BltModel]) -> BltModel:
    """That bundle in each of them."""
    return layouts[request.param]


@pytest.fixture(scope="session")
def reference(layouts: dict[str, BltModel]) -> BltModel:
    """What fresh runs are made with: portable graphs, and no limits that a text here gets to."""
    return BltModel.load(layouts["ring"].path, "cpu", 1, portable=True)

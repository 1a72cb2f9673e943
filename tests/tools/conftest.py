"""A tiny checkpoint and its bundle, and the command line run in this process."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result

if TYPE_CHECKING:
    from blt_edge.runtime import BltModel

sys.path.insert(0, str(Path(__file__).parents[1]))

Cli = Callable[..., Result]


@dataclass(frozen=True)
class TinyModel:
    """Folders on the disk, shared by the whole session: copy what you change."""

    checkpoint: Path
    """In the Hugging Face layout, with a golden file of 12 greedy bytes."""
    bundle: Path
    """Its export, never validated; 500 positions."""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A random model of 270,000 parameters."""
    from blt_edge.export import export_checkpoint
    from blt_edge.export.golden import write_golden
    from support.numpy_blt import load_reference
    from support.random_models import RandomModel, base_config, write_random_model

    config = base_config(local_attention_window_len=8, encoder={"max_position_embeddings": 500})
    folder = tmp_path_factory.mktemp("tiny-model")
    write_random_model(RandomModel("tiny", config, share=0.3), folder / "checkpoint")
    checkpoint = folder / "checkpoint"
    write_golden(checkpoint, greedy_count=12, reference=load_reference(checkpoint))
    return TinyModel(folder / "checkpoint", export_checkpoint(folder / "checkpoint", folder / "bundle"))


@pytest.fixture(scope="session")
def model(tiny_model: TinyModel) -> BltModel:
    """The tiny model, loaded."""
    from blt_edge.runtime import BltModel

    return BltModel.load(tiny_model.bundle, threads=1)


@pytest.fixture
def own_bundle(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A copy of the tiny bundle to change."""
    return Path(shutil.copytree(tiny_model.bundle, tmp_path / "own-bundle"))


@pytest.fixture
def other_bundle(own_bundle: Path) -> Path:
    """A bundle of the same shapes, whose tables are others."""
    from blt_edge.runtime.integrity import file_record
    from blt_edge.runtime.manifest import load_manifest, write_manifest

    manifest = load_manifest(own_bundle)
    tables = own_bundle / manifest.embedding.file
    tables.write_bytes(tables.read_bytes()[:-8] + bytes(8))
    write_manifest(own_bundle, manifest.with_files({**manifest.files, tables.name: file_record(tables)}))
    return own_bundle


@pytest.fixture
def cli() -> Cli:
    """`cli("score", ..., stdin=b"...", code=0)` -> click's Result (stdout, stderr); code is asserted."""
    from blt_edge.tools.cli.program import program

    def run(*arguments: object, stdin: bytes = b"", code: int | None = None) -> Result:
        result = CliRunner().invoke(program, list(map(str, arguments)), input=stdin)
        assert code in (None, result.exit_code), result.stderr
        return result

    return run


@pytest.fixture
def refused(cli: Cli) -> Callable[..., str]:
    """`refused("score", ..., code=2)` -> the one line that says why; nothing else is said."""

    def run(*arguments: object, code: int = 2) -> str:
        result = cli(*arguments)
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (code, "", 1)
        assert result.stderr.startswith("blt-edge: error: ")
        return result.stderr.removeprefix("blt-edge: error: ")

    return run


@pytest.fixture
def bare_checkpoint(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to change, without its golden file."""
    ignored = shutil.ignore_patterns("golden.safetensors")
    return Path(shutil.copytree(tiny_model.checkpoint, tmp_path / "bare", ignore=ignored))


@pytest.fixture
def without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where torch and transformers are not installed."""
    monkeypatch.setattr("blt_edge.export.reference.reference_available", lambda: False)

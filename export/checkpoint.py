"""Finding and opening a checkpoint: the bundled demo, a folder in either layout, or a Hugging Face hub id."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from ..runtime.errors import first_line, requirement
from .checkpoint_base import Checkpoint, CheckpointError, read_json
from .generation_config import read_generation
from .huggingface import open_huggingface
from .meta import is_meta_config, open_meta

__all__ = ["Checkpoint", "CheckpointError", "open_checkpoint"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "entropy_model/params.json",
    "entropy_model/consolidated.pth",
    "entropy_model/*.safetensors",
    "consolidated.pth",
)
_MAX_CONFIG_BYTES = 4 << 20


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a checkpoint; only its config and headers are read.

    `source` is "demo" (the checkpoint in the package; a folder of that name is "./demo"), a folder in the
    Hugging Face or Meta's layout, or, where no such folder exists, a hub id "owner/name". A hub id is fetched
    into huggingface_hub's cache, or taken from there when offline (HF_HUB_OFFLINE=1). Raises
    `CheckpointError` in one line; no file stays open then.
    """
    if source == "demo":
        return _open_folder(_demo_folder(), "demo")
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _open_folder(folder, folder.resolve().name)
    if folder.exists():
        raise CheckpointError(f"{source}: is a file; give the folder that holds config.json and the weights")
    if isinstance(source, str) and _HUB_ID.fullmatch(source):
        return _open_folder(_fetch(source), source)
    raise CheckpointError(
        f"{source}: no such folder; give a checkpoint's folder, a hub id owner/name, or demo"
    )


def _open_folder(folder: Path, name: str) -> Checkpoint:
    path = folder / "config.json"
    if not path.is_file():
        what = "is empty" if not any(folder.iterdir()) else "has no config.json"
        raise CheckpointError(f"{folder}: {what}; expected config.json and model.safetensors")
    config = read_json(path, _MAX_CONFIG_BYTES)
    open_layout = open_meta if is_meta_config(config) else open_huggingface
    generation = read_generation(folder, config)
    checkpoint = open_layout(folder, name, config)
    checkpoint.folder = folder
    checkpoint.generation = generation
    return checkpoint


def _demo_folder() -> Path:
    folder = Path(str(resources.files(__package__))) / "demo"
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            "demo: this installation holds no demo checkpoint; install blt-edge's wheel again"
        )
    return folder


def _fetch(hub_id: str) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise CheckpointError(
            f"{hub_id}: no such folder, and fetching a hub id needs: pip install {requirement('export')}"
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(_HUB_FILES)))
    except errors.LocalEntryNotFoundError as error:
        reason = "not in the local cache, and the hub can't be reached; connect, or give a folder"
        raise CheckpointError(f"{hub_id}: {reason}") from error
    except errors.GatedRepoError as error:
        reason = "its owner asks you to accept terms on huggingface.co; do so, then: hf auth login"
        raise CheckpointError(f"{hub_id}: {reason}") from error
    except errors.RepositoryNotFoundError as error:
        reason = "no such folder here and no such model on the hub (or it is private: hf auth login)"
        raise CheckpointError(f"{hub_id}: {reason}") from error
    except Exception as error:  # what else the client raises differs by version and transport
        raise CheckpointError(f"{hub_id}: fetching from the hub failed: {first_line(error)}") from error

"""Finding and opening a checkpoint: the bundled demo, a folder in either layout, or a Hugging Face hub id."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from ..runtime.errors import first_line, requirement
from ..runtime.names import CHAT_TEMPLATE_NAME
from ..runtime.paths import folder_name
from .checkpoint_base import Checkpoint, CheckpointError, one_line, read_json
from .generation_config import read_generation
from .huggingface import open_huggingface
from .meta import ENTROPY_FOLDERS, is_meta_config, open_meta

__all__ = ["Checkpoint", "CheckpointError", "open_checkpoint"]

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w.-]+(?:/[\w.-]+)*))?")
_HUB_FILES = (
    "config.json",
    "generation_config.json",
    CHAT_TEMPLATE_NAME,
    "tokenizer_config.json",
    "tokenizer.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "params.json",
    "train_args.json",
    "consolidated.pth",
    "entropy_model/*.json",
    "entropy_model/consolidated.pth",
    "entropy_model/*.safetensors",
)


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a checkpoint; only its config and headers are read.

    `source` is "demo" (the checkpoint in the package; a folder of that name is "./demo"), a folder in the
    Hugging Face or Meta's layout, or, where no such folder exists, a hub id "owner/name" or, of a branch,
    tag or commit "owner/name@revision". It is fetched into huggingface_hub's cache, or taken from there when
    offline (HF_HUB_OFFLINE=1). Raises `CheckpointError` in one line; no file stays open then.
    """
    if source == "demo":
        return _open_folder(_demo_folder(), "demo")
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _open_folder(folder, folder_name(folder))
    if folder.exists():
        raise CheckpointError(f"{source}: is a file; give the folder that holds config.json and the weights")
    if isinstance(source, str) and (named := _HUB_ID.fullmatch(source)):
        return _open_folder(_fetch(source, named[1], named[2]), source)
    raise CheckpointError(
        f"{source}: no such folder; give a checkpoint's folder, a hub id owner/name or owner/name@revision, "
        "or demo"
    )


def _open_folder(folder: Path, name: str) -> Checkpoint:
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else None
    if config is None and not (folder / "params.json").is_file():
        raise CheckpointError(f"{folder}: {_what_is_there(folder)}")
    generation = read_generation(folder, config or {})
    if config is None or is_meta_config(config):
        checkpoint = open_meta(folder, name)
    else:
        checkpoint = open_huggingface(folder, name, config)
    checkpoint.folder = folder
    checkpoint.generation = generation
    return checkpoint


def _what_is_there(folder: Path) -> str:
    """Why it is no checkpoint, and what to give instead."""
    if not any(folder.iterdir()):
        return "is empty; expected config.json and model.safetensors"
    models = {path.parent.name for kind in ("config", "params") for path in folder.glob(f"*/{kind}.json")}
    models -= set(ENTROPY_FOLDERS)
    if models:
        inside = ", ".join(str(folder / name) for name in sorted(models))
        return f"has no config.json itself; give the folder of a model: {one_line(inside)}"
    return "has no config.json; expected config.json and model.safetensors, or Meta's params.json and weights"


def _demo_folder() -> Path:
    folder = Path(str(resources.files(__package__))) / "demo"
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            "demo: this installation holds no demo checkpoint; install blt-edge's wheel again"
        )
    return folder


def _fetch(source: str, hub_id: str, revision: str | None) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise CheckpointError(
            f"{source}: no such folder, and fetching a hub id needs: pip install {requirement('export')}"
        ) from error
    try:
        return Path(
            huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=list(_HUB_FILES))
        )
    except errors.LocalEntryNotFoundError as error:
        reason = "not in the local cache, and the hub can't be reached; connect, or give a folder"
        raise CheckpointError(f"{source}: {reason}") from error
    except errors.RevisionNotFoundError as error:
        reason = "the hub has no such branch, tag or commit of it; see its page on huggingface.co"
        raise CheckpointError(f"{source}: {reason}") from error
    except errors.GatedRepoError as error:
        reason = "its owner asks you to accept terms on huggingface.co; do so, then: hf auth login"
        raise CheckpointError(f"{source}: {reason}") from error
    except errors.RepositoryNotFoundError as error:
        reason = "no such folder here and no such model on the hub (or it is private: hf auth login)"
        raise CheckpointError(f"{source}: {reason}") from error
    except Exception as error:  # what else the client raises differs by version and transport
        raise CheckpointError(f"{source}: fetching from the hub failed: {first_line(error)}") from error

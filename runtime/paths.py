"""Paths that are more than a name: links inside huggingface_hub's cache, and names that are no UTF-8."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import BundleError

__all__ = ["folder_name", "linked_blob", "native_path"]

_DESCRIPTORS = Path("/proc/self/fd")
_REPOSITORY = "models--"


def folder_name(folder: Path) -> str:
    """What people call a folder: its name, or of a snapshot in huggingface_hub's cache the hub id."""
    folder = folder.resolve()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith(_REPOSITORY):
        return repository.removeprefix(_REPOSITORY).replace("--", "/")
    return folder.name


def linked_blob(path: Path) -> Path | None:
    """The file that a link in huggingface_hub's cache stands for; None for any other link.

    There models--OWNER--NAME/snapshots/REVISION/FILE links to models--OWNER--NAME/blobs/HASH. Nowhere else
    may a bundle's file lie outside its directory.
    """
    folder = path.parent.resolve()
    for revision in (folder, *folder.parents):
        repository = revision.parent.parent
        if revision.parent.name == "snapshots" and repository.name.startswith(_REPOSITORY):
            target = Path(os.path.realpath(path))
            return target if target.parent == repository / "blobs" else None
    return None


@contextmanager
def native_path(path: Path) -> Iterator[str]:
    """A path as libraries in C++ take it, which is text in UTF-8. One with other bytes has another name while
    the context is open. Raises BundleError where the system has no such names.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        pass
    else:
        yield str(path)
        return
    # Files beside it are found by the folder's new name, too.
    anchor, name = (path.parent, path.name) if path.name.isascii() else (path, "")
    if not _DESCRIPTORS.is_dir():
        raise BundleError(f"{path} is no UTF-8, which inference engines can't open; rename it")
    descriptor = os.open(anchor, os.O_RDONLY)
    try:
        yield str(_DESCRIPTORS / str(descriptor) / name)
    finally:
        os.close(descriptor)

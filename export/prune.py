"""Dropping engines that nothing can use any more, or that a newer one on the same machine has replaced.

What goes can be made again here, from the portable graphs. They stay, always: every other device runs them,
where an engine no longer fits they run in its place, and `validate` and `quantize` read them. So do engines
for other machines, which only those make again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.engines import engines_of, read_description
from ..runtime.files import bytes_on_disk, remove_directory

__all__ = ["OtherEngine", "other_engines", "prune"]

_MACHINE = ("system", "machine", "processor", "features")
_VERSION = {"onnxruntime": "onnxruntime", "tensorrt": "version", "tensorrt-rtx": "version"}


@dataclass(frozen=True)
class OtherEngine:
    """An engine beside the one that is used here."""

    path: Path
    bytes: int
    unnecessary: bool
    why: str
    """Why it can go, or must stay."""


def other_engines(bundle: str | Path, used: Path) -> list[OtherEngine]:
    """All engines for the target of `used`, a sound one of this bundle, but itself."""
    target, own = used.name.rpartition("-")[0], read_description(used) or {}
    found = []
    for path in engines_of(Path(bundle), target):
        if path.name != used.name and path.is_dir() and not path.is_symlink():
            unnecessary, why = _verdict(target, own, read_description(path))
            if unnecessary and any(entry.is_symlink() or not entry.is_file() for entry in path.iterdir()):
                unnecessary, why = False, "holds something that no engine does; look at it yourself"
            found.append(OtherEngine(path, bytes_on_disk(path), unnecessary, why))
    return found


def prune(engines: list[OtherEngine]) -> None:
    """Remove those that are unnecessary, each whole or not at all. Raises OSError."""
    for engine in engines:
        if engine.unnecessary:
            remove_directory(engine.path)


def _verdict(target: str, own: Mapping[str, Any], theirs: Mapping[str, Any] | None) -> tuple[bool, str]:
    if theirs is None:
        return True, "its engine.json is damaged"
    layout, version = theirs.get("blt_edge_form"), str(theirs.get(_VERSION[target]))[:60]
    if not isinstance(layout, int) or layout > own["blt_edge_form"]:
        return False, "made by a newer blt-edge"
    if _graphs(theirs) != _graphs(own):
        return True, "made of other graphs than this bundle's"
    if target == "onnxruntime":
        if all(theirs.get(key) == own[key] for key in _MACHINE):
            return True, f"made for ONNX Runtime {version} or other options, on this machine"
        return False, "made for another machine, which alone makes it again"
    capabilities = theirs.get("compute_capabilities")
    if version == own["version"]:
        return False, "made for other limits, which it may be used for"
    if isinstance(capabilities, list) and all(one in own["compute_capabilities"] for one in capabilities):
        return True, f"made by version {version}, for the same GPUs"
    return False, "made for other GPUs"


def _graphs(description: Mapping[str, Any]) -> object:
    """The hashes of the portable graphs and weights that it was made of."""
    stages = description.get("stages")
    if not isinstance(stages, Mapping):
        return None
    keys = ("precision", "graph_sha256", "data_sha256")
    return {
        name: [spec.get(key) for key in keys] if isinstance(spec, Mapping) else None
        for name, spec in stages.items()
    }

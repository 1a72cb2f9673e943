"""Loading a bundle as the engine options ask."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .display import progress_bar
from .session import Session

if TYPE_CHECKING:
    from ...runtime import BltModel
    from ...runtime.manifest import Manifest

__all__ = ["check_bundle_files", "load_model"]


def load_model(
    session: Session, bundle: Path, device: str, threads: int | None, prefill_chunk: int, verify: bool
) -> BltModel:
    """Load a bundle; with `verify`, which may take minutes, show how far it is. Raises BltError."""
    from ...runtime import BltModel

    if not verify:
        return BltModel.load(bundle, device, threads, prefill_chunk=prefill_chunk)
    with progress_bar(session) as progress:
        return BltModel.load(
            bundle,
            device,
            threads,
            verify=True,
            prefill_chunk=prefill_chunk,
            progress=partial(progress, "checking files"),
        )


def check_bundle_files(session: Session, bundle: Path, manifest: Manifest, full: bool) -> None:
    """Compare a bundle's files with its manifest, whole ones with `full`. Raises BundleError."""
    from ...runtime.integrity import check_files

    if not full:
        check_files(bundle, manifest)
        return
    with progress_bar(session) as progress:
        check_files(bundle, manifest, full=True, progress=partial(progress, "checking files"))

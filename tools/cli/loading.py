"""Loading a bundle as the engine options ask."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .display import progress_bar, size
from .engine_options import EngineOptions
from .memory import running_memory
from .session import Session

if TYPE_CHECKING:
    from ...runtime import BltModel
    from ...runtime.manifest import Manifest

__all__ = ["check_bundle_files", "load_model"]


def load_model(
    session: Session, bundle: Path, engine: EngineOptions, *, positions: int | None = None
) -> BltModel:
    """Load a bundle; with `verify`, which may take minutes, show how far it is. Raises BltError.

    When the estimate for a text of `positions` ids (None: the trained context) is over `engine.max_memory`,
    nothing is loaded and ClickException raised.
    """
    from ...runtime import BltModel

    if engine.max_memory is not None:
        _check_memory(bundle, engine.max_memory, positions, engine.prefill_chunk)
    load = partial(
        BltModel.load,
        bundle,
        engine.device,
        engine.threads,
        prefill_chunk=engine.prefill_chunk,
        probe=engine.probe,
        provider_options=engine.provider_options,
    )
    if not engine.verify:
        return load()
    with progress_bar(session) as progress:
        return load(verify=True, progress=partial(progress, "checking files"))


def _check_memory(bundle: Path, limit: int, positions: int | None, prefill_chunk: int) -> None:
    from ...runtime.engines import find_engine
    from ...runtime.manifest import load_manifest

    manifest = load_manifest(bundle)
    prepared = find_engine(bundle, manifest).directory is not None
    wanted = manifest.model.trained_context if positions is None else positions
    chunk = max(1, min(prefill_chunk, wanted))
    parts = running_memory(manifest, prepared=prepared, positions=wanted, prefill_chunk=chunk)
    needed = sum(parts.values())
    if needed > limit:
        told = ", ".join(f"{name} {size(part)}" for name, part in parts.items())
        advice = "" if prepared else "blt-edge build, "
        raise click.ClickException(
            f"{bundle} would need about {size(needed)} ({told}), --max-memory allows {size(limit)}; "
            f"try {advice}blt-edge quantize, a smaller --prefill-chunk or a shorter text"
        )


def check_bundle_files(session: Session, bundle: Path, manifest: Manifest, full: bool) -> None:
    """Compare a bundle's files with its manifest, whole ones with `full`. Raises BundleError."""
    from ...runtime.integrity import check_files

    if not full:
        check_files(bundle, manifest)
        return
    with progress_bar(session) as progress:
        check_files(bundle, manifest, full=True, progress=partial(progress, "checking files"))

"""What a verb that writes a bundle says of it at the end: the path, or one document."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .documents import write_json
from .options import STDIN
from .session import Session

__all__ = ["finish_written"]


def finish_written(
    session: Session, bundle: Path, json_file: Path | None, check: Callable[[], object] | None
) -> None:
    """Validate by `check` (None = --no-validate), then print the path and write the document.

    A bundle that differs is kept: the document says so, and what `check` raises goes on. Raises OSError.
    """
    passed = False
    try:
        if check is None:
            session.say("not validated: --no-validate")
        else:
            check()
        passed = True
    finally:
        if json_file is not None:
            write_json(json_file, _document(bundle))
        if passed and json_file != STDIN:
            click.echo(bundle)


def _document(bundle: Path) -> dict[str, Any]:
    from ...runtime.manifest import load_manifest

    manifest = load_manifest(bundle)
    parts: dict[str, dict[str, Any]] = {
        stage: {
            "precision": spec.precision,
            "parameters": spec.parameters,
            "bytes": sum(manifest.files[file].bytes for file in (spec.file, spec.data)),
        }
        for stage, spec in manifest.stages.items()
    }
    parts["tables"] = {
        "precision": manifest.embedding.precision,
        "parameters": manifest.model.parameters["tables"],
        "bytes": manifest.embedding.bytes,
    }
    return {
        "bundle": str(bundle),
        "source": manifest.source.name,
        "bytes": sum(record.bytes for record in manifest.files.values()),
        "parts": parts,
        "validation": manifest.validation,
    }

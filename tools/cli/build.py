"""`blt-edge build`: a bundle's form for this device."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .display import print_table, progress_bar, size
from .options import OneOf, bundle_argument, verb
from .session import Session

__all__ = ["command"]


@verb("build")
@bundle_argument
@click.option(
    "--target",
    type=OneOf(["onnxruntime"]),
    default="onnxruntime",
    show_default=True,
    help="Engine to prepare the graphs for.",
)
@click.option("--force", is_flag=True, help="Build again what is there already.")
def command(session: Session, bundle: Path, target: str, force: bool) -> None:
    """Prepare a bundle for this device: runs and loads faster, takes less memory.

    Writes BUNDLE/engines/TARGET-FINGERPRINT: the stages optimized, attention fused, weights as this
    processor's kernels want them. It is used from then on, on machines like this one with the same version of
    the engine; elsewhere the portable graphs are, with the same results. stdout carries its path.
    """
    from ...export.engines import build_engine
    from ...runtime.engines import data_file, graph_file
    from ...runtime.manifest import load_manifest

    with progress_bar(session) as progress:
        engine = build_engine(bundle, target=target, force=force, progress=progress)
    assert engine.directory is not None
    if not session.quiet and sys.stderr is not None:
        manifest = load_manifest(bundle)
        rows = []
        for stage, spec in manifest.stages.items():
            portable = sum(manifest.files[file].bytes for file in (spec.file, spec.data))
            own = sum((engine.directory / file(stage)).stat().st_size for file in (graph_file, data_file))
            rows.append((f"{stage} graph", spec.precision, size(portable), size(own)))
        print_table(("part", "precision", ">portable", ">this form"), rows, sys.stderr)
    others = sorted(
        path.name for path in engine.directory.parent.iterdir() if path.name != engine.directory.name
    )
    if others:
        session.say(f"forms for other machines or versions, to remove by hand: {', '.join(others)}")
    click.echo(engine.directory)

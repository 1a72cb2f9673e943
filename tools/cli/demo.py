"""The demo's bundle in the user's cache, for `demo` in the place of a bundle: made once, from the package."""

from __future__ import annotations

import hashlib
import os
from importlib.metadata import version
from pathlib import Path

from ...runtime.errors import BundleError
from ...runtime.manifest import load_manifest
from ..output import Messages, progress_bar

_CHECKPOINT = Path(__file__).resolve().parents[2] / "export" / "demo"


def demo_bundle(messages: Messages) -> Path:
    """The bundle, made when there is none of this version of package and demo. Raises BltError, OSError."""
    # What the weights once computed changes with them, and is a twentieth of their size.
    golden = hashlib.sha256((_CHECKPOINT / "golden.safetensors").read_bytes()).hexdigest()
    bundle = _cache() / f"{version('blt-edge')}-{golden[:12]}" / "demo"
    try:
        load_manifest(bundle)
    except BundleError:
        from ...export import export_checkpoint

        messages.say(f"making the demo's bundle, once: {bundle}")
        bundle.parent.mkdir(parents=True, exist_ok=True)
        with progress_bar(messages) as progress:
            export_checkpoint("demo", bundle, force=True, progress=progress)
    return bundle


def _cache() -> Path:
    """Where files go that can be made again (XDG base directories)."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "blt-edge"

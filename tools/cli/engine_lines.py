"""Lines about what an engine for ONNX Runtime has beside its graphs, for `blt-edge build`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..output import listed, size

if TYPE_CHECKING:
    from ...runtime.engines import Engine
    from ...runtime.manifest import Manifest

__all__ = ["caches_line", "packed_line", "prefill_line"]


def packed_line(engine: Engine, manifest: Manifest) -> str:
    """A line about an engine's packed graphs."""
    from ...runtime.engines import packed_graph_file

    if not engine.rows:
        return "no packed graphs: several texts run one by one"
    assert engine.directory is not None
    files = [packed_graph_file(stage, count) for stage in manifest.stages for count in engine.rows]
    total = sum((engine.directory / name).stat().st_size for name in files)
    return f"packed graphs for {listed(engine.rows)} texts at once: {size(total)}"


def caches_line(engine: Engine, manifest: Manifest) -> str:
    """A line about what an engine keeps keys and values as."""
    from ...runtime.engines import cache_files

    assert engine.directory is not None
    files = cache_files(manifest.stages, engine.rows, engine.caches)
    if not files:
        return f"caches are {engine.caches} again"
    total = sum((engine.directory / name).stat().st_size for name in files)
    return (
        f"caches are {engine.caches} while a text goes on: {size(total)} of graphs and scales; "
        "--cache-precision float32 goes back"
    )


def prefill_line(engine: Engine) -> str:
    """A line about the stages that read chunks in int8."""
    from ...runtime.engines import prefill_files

    assert engine.directory is not None
    if not engine.int8_prefill:
        return "prompts are read as all else is again"
    total = sum((engine.directory / name).stat().st_size for name in prefill_files(engine.int8_prefill))
    return (
        f"prompts are read in int8 by {listed(engine.int8_prefill)}: {size(total)}; "
        "--int8-prefill none goes back"
    )

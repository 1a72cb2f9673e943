"""Building an engine for ONNX Runtime, on the device: all of it or nothing, beside portable graphs.

The engine is written to a hidden sibling that takes its name at the end, once it has computed what the
portable graphs compute (`proof`). `operators` says what it may be made of, `runtime.engines` what it holds.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from ..graphs.attention import fuse_attention
from ..graphs.block_products import BLOCK_BITS, write_block_products
from ..graphs.surgery import foreign_graph
from ..runtime.backends.ort import OrtStage
from ..runtime.backends.ort_session import import_onnxruntime, save_optimized
from ..runtime.engines import (
    ENGINE_NAME,
    Engine,
    cache_files,
    data_file,
    describe_engine,
    engine_limits,
    engine_path,
    find_engine,
    graph_file,
    packed_graph_file,
    prefill_files,
    render_engine,
    with_caches,
    with_prefill,
    with_rows,
    with_threads,
)
from ..runtime.errors import OptionError
from ..runtime.fields import shown
from ..runtime.files import OutputError, WriteError, new_directory, write_whole
from ..runtime.integrity import check_files, file_record
from ..runtime.manifest import Manifest, load_manifest
from ..runtime.names import CACHES
from ..runtime.narrow_cache import SCALES_NAME, read_scales
from ..runtime.processors import usable_cores
from ..runtime.self_test import SELF_TEST_NAME
from .bundle import Meter, Progress, check_one_name, graph_name, load_stage, save_stage
from .narrow import add_narrow_caches
from .operators import check_version, multiplies_blocks, window_offset
from .packed import check_rows, pack_engine
from .prefill import add_prefill, check_prefill, rotation_bytes
from .proof import prove_engine
from .threads import measure_threads

__all__ = ["DEFAULT_ROWS", "build_engine", "engine_bytes", "new_engine", "spelled_out"]

OLDEST_NARROW = (1, 27)
"""The first whose fused attention takes caches in 8 bits on a processor."""

DEFAULT_ROWS = (2, 4, 8)
"""For how many texts at once an engine has packed graphs."""

Floats = npt.NDArray[np.float32]

# Bytes of an engine for each byte of portable weights, at most: both layouts of every weight, or float32, and
# while a stage is built its weights once more.
_GROWTH = 3.5
_ALIGNMENT = 64


def spelled_out(manifest: Manifest) -> tuple[str, ...]:
    """What a bundle's engine can't leave to one operator here, such as "attention"; each with the reason.

    Its results are right all the same, and its steps slower.
    """
    here = f"ONNX Runtime {import_onnxruntime().__version__} on this processor"
    found = []
    if any(spec.fusable for spec in manifest.stages.values()) and window_offset() is None:
        found.append(f"attention: the fused operator of {here} computes something else")
    for bits in sorted({bits for stage in manifest.stages for bits in block_bits(manifest, stage)}):
        if not multiplies_blocks(bits):
            found.append(
                f"products over {bits}-bit blocks: the operator of {here} can't be saved or is wrong"
            )
    return tuple(found)


def block_bits(manifest: Manifest, stage: str) -> tuple[int, ...]:
    """Bits of a stage's weights in blocks, ascending: none, one number, or both of a mix."""
    return tuple(sorted(BLOCK_BITS[word] for word in manifest.precisions_of(stage) if word in BLOCK_BITS))


def build_engine(
    bundle: str | Path,
    *,
    rows: tuple[int, ...] = DEFAULT_ROWS,
    caches: str | None = None,
    int8_prefill: tuple[str, ...] | None = None,
    force: bool = False,
    progress: Progress | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> Engine:
    """Write ONNX Runtime's engine of `bundle` for this machine, `engines/TARGET-FINGERPRINT/`; returns it.

    A sound engine that is there already stays, unless `force`; so do those for other machines. The bundle
    stays usable everywhere. With how many threads it is fastest is measured and kept with it, where the
    machine is quiet. progress(what, bytes of weights done, in all). Peak memory is that of loading the
    largest stage without an engine, up to twice its weights.

    rows: for how many texts at once it gets packed graphs, each 2 to MOST_ROWS; an engine that is there gets
    those that it lacks, and loses others. Where they can't be had the engine has none, and
    warn(line) says why.

    caches: what it keeps keys and values as while a text goes on, one of `CACHES`; an engine that is there
    gets what it lacks for that, and loses what it does not need. None: as it has them, float32 where it is
    new. "int8" costs accuracy, and its scales are measured on the package's own texts.

    int8_prefill: stages that read chunks in products of integers, ("all",) for those that can; an engine that
    is there gets what it lacks for that, and loses what it does not need. None: as it has them, none where
    it is new.

    Raises OptionError (rows, caches, int8_prefill), BundleError, BackendError (no ONNX Runtime, one that is
    too old, or it refuses a graph), WrongEngineError (it computes something else than the portable graphs),
    WriteError (disk full).
    """
    rows = check_rows(rows)
    if caches is not None and caches not in CACHES:
        raise OptionError(f"caches: got {shown(caches)}, allowed are {' and '.join(CACHES)}")
    check_version("building an engine")
    directory = Path(bundle)
    manifest = load_manifest(directory)
    check_files(directory, manifest)
    found = find_engine(directory, manifest)
    description = describe_engine(manifest)
    final = engine_path(directory, description)
    # What is damaged, or built again, keeps what its description says of it; where there is none, that is
    # what a new one has.
    before = Engine.at(directory, final)
    caches = caches or before.caches
    prefill = check_prefill(manifest, before.int8_prefill if int8_prefill is None else int8_prefill)
    if caches != "float32":
        check_version(f"keeping caches in {caches}", OLDEST_NARROW, "leave them float32")
    if found.directory is not None and not force:
        meter = Meter(progress, sum(spec.parameters for spec in manifest.stages.values()))
        engine = _with_rows(directory, manifest, found, rows, warn)
        engine = _with_caches(directory, manifest, engine, caches, lambda what: meter.of(what)(0))
        return _with_prefill(directory, manifest, engine, prefill, lambda what: meter.of(what)(0))
    weights = {stage: manifest.files[spec.data].bytes for stage, spec in manifest.stages.items()}
    meter = Meter(progress, 2 * sum(weights.values()))
    with new_engine(final, needed=engine_bytes(manifest)) as temporary:
        for stage, size in weights.items():
            advance = meter.of(f"{stage} graph")
            advance(0)
            _build_stage(directory, manifest, stage, temporary)
            advance(size)

        def watch(stage: str) -> None:
            meter.of(f"proving the {stage} graph")(weights[stage])

        prove_engine(
            directory,
            manifest,
            lambda stage: OrtStage(directory, manifest, stage, None, optimized=temporary / graph_file(stage)),
            engine_limits(manifest),
            temporary / SELF_TEST_NAME,
            name=f"ONNX Runtime {import_onnxruntime().__version__}",
            alike=True,
            watch=watch,
        )
        meter.of("packed graphs")(0)
        rows = rows if pack_engine(directory, manifest, temporary, rows, warn) else ()
        seal_engine(temporary, description, rows=rows)
    best = measure_threads(directory, lambda what: meter.of(what)(0))
    if best is not None:
        text = with_threads(final, best, usable_cores())
        write_whole(final / ENGINE_NAME, lambda path: path.write_text(text, encoding="ascii"))
    engine = replace(Engine.at(directory, final), threads=best)
    engine = _with_caches(directory, manifest, engine, caches, lambda what: meter.of(what)(0))
    return _with_prefill(directory, manifest, engine, prefill, lambda what: meter.of(what)(0))


def _with_rows(
    directory: Path,
    manifest: Manifest,
    engine: Engine,
    rows: tuple[int, ...],
    warn: Callable[[str], None],
) -> Engine:
    """An engine that is there, with packed graphs for these rows; where they can't be had, as it was."""
    path = engine.directory
    assert path is not None
    if engine.rows == rows:
        return engine
    missing = tuple(count for count in rows if count not in engine.rows)
    kinds: dict[str, dict[str, Floats] | None] = {"float32": None}
    if engine.caches != "float32":
        kinds[engine.caches] = read_scales(path / SCALES_NAME, manifest)
    with _writing(path):
        if not all(pack_engine(directory, manifest, path, missing, warn, each) for each in kinds.values()):
            return engine
        files = [
            packed_graph_file(stage, count, kind)
            for stage in manifest.stages
            for count in rows
            for kind in kinds
        ]
        text = with_rows(path, rows, {name: file_record(path / name) for name in files})
        write_whole(path / ENGINE_NAME, lambda file: file.write_text(text, encoding="ascii"))
        for count in set(engine.rows) - set(rows):
            for stage in manifest.stages:
                for kind in kinds:
                    (path / packed_graph_file(stage, count, kind)).unlink(missing_ok=True)
    return replace(engine, rows=rows)


def _with_caches(
    directory: Path, manifest: Manifest, engine: Engine, caches: str, watch: Callable[[str], None]
) -> Engine:
    """An engine that is there, with caches of this kind; where they can't be had, as it was, and an error."""
    path = engine.directory
    assert path is not None
    if engine.caches == caches:
        return engine
    with _writing(path):
        if caches != "float32":
            add_narrow_caches(directory, manifest, path, engine.rows, watch)
        files = cache_files(manifest.stages, engine.rows, caches)
        text = with_caches(path, caches, {name: file_record(path / name) for name in files})
        write_whole(path / ENGINE_NAME, lambda file: file.write_text(text, encoding="ascii"))
        for name in cache_files(manifest.stages, engine.rows, engine.caches):
            (path / name).unlink(missing_ok=True)
    return replace(engine, caches=caches)


def _with_prefill(
    directory: Path, manifest: Manifest, engine: Engine, stages: tuple[str, ...], watch: Callable[[str], None]
) -> Engine:
    """An engine that is there, whose `stages` read chunks in products of integers; where these can't be had,
    as it was, and an error."""
    path = engine.directory
    assert path is not None
    if engine.int8_prefill == stages:
        return engine
    with _writing(path):
        add_prefill(directory, manifest, path, set(stages) - set(engine.int8_prefill), watch)
        text = with_prefill(path, stages, {name: file_record(path / name) for name in prefill_files(stages)})
        write_whole(path / ENGINE_NAME, lambda file: file.write_text(text, encoding="ascii"))
        for name in prefill_files(engine.int8_prefill) - prefill_files(stages):
            with suppress(OSError):  # Windows keeps what somebody has mapped; nobody reads it any longer
                (path / name).unlink(missing_ok=True)
    return replace(engine, int8_prefill=stages)


def engine_bytes(manifest: Manifest) -> int:
    """Disk that ONNX Runtime's engine of a bundle takes, at most."""
    weights = sum(manifest.files[spec.data].bytes for spec in manifest.stages.values())
    return int(_GROWTH * weights) + sum(rotation_bytes(manifest, stage) for stage in manifest.stages)


def _build_stage(directory: Path, manifest: Manifest, stage: str, engine: Path) -> None:
    spec, graph = manifest.stages[stage], engine / graph_file(stage)
    model = load_stage(directory, spec)
    offset = window_offset()
    widths = [bits for bits in block_bits(manifest, stage) if multiplies_blocks(bits)]
    with foreign_graph(directory / spec.file):
        # Where the operator is of no use, the portable graph's attention is optimized like the rest.
        if spec.fusable and offset is not None:
            fuse_attention(model, spec, offset)
        # Likewise: what is spelled out is right, if slow.
        blocks = sum(write_block_products(model, bits) for bits in widths)
    if blocks:
        check_one_name((directory / spec.data).resolve())
        with TemporaryDirectory(dir=engine) as weights:
            save_stage(Path(weights), stage, model, lambda _count: None)
            _save((Path(weights) / graph_name(stage)).read_bytes(), Path(weights), spec.precision, graph)
    else:
        folder = (directory / spec.data).resolve().parent
        _save(ir.to_proto(model).SerializeToString(), folder, spec.precision, graph)
    assert (engine / data_file(stage)).is_file()


def _save(model: bytes, weights: Path, precision: str, graph: Path) -> None:
    """`save_optimized`, with prepacked weights where they can be used from where they lie."""
    save_optimized(model, weights, precision, graph)
    if not _aligned(graph):
        graph.with_name(f"{graph.name}.data").unlink()
        save_optimized(model, weights, precision, graph, prepacked=False)


def _aligned(graph: Path) -> bool:
    """Whether a saved graph's weights begin where their type may, and prepacked ones where vectors may.

    ONNX Runtime 1.28 to 1.30 write prepacked blocks of odd sizes one behind the other: what comes after them
    is read wrongly, or ends the process.
    """
    for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
        size = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for entry in tensor.external_data:
            prepacked = entry.key.startswith("prepacked")
            if prepacked or entry.key == "offset":
                # Prepacked ones are listed as KERNEL+HASH|OFFSET;LENGTH;...
                offset = entry.value.rpartition("|")[2].partition(";")[0]
                if not offset.isdecimal() or int(offset) % (_ALIGNMENT if prepacked else size):
                    return False
    return True


def seal_engine(
    directory: Path, description: dict[str, Any], *, proven: bool = True, rows: tuple[int, ...] = ()
) -> None:
    """Record every file of a new engine, what it was made for, whether it ran here, and its packed graphs."""
    files = {path.name: file_record(path) for path in sorted(directory.iterdir())}
    text = render_engine(description, files, proven=proven, rows=rows)
    (directory / ENGINE_NAME).write_text(text, encoding="ascii")


@contextmanager
def new_engine(final: Path, needed: int) -> Iterator[Path]:
    """A directory to fill; on success it is at `final`, on any failure what was there is as it was.

    needed: bytes that it may take. Raises WriteError when they are not free, or the disk refuses.
    """
    engines = final.parent
    try:
        with _writing(engines):
            engines.mkdir(exist_ok=True)
            with new_directory(final, str(engines), "engine", needed=needed) as directory:
                yield directory
    finally:
        with suppress(OSError):
            engines.rmdir()


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    """Around writing at a place of a bundle's engines: failures become a WriteError that names it."""
    try:
        yield
    except OutputError as error:  # it says which place, and what to do
        raise WriteError(str(error)) from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise WriteError(
            f"{place}: the engine cannot be written ({error.strerror or error}); "
            + ("free some space" if full else "check its permissions")
        ) from error

"""Building a device-specific form of a bundle, on the device: all of it or nothing, beside portable graphs.

The form is written to a hidden sibling that takes its name at the end, once it has computed what the portable
graphs compute (`proof`). `runtime.engines` says what it holds.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import onnx_ir as ir

from ..runtime.backends.ort import OrtStage, import_onnxruntime, save_optimized
from ..runtime.engines import (
    ENGINE_NAME,
    Engine,
    data_file,
    describe_engine,
    engine_reach,
    find_engine,
    form_path,
    graph_file,
    render_engine,
)
from ..runtime.integrity import check_files, file_record
from ..runtime.manifest import Manifest, load_manifest
from ..runtime.self_test import SELF_TEST_NAME
from ._siblings import claim, clear_abandoned, sibling
from ._signals import termination_raises, uninterrupted
from .block_products import BLOCK_BITS, write_block_products
from .bundle import WriteError
from .fused_attention import fuse_attention
from .operator_probes import check_version, multiplies_blocks, window_offset
from .progress import Meter, Progress
from .proof import prove_engine
from .stage_files import graph_name, load_stage, save_stage

__all__ = ["build_engine", "form_bytes", "new_form"]

_GROWTH = 3.5
"""Bytes of a form for each byte of portable weights, at most: both layouts of every weight, or float32, and
while a stage is built its weights once more."""
_NEARLY_FULL = 1 << 20
_ALIGNMENT = 64


def build_engine(bundle: str | Path, *, force: bool = False, progress: Progress | None = None) -> Engine:
    """Write ONNX Runtime's form of `bundle` for this machine, `engines/TARGET-FINGERPRINT/`; returns it.

    A sound form that is there already stays, unless `force`; forms for other machines stay. The bundle stays
    usable everywhere. progress(what, bytes of weights done, in all). Peak memory is that of loading the
    largest stage without a form, up to twice its weights.

    Raises BundleError, BackendError (no ONNX Runtime, one that is too old, or it refuses a graph),
    WrongEngineError (it computes something else than the portable graphs), WriteError (disk full).
    """
    check_version("building an engine")
    directory = Path(bundle)
    manifest = load_manifest(directory)
    check_files(directory, manifest)
    found = find_engine(directory, manifest)
    if found.directory is not None and not force:
        return found
    description = describe_engine(manifest)
    final = form_path(directory, description)
    weights = {stage: manifest.files[spec.data].bytes for stage, spec in manifest.stages.items()}
    meter = Meter(progress, 2 * sum(weights.values()))
    with new_form(final, needed=form_bytes(manifest)) as temporary:
        for stage, size in weights.items():
            advance = meter.of(f"{stage} graph")
            advance(0)
            _build_stage(directory, manifest, stage, temporary)
            advance(size)
        _prove(directory, manifest, temporary, meter)
        files = {path.name: file_record(path) for path in sorted(temporary.iterdir())}
        (temporary / ENGINE_NAME).write_text(render_engine(description, files), encoding="ascii")
    return Engine(final.relative_to(directory).as_posix(), directory=final)


def form_bytes(manifest: Manifest) -> int:
    """Disk that ONNX Runtime's form of a bundle takes, at most."""
    return int(_GROWTH * sum(manifest.files[spec.data].bytes for spec in manifest.stages.values()))


def _build_stage(directory: Path, manifest: Manifest, stage: str, form: Path) -> None:
    spec, graph = manifest.stages[stage], form / graph_file(stage)
    model = load_stage(directory, spec)
    offset = window_offset()
    # Where the operator is of no use, the portable graph's attention is optimized like the rest.
    if spec.fusable and offset is not None:
        fuse_attention(model, spec, offset)
    bits = BLOCK_BITS.get(spec.precision)
    # Likewise: what is spelled out is right, if slow.
    if bits is not None and multiplies_blocks(bits) and write_block_products(model, bits):
        with TemporaryDirectory(dir=form) as weights:
            save_stage(Path(weights), stage, model, lambda _count: None)
            _save((Path(weights) / graph_name(stage)).read_bytes(), Path(weights), spec.precision, graph)
    else:
        _save(ir.to_proto(model).SerializeToString(), directory, spec.precision, graph)
    assert (form / data_file(stage)).is_file()


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


def _prove(directory: Path, manifest: Manifest, form: Path, meter: Meter) -> None:
    def watch(stage: str) -> None:
        meter.of(f"proving the {stage} graph")(manifest.files[manifest.stages[stage].data].bytes)

    prove_engine(
        directory,
        manifest,
        lambda stage: OrtStage(directory, manifest, stage, None, optimized=form / graph_file(stage)),
        engine_reach(manifest),
        form / SELF_TEST_NAME,
        name=f"ONNX Runtime {import_onnxruntime().__version__}",
        alike=True,
        watch=watch,
    )


@contextmanager
def new_form(final: Path, needed: int) -> Iterator[Path]:
    """A directory to fill; on success it is at `final`, on any failure what was there is as it was.

    needed: bytes that it may take. Raises WriteError when they are not free, or the disk refuses.
    """
    engines = final.parent
    temporary = sibling(final, "partial")
    with termination_raises():
        lock = None
        try:
            engines.mkdir(exist_ok=True)
            clear_abandoned(final)
            _check_free_space(engines, needed)
            temporary.mkdir()
            lock = claim(temporary)
            yield temporary
            _publish(temporary, final)
        except WriteError:
            raise
        except OSError as error:
            raise WriteError(
                f"{engines}: the form cannot be written ({error.strerror or error}); "
                + (
                    "free some space"
                    if error.errno in (errno.ENOSPC, errno.EDQUOT)
                    else "check its permissions"
                )
            ) from error
        except Exception as error:
            # The engine writes by itself, and says of a full disk no more than that something failed.
            if engines.is_dir() and shutil.disk_usage(engines).free < _NEARLY_FULL:
                raise WriteError(f"{engines}: the disk is full; free some space") from error
            raise
        finally:
            with uninterrupted():
                shutil.rmtree(temporary, ignore_errors=True)
                if lock is not None:
                    os.close(lock)
                with suppress(OSError):
                    engines.rmdir()


def _check_free_space(engines: Path, needed: int) -> None:
    free = shutil.disk_usage(engines).free
    if free < needed:
        raise WriteError(
            f"{engines}: the form may need {needed} bytes, {free} bytes are free; free some space first"
        )


def _publish(temporary: Path, final: Path) -> None:
    for path in (*temporary.iterdir(), temporary):
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:  # Windows opens no directories
            continue
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    replaced = sibling(final, "replaced")
    with uninterrupted():
        try:
            if os.path.lexists(final):
                final.rename(replaced)
            temporary.rename(final)
        except OSError:
            if replaced.exists() and not os.path.lexists(final):
                replaced.rename(final)
            raise
        shutil.rmtree(replaced, ignore_errors=True)

"""Making a bundle: its directory, all of it or nothing, never over what is no bundle; and its stages' files.

Weights stream: one tensor at a time is read, rearranged and written as ONNX external data; a graph file
itself holds only structure and small constants. Peak memory is the largest weight, about twice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..graphs.config import ModelConfig
from ..graphs.layers import Weight
from ..graphs.quantize import Recipe, rewrite_stage
from ..graphs.stages import build_stage
from ..graphs.surgery import foreign_graph, weights_from
from ..runtime.errors import BltError, BundleError
from ..runtime.fields import parse_json
from ..runtime.files import OutputError, check_replaceable, new_directory, read_plain
from ..runtime.integrity import file_record
from ..runtime.manifest import Manifest, StageSpec, write_manifest
from ..runtime.names import MANIFEST_NAME
from .checkpoint_base import Checkpoint, CheckpointError

Progress = Callable[[str, int, int], None]
"""progress(what is being written, bytes done, bytes in all)."""
FileProgress = Callable[[int, int], None]
"""progress(bytes done, bytes in all) of one file after the other."""

ELSEWHERE = ", or give an --output on another disk"
# Below this a tensor stays inside the graph file: shapes, scalars and RoPE frequencies.
_INLINE_BYTES = 1024
# Pages: engines map each weight where it lies.
_ALIGNMENT = 4096


class Meter:
    """Adds up what the parts have written, for one progress display."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def of(self, what: str) -> Callable[[int], None]:
        """A callback for one part: bytes written since its last call."""

        def advance(count: int) -> None:
            self._done += count
            if self._progress is not None:
                self._progress(what, min(self._done, self._total), self._total)

        return advance

    def up_to(self, what: str) -> Callable[[int, int], None]:
        """A callback for one part that reports (bytes written of the part, bytes of the part)."""
        advance, before = self.of(what), self._done

        def reached(done: int, _all: int) -> None:
            advance(before + done - self._done)

        return reached


@contextmanager
def new_bundle(output: str | os.PathLike[str], *, force: bool = False, needed: int = 0) -> Iterator[Path]:
    """A directory to fill and `finish`; on success it is at `output`, on any failure nothing is.

    needed: estimated bytes of the bundle, checked against the free space first; 0 = unknown. force: a bundle
    that is at `output` is replaced, at the very end. The parent directory must exist.

    Raises OutputError when `output` exists (with `force`: when it is no bundle and not empty), or cannot be
    made there; WriteError when the disk is or becomes full. Everything else passes through.
    """
    check_output(output, force)
    name, may_replace = f"output {output}", partial(check_output, output, force)
    with new_directory(
        _absolute(output), name, "bundle", needed=needed, elsewhere=ELSEWHERE, check=may_replace
    ) as directory:
        yield directory
        assert (directory / MANIFEST_NAME).is_file(), "finish was not called"


def finish(directory: Path, manifest: Manifest, progress: FileProgress | None = None) -> Manifest:
    """Hash every file of `directory`, put them on the disk, and write the manifest with their records.

    `manifest` is complete but for `files`. progress(bytes hashed, bytes in all). Returns what was written.
    Raises BundleError when a file is no regular file, or the manifest and the files contradict each other.
    """
    paths = sorted(directory.iterdir())
    total = sum(path.lstat().st_size for path in paths)
    files, done = {}, 0
    for path in paths:
        base = done

        def advance(count: int, _: int, base: int = base) -> None:
            if progress is not None:
                progress(base + count, total)

        files[path.name] = file_record(path, advance)
        done += files[path.name].bytes
    manifest = manifest.with_files(files)
    write_manifest(directory, manifest)
    return manifest


def check_output(output: str | os.PathLike[str], force: bool) -> None:
    """Raises OutputError when `new_bundle` would: to be asked before any work."""
    final = _absolute(output)
    if not final.name:
        raise OutputError(f"output is {output}; give the name of a new directory")
    if not final.parent.is_dir():
        reason = "is not a directory" if os.path.lexists(final.parent) else "does not exist"
        raise OutputError(f"output {output}: its parent {final.parent} {reason}; create it first")
    if not os.path.lexists(final):
        return
    if final.is_symlink():
        raise OutputError(f"output {output} is a link; give the directory itself, or a new name")
    if not final.is_dir():
        raise OutputError(f"output {output} is a file, a bundle is a directory; give a new name")
    if not force:
        raise OutputError(f"output {output} exists; give a new name, or --force to replace a bundle")
    if not _is_bundle(final) and any(final.iterdir()):
        raise OutputError(
            f"output {output} is not a bundle and not empty, so --force does not replace it; "
            "give a new name, or remove it yourself"
        )
    check_replaceable(final, f"output {output}")


def _absolute(output: str | os.PathLike[str]) -> Path:
    return Path(os.path.abspath(output))  # noqa: PTH100 - resolve() would follow a link at the output


def _is_bundle(directory: Path) -> bool:
    """Whether its manifest is one of ours, of any version: other programs have a `manifest.json`, too."""
    try:
        manifest = parse_json(read_plain(directory / MANIFEST_NAME))
    except (BltError, OSError, ValueError):
        return False
    return isinstance(manifest, dict) and {"schema", "blt_edge", "files"} <= manifest.keys()


# The stages' files.


def graph_name(stage: str) -> str:
    """File name of a stage's graph."""
    return f"{stage}.onnx"


def data_name(stage: str) -> str:
    """File name of a stage's weights."""
    return f"{stage}.onnx.data"


def checkpoint_stage(checkpoint: Checkpoint, config: ModelConfig, stage: str) -> ir.Model:
    """A stage's graph as it is built, float32, over weights that are read when they are written.

    Reading raises CheckpointError for a weight that is not finite.
    """

    def finite(name: str) -> npt.NDArray[np.float32]:
        array = checkpoint.tensor(name)
        if not np.isfinite(array).all():
            raise CheckpointError(
                f"{checkpoint.name}: tensor {name} holds NaN or infinity; the model is damaged"
            )
        return array

    def lazy(weight: Weight) -> ir.LazyTensor:
        def load() -> ir.TensorProtocol:
            return ir.tensor(weight.source.assemble(finite, tuple(weight.shape.numpy())), name=weight.name)

        return ir.LazyTensor(load, dtype=ir.DataType.FLOAT, shape=ir.Shape(weight.shape), name=weight.name)

    model = build_stage(config, stage)
    for value in model.graph.initializers.values():
        if isinstance(value, Weight):
            value.const_value = lazy(value)
    return model


def bundle_stage(bundle: Path, spec: StageSpec) -> ir.Model:
    """`load_stage`, with weights that are read when they are written, and let go again."""

    def lazy(tensor: ir.ExternalTensor) -> ir.LazyTensor:
        def load() -> ir.TensorProtocol:
            # A copy, so that the mapped file can go: its pages would count as this process's memory.
            values = np.array(tensor.numpy())
            tensor.release()
            return ir.tensor(values, name=tensor.name)

        return ir.LazyTensor(load, dtype=tensor.dtype, shape=ir.Shape(tensor.shape), name=tensor.name)

    model = load_stage(bundle, spec)
    check_one_name((bundle / spec.data).resolve())
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = lazy(value.const_value)
    return model


def planned_bytes(model: ir.Model, recipe: Recipe) -> tuple[int, int]:
    """(bytes of all weights on disk, bytes of the largest one now) of a stage rewritten by the recipe.

    No weight is read. Raises like `rewrite_stage`.
    """
    largest = max((tensor.nbytes for tensor in _tensors(model)), default=0)
    rewrite_stage(model, recipe)
    return sum(tensor.nbytes for tensor in _tensors(model) if tensor.nbytes > _INLINE_BYTES), largest


def _tensors(model: ir.Model) -> list[ir.TensorProtocol]:
    values = model.graph.initializers.values()
    return [value.const_value for value in values if value.const_value is not None]


def check_one_name(data: Path) -> None:
    """Raise BundleError for weights under several names (hard links), which onnx_ir refuses to read."""
    names = data.stat().st_nlink
    if names > 1:
        raise BundleError(
            f"{data} is one file under {names} names (hard links), from which weights are not read here; "
            "copy the bundle without links"
        )


def load_stage(bundle: Path, spec: StageSpec) -> ir.Model:
    """A stage's graph from a bundle; its weights stay in their file until they are read.

    Raises BundleError for a file that is no graph, or weights that do not lie in the stage's own file.
    """
    path = bundle / spec.file
    with foreign_graph(path):
        model = ir.load(path)
        end = (bundle / spec.data).stat().st_size
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            # A graph is untrusted: its weights come from the one file that the manifest lists.
            offset, length = tensor.offset or 0, tensor.nbytes if tensor.length is None else tensor.length
            inside = tensor.location == spec.data and 0 <= offset <= offset + length <= end
            if not inside or length != tensor.nbytes:
                raise BundleError(
                    f"{path}: weight {str(value.name)[:60]!r} does not lie in {spec.data}; "
                    "copy the bundle again or export the checkpoint again"
                )
        # onnx_ir reads no weights through a link.
        weights_from(model, bundle / spec.data)
    return model


def save_stage(directory: Path, stage: str, model: ir.Model, progress: Callable[[int], None]) -> None:
    """Write a stage's graph and its weights, one by one in their order; progress(bytes) after each."""
    ir.save(
        model,
        directory / graph_name(stage),
        external_data=data_name(stage),
        size_threshold_bytes=_INLINE_BYTES,
        alignment=_ALIGNMENT,
        align_threshold=_INLINE_BYTES,
        callback=lambda tensor, _info: progress(tensor.nbytes),
    )

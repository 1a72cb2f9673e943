"""What ONNX Runtime's own operators do in the installed version, found by running them on a few numbers.

An engine takes the meaning of operators outside the ONNX standard for granted, and versions differ: up to
1.23 `GroupQueryAttention` lets a window see one key more than from 1.24 on. Asking the operator finds that
for versions that nobody has tried, too.

Building a device-specific form of a bundle, on the device: all of it or nothing, beside portable graphs.

The form is written to a hidden sibling that takes its name at the end, once it has computed what the portable
graphs compute (`proof`). `runtime.engines` says what it holds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from ..graphs.attention import DOMAIN, attention_node, fuse_attention
from ..graphs.block_products import BLOCK_BITS, block_product, write_block_products
from ..runtime.backends.ort import OrtStage, import_onnxruntime, save_optimized, session_options
from ..runtime.engines import (
    ENGINE_NAME,
    Engine,
    data_file,
    describe_engine,
    engine_limits,
    engine_path,
    find_engine,
    graph_file,
    render_engine,
)
from ..runtime.errors import BackendError
from ..runtime.files import OutputError, WriteError, new_directory
from ..runtime.integrity import check_files, file_record
from ..runtime.manifest import Manifest, load_manifest
from ..runtime.self_test import SELF_TEST_NAME
from .bundle import Meter, Progress
from .proof import prove_engine
from .stage_files import graph_name, load_stage, save_stage

__all__ = [
    "OLDEST",
    "build_engine",
    "check_version",
    "form_bytes",
    "multiplies_blocks",
    "new_engine",
    "window_offset",
]

OLDEST = (1, 22)
"""ONNX Runtime's first version whose fused attention takes positions."""

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

_HEADS, _KV_HEADS, _WIDTH, _WINDOW, _CAPACITY = 4, 2, 16, 4, 16


def check_version(what: str) -> None:
    """Raise BackendError in one line when ONNX Runtime is older than `OLDEST`; what: needs a newer one."""
    version = import_onnxruntime().__version__
    parts = [int(part) for part in version.split(".")[:2] if part.isdecimal()]
    if len(parts) == 2 and tuple(parts) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise BackendError(
            f"{what} needs ONNX Runtime {oldest} or newer, here it is {version}; pip install "
            f"'onnxruntime>={oldest}', or run the portable graphs, which need no engine"
        )


@cache
def window_offset() -> int | None:
    """What `local_window_size` must have added so that a window of w keys sees w keys, the newest included.

    None when fused attention can't be had: the operator refuses our inputs or computes something else.
    """
    if not _attends_right(None, -1):
        return None
    return next((offset for offset in (0, -1, 1) if _attends_right(_WINDOW, _WINDOW + offset)), None)


@cache
def multiplies_blocks(bits: int) -> bool:
    """Whether the product over blocks of 4 or 8 bits is right once it was saved and loaded as engines are."""
    model = block_product(128, 32, bits)
    weight, scales = (_values(model.graph, name) for name in ("weight", "scales"))
    x = np.random.default_rng(0).standard_normal((3, len(weight))).astype(np.float32)
    wanted = x @ (weight * scales.repeat(len(weight) // len(scales), axis=0))
    write_block_products(model, bits)
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = _saved_and_run(model, Path(folder), "int4" if bits == 4 else "int8w", x)
        except Exception:  # ONNX Runtime raises many kinds; whatever it says, it can't be had
            return False
    # Inputs are rounded to int8.
    return bool(np.abs(found - wanted).max() <= 0.05 * np.abs(wanted).max())


def _values(graph: ir.Graph, name: str) -> Floats:
    tensor = graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy().astype(np.float32)


def _saved_and_run(model: ir.Model, folder: Path, precision: str, x: Floats) -> Floats:
    ir.save(model, folder / "packed.onnx", external_data="packed.data", size_threshold_bytes=0)
    graph = folder / "graph.onnx"
    save_optimized((folder / "packed.onnx").read_bytes(), folder, precision, graph)
    ort = import_onnxruntime()
    options = session_options(ort, precision, 1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    result: Floats = session.run(None, {"x": x})[0]
    return result


# Attention: the operator beside plain numpy, whose cache is a list of all positions.


def _attends_right(window: int | None, attribute: int) -> bool:
    run = _attention(attribute)
    if run is None:
        return False
    for past, count in ((0, 1), (0, 6), (7, 1), (7, 3)):
        random = np.random.default_rng(past + count)
        joined = random.standard_normal((past + count, _HEADS + 2 * _KV_HEADS, _WIDTH)).astype(np.float32)
        wanted, keys, values = _attend(joined, window)
        cached = [np.zeros((1, _KV_HEADS, _CAPACITY, _WIDTH), np.float32) for _ in range(2)]
        for buffer, known in zip(cached, (keys, values), strict=True):
            buffer[0, :, :past] = known[:past].transpose(1, 0, 2)
        found = run(joined[past:], cached, past)
        if found is None or not np.allclose(found, wanted[past:], rtol=0, atol=1e-4):
            return False
    return True


def _rotation(count: int) -> tuple[Floats, Floats]:
    angles = np.arange(count, dtype=np.float32)[:, None] / 3 ** np.arange(_WIDTH // 2, dtype=np.float32)
    return np.cos(angles), np.sin(angles)


def _attend(joined: Floats, window: int | None) -> tuple[Floats, Floats, Floats]:
    """Mixed values [n, heads * width], rotated keys and values [n, kv heads, width] of n positions."""
    count = len(joined)
    cos, sin = (part[:, None] for part in _rotation(count))
    first, second = np.split(joined[:, : _HEADS + _KV_HEADS], 2, axis=-1)
    rotated = np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    queries, keys, values = rotated[:, :_HEADS], rotated[:, _HEADS:], joined[:, _HEADS + _KV_HEADS :]
    group = _HEADS // _KV_HEADS
    scores = np.einsum("qhd,khd->hqk", queries, keys.repeat(group, 1)) / np.sqrt(_WIDTH)
    distance = np.arange(count)[:, None] - np.arange(count)
    seen = (distance >= 0) & (distance < (window or count))
    weights = np.where(seen, np.exp(scores), 0)
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("hqk,khd->qhd", weights, values.repeat(group, 1))
    return mixed.reshape(count, -1).astype(np.float32), keys, values


def _attention(window: int) -> Any:
    """run(joined [S, H + 2 Hkv, width], [keys, values], past length) -> [S, H * width]; None if refused."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(
            ir.to_proto(_attention_model(window)).SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
        )
    except Exception:  # ONNX Runtime raises many kinds; whatever it says, it does not take our inputs
        return None
    cos, sin = _rotation(_CAPACITY)

    def run(joined: Floats, cached: list[Floats], past: int) -> Floats | None:
        count = len(joined)
        feeds = {
            "joined": joined.reshape(1, count, -1),
            "past_key": cached[0],
            "past_value": cached[1],
            "past_length": np.array([past + count - 1], np.int32),
            "total_length": np.array(past + count, np.int32),
            "cos": cos,
            "sin": sin,
            "positions": np.arange(past, past + count, dtype=np.int64)[None],
        }
        try:
            mixed: Floats = session.run(["mixed"], feeds)[0][0]
        except Exception:  # likewise
            return None
        return mixed

    return run


def _attention_model(window: int) -> ir.Model:
    float32, int32, int64 = ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.INT64
    cache = [1, _KV_HEADS, _CAPACITY, _WIDTH]
    kinds: dict[str, tuple[list[Any], ir.DataType]] = {
        "joined": ([1, "count", (_HEADS + 2 * _KV_HEADS) * _WIDTH], float32),
        "past_key": (cache, float32),
        "past_value": (cache, float32),
        "past_length": ([1], int32),
        "total_length": ([], int32),
        "cos": ([_CAPACITY, _WIDTH // 2], float32),
        "sin": ([_CAPACITY, _WIDTH // 2], float32),
        "positions": ([1, "count"], int64),
    }
    values = {
        name: ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind))
        for name, (shape, kind) in kinds.items()
    }
    node = attention_node(
        values["joined"],
        [value for name, value in values.items() if name != "joined"],
        heads=_HEADS,
        kv_heads=_KV_HEADS,
        window=window,
        name="attention",
    )
    for output, name in zip(node.outputs, ("mixed", "key", "value"), strict=True):
        output.name = name
        output.type = ir.TensorType(float32)
    graph = ir.Graph(
        list(values.values()), node.outputs, nodes=[node], opset_imports={"": 20, DOMAIN: 1}, name="probe"
    )
    return ir.Model(graph, ir_version=10)


_GROWTH = 3.5
"""Bytes of a form for each byte of portable weights, at most: both layouts of every weight, or float32, and
while a stage is built its weights once more."""
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
    final = engine_path(directory, description)
    weights = {stage: manifest.files[spec.data].bytes for stage, spec in manifest.stages.items()}
    meter = Meter(progress, 2 * sum(weights.values()))
    with new_engine(final, needed=form_bytes(manifest)) as temporary:
        for stage, size in weights.items():
            advance = meter.of(f"{stage} graph")
            advance(0)
            _build_stage(directory, manifest, stage, temporary)
            advance(size)
        _prove(directory, manifest, temporary, meter)
        files = {path.name: file_record(path) for path in sorted(temporary.iterdir())}
        (temporary / ENGINE_NAME).write_text(render_engine(description, files), encoding="ascii")
    return Engine.at(directory, final)


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
        engine_limits(manifest),
        form / SELF_TEST_NAME,
        name=f"ONNX Runtime {import_onnxruntime().__version__}",
        alike=True,
        watch=watch,
    )


@contextmanager
def new_engine(final: Path, needed: int) -> Iterator[Path]:
    """A directory to fill; on success it is at `final`, on any failure what was there is as it was.

    needed: bytes that it may take. Raises WriteError when they are not free, or the disk refuses.
    """
    engines = final.parent
    try:
        engines.mkdir(exist_ok=True)
        with new_directory(final, str(engines), "engine", needed=needed) as directory:
            yield directory
    except (OSError, OutputError) as error:
        reason = str(error) if isinstance(error, OutputError) else f"the engine cannot be written ({error})"
        raise WriteError(f"{engines}: {reason}; check its permissions") from error
    finally:
        with suppress(OSError):
            engines.rmdir()

"""The parts of a bundle's manifest, as data: where it comes from, its dimensions, tables, graphs, files.

The bundle's description, `manifest.json`: typed, checked, and the only place that knows its JSON.

`Manifest.from_dict` trusts nothing: every type, range, file name and cross-reference is checked, and a fault
is a `BundleError` that names the field. What is in the listed files is the business of `integrity`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .errors import BltError, BundleError
from .fields import AGAIN, Fields, fault, file_name, is_whole, read
from .files import open_plain, write_whole
from .hashing import HashSpec
from .names import MANIFEST_NAME, PATCHING_MODES, PRECISIONS, STAGES, TABLE_PRECISIONS
from .patching import PatchingRule

__all__ = [
    "MANIFEST_NAME",
    "SCHEMA",
    "TABLE_BLOCK",
    "Axis",
    "CalibrationSpec",
    "EmbeddingSpec",
    "FileRecord",
    "Manifest",
    "ModelSpec",
    "QuantizationSpec",
    "Source",
    "StageSpec",
    "load_manifest",
    "write_manifest",
]

TABLE_BLOCK = 32
"""Neighbouring values of a row that share a scale in int4 tables."""


@dataclass(frozen=True)
class Source:
    """The checkpoint a bundle was made from."""

    name: str
    """Hub id, folder name or "demo"."""
    layout: str
    """"huggingface" or "meta"."""
    sha256: str
    """The checkpoint's own hash, 64 hexadecimal digits."""
    config: dict[str, Any]
    """The checkpoint's raw configuration."""


@dataclass(frozen=True)
class ModelSpec:
    """Dimensions that belong to no single stage."""

    vocab_size: int
    """Byte ids, 260."""
    width: int
    """Width D of byte embeddings and byte states."""
    cross_attn_k: int
    """Vectors a patch is pooled to."""
    max_positions: int
    """Longest text in ids, BOS included."""
    trained_context: int
    """Ids the model was trained on at once; scoring windows have this length."""
    parameters: dict[str, int]
    """Parameters by stage, and of the embedding as "tables"."""


@dataclass(frozen=True)
class EmbeddingSpec:
    """The file of byte rows and hash rows, in this order, C order, little endian."""

    file: str
    """File name in the bundle."""
    dtype: str
    """One of `TABLE_PRECISIONS`; `table_rows` has the layout of a row in each."""
    width: int
    """Values in a row."""
    byte_rows: int
    """Rows of the byte embedding, 260."""
    group_sizes: tuple[int, ...]
    """Bytes per hash, one table each and per function."""
    functions: int
    """Hash functions."""
    hash_vocab: int
    """Rows of each hash table."""

    @property
    def hash(self) -> HashSpec:
        """How ids become rows of the hash tables."""
        return HashSpec(group_sizes=self.group_sizes, functions=self.functions, vocab=self.hash_vocab)

    @property
    def rows(self) -> int:
        """All rows of the file."""
        return self.byte_rows + len(self.group_sizes) * self.functions * self.hash_vocab

    @property
    def precision(self) -> str:
        """The dtype as a user calls it: "fp16", "fp32", "int8" or "int4"."""
        return TABLE_PRECISIONS[self.dtype]

    @property
    def blocks(self) -> int:
        """Blocks of `TABLE_BLOCK` values in a row, the last one maybe not full."""
        return -(-self.width // TABLE_BLOCK)

    @property
    def row_bytes(self) -> int:
        """Size of a row, its scales included."""
        sizes = {
            "float32": 4 * self.width,
            "float16": 2 * self.width,
            "int8": 4 + self.width,
            "int4": self.blocks * (2 + TABLE_BLOCK // 2),
        }
        return sizes[self.dtype]

    @property
    def bytes(self) -> int:
        """Exact size of the file."""
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class StageSpec:
    """One graph and the shape of the state it needs."""

    file: str
    """The graph's file name in the bundle."""
    data: str
    """The file name of its weights."""
    precision: str
    """"fp32", "fp16", "int8" (weights and activations), "int8w" (weights in blocks) or "int4" (the same)."""
    layers: int
    """Transformer layers, each with a key/value cache."""
    kv_heads: int
    """Key/value heads of a layer."""
    head_dim: int
    """Width of a head."""
    window: int | None
    """Keys a position sees, itself included; None = all."""
    max_positions: int
    """Positions the stage was made for: bytes, or patches in the latent stage."""
    parameters: int
    """Parameters in the graph."""
    patch_values: int | None = None
    """Values per patch that go from the latent stage to the decoder; None in the other two stages."""

    @property
    def fusable(self) -> bool:
        """Whether ONNX Runtime's fused attention takes heads of this width."""
        return self.head_dim % 16 == 0


@dataclass(frozen=True)
class CalibrationSpec:
    """Where the ranges of int8 activations come from."""

    method: str
    """How a range was read from what was seen, such as "minmax" or "mse"."""
    texts: tuple[str, ...]
    """Names of the texts; the package's own begin with "bundled:"."""
    windows: int
    """Windows that were read, each from BOS."""
    window_bytes: int
    """Bytes of a window."""
    seed: int
    """What chose them."""
    smooth: float | None = None
    """Strength with which activations' ranges were moved into weights before; None = not."""


@dataclass(frozen=True)
class QuantizationSpec:
    """How the integers in the graphs were found."""

    search: str
    """How weight scales were found: "mse" or "rtn"."""
    block_size: int
    """Inputs that share a weight scale in int8w and int4 stages."""
    calibration: CalibrationSpec | None
    """None when no stage has int8 activations."""


@dataclass(frozen=True)
class Axis:
    """Sizes of one dynamic axis of the graphs."""

    min: int
    """Smallest."""
    opt: int
    """The one to tune for."""
    max: int
    """Largest; beyond it a call is refused."""


@dataclass(frozen=True)
class FileRecord:
    """What a file of the bundle must be."""

    bytes: int
    """Exact size."""
    sha256: str
    """Hash of everything in it."""
    sample_sha256: str
    """Hash of 64 evenly spaced blocks (see `integrity.sample_hash`)."""


SCHEMA = 1
AXES = ("batch", "bytes", "patches")
LAYOUTS = ("huggingface", "meta")
SEARCHES = ("mse", "rtn")

_VOCAB_SIZE = 260
_WIDTH = 1_000_000
_POSITIONS = 2**31 - 1
_COUNT = 2**63 - 1
_MAX_MANIFEST_BYTES = 16 << 20
_NO_BUNDLE = "give the directory of a bundle that `blt-edge export` wrote"
_AXIS_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


@dataclass(frozen=True)
class Manifest:
    """Everything the runtime knows about a bundle before it opens a graph."""

    generator: str
    """Version of blt-edge that wrote the bundle."""
    source: Source
    """Where the weights come from."""
    model: ModelSpec
    """Dimensions."""
    patching: PatchingRule
    """Where patches begin."""
    embedding: EmbeddingSpec
    """The byte and hash tables."""
    stages: dict[str, StageSpec]
    """The graphs, in the order of `STAGES`; no "patcher" where the model has none."""
    axes: dict[str, Axis]
    """Dynamic axes: at least batch, bytes and patches."""
    validation: dict[str, Any] | None
    """The last validation's report; None = never validated."""
    files: dict[str, FileRecord]
    """Every file of the bundle but the manifest."""
    schema: int = SCHEMA
    """Version of this description's layout."""
    quantization: QuantizationSpec | None = None
    """How integers were found; None when no stage has any."""

    @classmethod
    def from_dict(cls, data: object) -> Manifest:
        """Check a parsed `manifest.json`, without its checksum. Raises BundleError naming a fault."""
        _check_schema(data)
        manifest = read(data, "", _manifest)
        _check_references(manifest)
        return manifest

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, ready for `json.dumps`; `from_dict` gives an equal manifest back."""
        # A folder's name may hold what a terminal would obey; the name is for people only.
        name = "".join(letter if letter.isprintable() else "?" for letter in self.source.name) or "?"
        quantization = {} if self.quantization is None else {"quantization": asdict(self.quantization)}
        return {
            "schema": self.schema,
            "blt_edge": self.generator,
            "source": {**asdict(self.source), "name": name, "config": _plain(self.source.config)},
            "model": asdict(self.model),
            "patching": asdict(self.patching),
            "embedding": {**asdict(self.embedding), "group_sizes": list(self.embedding.group_sizes)},
            "stages": {name: _stage_dict(self.stages[name]) for name in STAGES if name in self.stages},
            "axes": {name: asdict(axis) for name, axis in self.axes.items()},
            **_plain(quantization),
            "validation": _plain(self.validation),
            "files": {name: asdict(self.files[name]) for name in sorted(self.files)},
        }

    def with_validation(self, report: Mapping[str, Any] | None) -> Manifest:
        """The same bundle with another validation report (plain values; nan and inf become strings)."""
        return replace(self, validation=_plain(report))

    @property
    def total_bytes(self) -> int:
        """Size of all files but the manifest."""
        return sum(record.bytes for record in self.files.values())

    def stage_bytes(self, stage: str) -> int:
        """Size of a stage's graph and weights."""
        spec = self.stages[stage]
        return self.files[spec.file].bytes + self.files[spec.data].bytes

    def with_files(self, files: Mapping[str, FileRecord]) -> Manifest:
        """The same description with the files' final sizes and hashes."""
        return replace(self, files=dict(files))


def load_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Read and check `manifest.json` of a bundle; no other file is touched.

    Raises BundleError when the directory is no bundle, or the manifest is a link, damaged, changed in any
    byte since it was written, from a newer schema, or says something impossible.
    """
    payload = _parse(_read_text(Path(directory)))
    _check_schema(payload)
    checksum = payload.pop("checksum", None)
    if checksum != _checksum(payload):
        raise BundleError(f"{MANIFEST_NAME} was changed after it was written (its checksum differs); {AGAIN}")
    return Manifest.from_dict(payload)


def write_manifest(directory: str | os.PathLike[str], manifest: Manifest) -> None:
    """Write `manifest.json` so that a reader sees the old one or the new one, never a part.

    Raises BundleError when the manifest would not be readable again, OSError when it cannot be written; the
    old file is then as it was.
    """
    payload = manifest.to_dict()
    Manifest.from_dict(payload)
    text = _render({**payload, "checksum": _checksum(payload)})
    write_whole(
        Path(directory) / MANIFEST_NAME,
        lambda path: path.write_text(text, encoding="ascii", newline="\n"),
        lasting=True,
    )


# 1. The text: read with suspicion, rendered in exactly one way.


def _read_text(directory: Path) -> str:
    if not directory.is_dir():
        reason = "is not a directory" if os.path.lexists(directory) else "does not exist"
        raise BundleError(f"{directory} {reason}; {_NO_BUNDLE}")
    path = directory / MANIFEST_NAME
    if not os.path.lexists(path):
        raise BundleError(f"{directory} has no {MANIFEST_NAME}; {_NO_BUNDLE}")
    with open_plain(path) as file:
        data = file.read(_MAX_MANIFEST_BYTES + 1)
    if len(data) > _MAX_MANIFEST_BYTES:
        raise BundleError(f"{path} has more than {_MAX_MANIFEST_BYTES} bytes, the most allowed; {AGAIN}")
    try:
        return data.decode("ascii")
    except UnicodeDecodeError:
        raise BundleError(f"{MANIFEST_NAME} is damaged (bytes that are not ASCII); {AGAIN}") from None


def _parse(text: str) -> dict[str, Any]:
    try:
        payload = json.loads(text)
        if not isinstance(payload, dict):
            raise fault("", payload, "an object")
        _check_schema(payload)
        same = _render(payload) == text
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise BundleError(f"{MANIFEST_NAME} is damaged ({reason}); {AGAIN}") from None
    # Spaces and doubled keys carry no meaning the checksum could see, yet every changed byte must show.
    if not same:
        raise BundleError(f"{MANIFEST_NAME} was changed after it was written (its layout differs); {AGAIN}")
    return payload


def _render(payload: Mapping[str, Any]) -> str:
    return json.dumps(payload, indent=1, allow_nan=False) + "\n"


def _checksum(payload: Mapping[str, Any]) -> str:
    canonical = json.dumps(payload, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        return _plain(value.item())
    # JSON has no word for these, and a failed validation must be recordable.
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


# 2. The schema: one reader for each object.


def _check_schema(data: object) -> None:
    schema = data.get("schema") if isinstance(data, dict) else None
    if isinstance(data, dict) and is_whole(schema, SCHEMA + 1, _POSITIONS):
        version = data.get("blt_edge")
        by = f" (written by blt-edge {version[:40]!r})" if isinstance(version, str) else ""
        raise BundleError(
            f"{MANIFEST_NAME}: schema {schema}{by} is newer than {SCHEMA}, the newest this version reads; "
            "upgrade blt-edge"
        )


def _manifest(fields: Fields) -> Manifest:
    return Manifest(
        schema=fields.whole("schema", SCHEMA, SCHEMA),
        generator=fields.text("blt_edge"),
        source=fields.part("source", _source),
        model=fields.part("model", _model),
        patching=fields.part("patching", _patching),
        embedding=fields.part("embedding", _embedding),
        stages=fields.parts("stages", _stage_name, _stage),
        axes=fields.parts("axes", _axis_name, _axis),
        quantization=fields.part("quantization", _quantization) if "quantization" in fields else None,
        validation=fields.tree_or_none("validation"),
        files=fields.parts("files", file_name, _file),
    )


def _source(fields: Fields) -> Source:
    return Source(
        name=fields.text("name"),
        layout=fields.choice("layout", LAYOUTS),
        sha256=fields.digest("sha256"),
        config=fields.tree("config"),
    )


def _model(fields: Fields) -> ModelSpec:
    return ModelSpec(
        vocab_size=fields.whole("vocab_size", _VOCAB_SIZE, _VOCAB_SIZE),
        width=fields.whole("width", 1, _WIDTH),
        cross_attn_k=fields.whole("cross_attn_k", 1, 1000),
        max_positions=fields.whole("max_positions", 1, _POSITIONS),
        trained_context=fields.whole("trained_context", 1, _POSITIONS),
        parameters=fields.part("parameters", _parameters),
    )


def _parameters(fields: Fields) -> dict[str, int]:
    return {name: fields.whole(name, 0, _COUNT) for name in (*STAGES, "tables") if name in fields}


def _patching(fields: Fields) -> PatchingRule:
    values: dict[str, Any] = {
        "mode": fields.choice("mode", PATCHING_MODES),
        "threshold": fields.number_or_none("threshold"),
        "threshold_add": fields.number_or_none("threshold_add"),
        "monotonic": fields.flag("monotonic"),
        "max_patch_length": fields.whole_or_none("max_patch_length", 1, _POSITIONS),
        "patch_size": fields.whole_or_none("patch_size", 1, _POSITIONS),
    }
    try:
        return PatchingRule(**values)
    except (BltError, ValueError) as error:
        raise BundleError(f"{MANIFEST_NAME}: patching: {error}; {AGAIN}") from None


def _embedding(fields: Fields) -> EmbeddingSpec:
    spec = EmbeddingSpec(
        file=fields.file_name("file"),
        dtype=fields.choice("dtype", tuple(TABLE_PRECISIONS)),
        width=fields.whole("width", 1, _WIDTH),
        byte_rows=fields.whole("byte_rows", _VOCAB_SIZE, _VOCAB_SIZE),
        group_sizes=fields.wholes("group_sizes", 1, 1000, most=100),
        functions=fields.whole("functions", 0, 1000),
        hash_vocab=fields.whole("hash_vocab", 1, _POSITIONS),
    )
    try:
        _ = spec.hash
    except (BltError, ValueError) as error:
        raise BundleError(f"{MANIFEST_NAME}: embedding: {error}; {AGAIN}") from None
    return spec


def _stage(fields: Fields) -> StageSpec:
    return StageSpec(
        file=fields.file_name("file"),
        data=fields.file_name("data"),
        precision=fields.choice("precision", PRECISIONS),
        layers=fields.whole("layers", 1, 1000),
        kv_heads=fields.whole("kv_heads", 1, 10_000),
        head_dim=fields.whole("head_dim", 1, _WIDTH),
        window=fields.whole_or_none("window", 1, _POSITIONS),
        max_positions=fields.whole("max_positions", 1, _POSITIONS),
        parameters=fields.whole("parameters", 0, _COUNT),
        patch_values=fields.whole_or_none("patch_values", 1, _COUNT) if "patch_values" in fields else None,
    )


def _quantization(fields: Fields) -> QuantizationSpec:
    return QuantizationSpec(
        search=fields.choice("search", SEARCHES),
        block_size=fields.whole("block_size", 1, _WIDTH),
        calibration=fields.part_or_none("calibration", _calibration),
    )


def _calibration(fields: Fields) -> CalibrationSpec:
    return CalibrationSpec(
        method=fields.text("method"),
        texts=fields.texts("texts", most=10_000),
        windows=fields.whole("windows", 1, _COUNT),
        window_bytes=fields.whole("window_bytes", 1, _COUNT),
        seed=fields.whole("seed", 0, _COUNT),
        smooth=fields.number_or_none("smooth"),
    )


def _axis(fields: Fields) -> Axis:
    low = fields.whole("min", 0, _POSITIONS)
    opt = fields.whole("opt", low, _POSITIONS)
    return Axis(min=low, opt=opt, max=fields.whole("max", opt, _POSITIONS))


def _file(fields: Fields) -> FileRecord:
    return FileRecord(
        bytes=fields.whole("bytes", 0, _COUNT),
        sha256=fields.digest("sha256"),
        sample_sha256=fields.digest("sample_sha256"),
    )


def _stage_name(value: object, where: str) -> str:
    if not isinstance(value, str) or value not in STAGES:
        raise fault(where, value, f"one of {', '.join(STAGES)}")
    return value


def _axis_name(value: object, where: str) -> str:
    if not isinstance(value, str) or not _AXIS_NAME.fullmatch(value):
        raise fault(where, value, "an axis name of small letters, digits and '_'")
    return value


def _stage_dict(stage: StageSpec) -> dict[str, Any]:
    values = asdict(stage)
    if stage.patch_values is None:
        del values["patch_values"]
    return values


# 3. What the parts must say about each other.


def _check_references(manifest: Manifest) -> None:
    stages, embedding = manifest.stages, manifest.embedding
    for name in STAGES:
        needed = name != "patcher" or manifest.patching.needs_entropy
        if needed and name not in stages:
            raise BundleError(f"{MANIFEST_NAME}: stages.{name} is missing, this patching needs it; {AGAIN}")
    for axis in AXES:
        if axis not in manifest.axes:
            raise BundleError(f"{MANIFEST_NAME}: axes.{axis} is missing; {AGAIN}")
    for name, stage in stages.items():
        _check_file(manifest, stage.file, f"stages.{name}.file")
        _check_file(manifest, stage.data, f"stages.{name}.data")
        if (stage.patch_values is not None) != (name in ("latent", "decoder")):
            raise fault(f"stages.{name}.patch_values", stage.patch_values, "one in latent and decoder only")
    if stages["latent"].patch_values != stages["decoder"].patch_values:
        raise fault(
            "stages.decoder.patch_values",
            stages["decoder"].patch_values,
            "the same value as in the latent stage",
        )
    if stages["latent"].window is not None:
        raise fault("stages.latent.window", stages["latent"].window, "null")
    positions = min(stages["encoder"].max_positions, stages["decoder"].max_positions)
    if manifest.model.max_positions > positions:
        raise fault("model.max_positions", manifest.model.max_positions, f"at most the stages' {positions}")
    if embedding.width != manifest.model.width:
        raise fault("embedding.width", embedding.width, f"the model's width {manifest.model.width}")
    size = _check_file(manifest, embedding.file, "embedding.file").bytes
    if size != embedding.bytes:
        raise fault(f"files.{embedding.file}.bytes", size, f"{embedding.bytes} for tables of this shape")


def _check_file(manifest: Manifest, name: str, where: str) -> FileRecord:
    if name not in manifest.files:
        raise fault(where, name, "a file of the list under files")
    return manifest.files[name]

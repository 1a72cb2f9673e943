"""A bundle's description, `manifest.json`: typed, checked, and the only place that knows its JSON.

Every part is a dataclass whose annotations say how a field is read; what is written are the same fields.
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
from typing import Annotated, Any

from .chat_spec import ChatSpec
from .embedding_spec import EmbeddingSpec
from .errors import BundleError, OptionError
from .fields import (
    AGAIN,
    Fields,
    by,
    fault,
    file_name,
    if_there,
    is_whole,
    parse_json,
    plain_text,
    read,
    record,
)
from .files import read_plain, write_whole
from .generation_spec import GenerationSpec
from .names import (
    CHAT_TEMPLATE_NAME,
    MANIFEST_NAME,
    MOST_ROWS,
    PATCHING_MODES,
    PRECISIONS,
    STAGES,
    packed_graph_file,
)
from .patching import PatchingRule
from .quantization_spec import QuantizationSpec
from .validation import ValidationRecord, read_records, with_record
from .vocabulary import VOCAB_SIZE

__all__ = [
    "SCHEMA",
    "Axis",
    "FileRecord",
    "Manifest",
    "ModelSpec",
    "Source",
    "StageSpec",
    "load_manifest",
    "write_manifest",
]

SCHEMA = 1

_POSITIONS = 2**31 - 1
_COUNT = 2**63 - 1
_NO_BUNDLE = "give the directory of a bundle that `blt-edge export` wrote"
_NO_WISHES = GenerationSpec()
_AXIS_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")

# 1. How fields are read.

_Text = Annotated[str, Fields.text]
_FileName = Annotated[str, Fields.file_name]
_Digest = Annotated[str, Fields.digest]
_VocabSize = Annotated[int, by(Fields.whole, VOCAB_SIZE, VOCAB_SIZE)]
_Width = Annotated[int, by(Fields.whole, 1, 1_000_000)]
_Positions = Annotated[int, by(Fields.whole, 1, _POSITIONS)]
_Size = Annotated[int, by(Fields.whole, 0, _POSITIONS)]
_Count = Annotated[int, by(Fields.whole, 0, _COUNT)]
_Positive = Annotated[int, by(Fields.whole, 1, _COUNT)]


def _stage_name(value: object, where: str) -> str:
    if not isinstance(value, str) or value not in STAGES:
        raise fault(where, value, f"one of {', '.join(STAGES)}")
    return value


def _axis_name(value: object, where: str) -> str:
    if not isinstance(value, str) or not _AXIS_NAME.fullmatch(value):
        raise fault(where, value, "an axis name of small letters, digits and '_'")
    return value


def _generator(fields: Fields, _: str) -> str:
    return fields.text("blt_edge")


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
    except OptionError as error:
        raise BundleError(f"{MANIFEST_NAME}: patching: {error}; {AGAIN}") from None


def _generation(fields: Fields, key: str) -> GenerationSpec:
    return fields.part(key, record(GenerationSpec)) if key in fields else _NO_WISHES


def _rows(fields: Fields, key: str) -> tuple[int, ...]:
    return fields.wholes(key, 2, MOST_ROWS, MOST_ROWS, default=())


# 2. The parts.


@dataclass(frozen=True)
class Source:
    """The checkpoint a bundle was made from."""

    name: _Text
    """Hub id, folder name or "demo"."""
    layout: Annotated[str, by(Fields.choice, ("huggingface", "meta"))]
    sha256: _Digest
    """The checkpoint's own hash, 64 hexadecimal digits."""
    config: Annotated[dict[str, Any], Fields.tree]
    """The checkpoint's raw configuration."""


@dataclass(frozen=True)
class ModelSpec:
    """Dimensions that belong to no single stage."""

    vocab_size: _VocabSize
    """Byte ids, 260."""
    width: _Width
    """Width D of byte embeddings and byte states."""
    cross_attn_k: Annotated[int, by(Fields.whole, 1, 1000)]
    """Vectors a patch is pooled to."""
    max_positions: _Positions
    """Longest text in ids, BOS included."""
    trained_context: _Positions
    """Ids the model was trained on at once; scoring windows have this length."""
    parameters: Annotated[dict[str, int], by(Fields.part, _parameters)]
    """Parameters by stage, and of the embedding as "tables"."""


@dataclass(frozen=True)
class StageSpec:
    """One graph and the shape of the state it needs."""

    file: _FileName
    """The graph's file name in the bundle."""
    data: _FileName
    """The file name of its weights."""
    precision: Annotated[str, by(Fields.choice, PRECISIONS)]
    """"fp32", "fp16", "int8" (weights and activations), "int8w" (weights in blocks) or "int4" (the same)."""
    layers: Annotated[int, by(Fields.whole, 1, 1000)]
    """Transformer layers, each with a key/value cache."""
    kv_heads: Annotated[int, by(Fields.whole, 1, 10_000)]
    """Key/value heads of a layer."""
    head_dim: _Width
    window: Annotated[int | None, by(Fields.whole_or_none, 1, _POSITIONS)]
    """Keys a position sees, itself included; None = all."""
    max_positions: _Positions
    """Positions the stage was made for: bytes, or patches in the latent stage."""
    parameters: _Count
    patch_values: Annotated[int | None, if_there(by(Fields.whole_or_none, 1, _COUNT))] = None
    """Values per patch that go from the latent stage to the decoder; None in the other two stages."""

    @property
    def fusable(self) -> bool:
        """Whether ONNX Runtime's fused attention takes heads of this width."""
        return self.head_dim % 16 == 0


@dataclass(frozen=True)
class Axis:
    """Sizes of one dynamic axis: the smallest, the one to tune for, and the largest that is not refused."""

    min: _Size
    opt: _Size
    max: _Size


@dataclass(frozen=True)
class FileRecord:
    """What a file of the bundle must be."""

    bytes: _Count
    sha256: _Digest
    """Hash of everything in it."""
    sample_sha256: _Digest
    """Hash of 64 evenly spaced blocks (see `integrity.file_record`)."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything the runtime knows about a bundle before it opens a graph. Fields are in the JSON's order."""

    schema: Annotated[int, by(Fields.whole, SCHEMA, SCHEMA)] = SCHEMA
    """Version of this description's layout."""
    generator: Annotated[str, _generator]
    """Version of blt-edge that wrote the bundle; "blt_edge" in the JSON."""
    source: Source
    """Where the weights come from."""
    model: ModelSpec
    patching: Annotated[PatchingRule, by(Fields.part, _patching)]
    """Where patches begin."""
    embedding: EmbeddingSpec
    """The byte and hash tables."""
    stages: Annotated[dict[str, StageSpec], by(Fields.parts, _stage_name, record(StageSpec))]
    """The graphs, in the order of `STAGES`; no "patcher" where the model has none."""
    rows: Annotated[tuple[int, ...], _rows] = ()
    """For how many texts at once there are packed graphs of every stage, ascending; left out where there are
    none."""
    axes: Annotated[dict[str, Axis], by(Fields.parts, _axis_name, record(Axis))]
    """Dynamic axes: at least batch, bytes and patches."""
    quantization: Annotated[QuantizationSpec | None, if_there(by(Fields.part, record(QuantizationSpec)))] = (
        None
    )
    """How integers were found; None when no stage has any."""
    generation: Annotated[GenerationSpec, _generation] = _NO_WISHES
    """Which ids end a text, and defaults of sampling; left out where the model names none."""
    chat: Annotated[ChatSpec | None, if_there(by(Fields.part, record(ChatSpec)))] = None
    """Of its chat template; None where it has none."""
    validation: Annotated[tuple[ValidationRecord, ...], read_records] = ()
    """The last validation on each family of kernels, the newest last; null in the JSON = never validated."""
    files: Annotated[dict[str, FileRecord], by(Fields.parts, file_name, record(FileRecord))]
    """Every file of the bundle but the manifest."""

    @classmethod
    def from_dict(cls, data: object) -> Manifest:
        """Check a parsed `manifest.json`, without its checksum. Raises BundleError naming a fault."""
        _check_schema(data)
        manifest = read(data, "", record(cls))
        _check_references(manifest)
        return manifest

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, ready for `json.dumps`; `from_dict` gives an equal manifest back."""
        data: dict[str, Any] = _plain(asdict(self))
        # A folder's name may hold what a terminal would obey; the name is for people only.
        data["source"]["name"] = plain_text(self.source.name)
        data["stages"] = {stage: data["stages"][stage] for stage in STAGES if stage in self.stages}
        data["files"] = dict(sorted(data["files"].items()))
        data["validation"] = data["validation"] or None
        absent = ((data, name) for name in ("quantization", "chat"))
        optional = [*absent, *((stage, "patch_values") for stage in data["stages"].values())]
        if self.quantization is not None:
            optional += [(data["quantization"], key) for key in ("block_sizes", "mix")]
        for fields, key in optional:
            if fields[key] is None:
                del fields[key]
        if not self.rows:
            del data["rows"]
        if self.generation == _NO_WISHES:
            del data["generation"]
        return {"blt_edge" if key == "generator" else key: value for key, value in data.items()}

    def with_validation(self, new: ValidationRecord) -> Manifest:
        """The same bundle with a record in the place of its family's (plain values; nan and inf become
        strings)."""
        plain = replace(new, report=_plain(new.report))
        return replace(self, validation=with_record(self.validation, plain))

    def validated_on(self, kernels: str | None) -> ValidationRecord | None:
        """The record of a family of kernels, None being the one without a name; None = there is none."""
        return next((one for one in self.validation if one.kernels == kernels), None)

    @property
    def fingerprint(self) -> str:
        """sha256 of what decides the numbers that this bundle computes: shapes, and every file's contents.

        Where patches begin, how the model is sampled, how it was validated, for how many texts at once it has
        graphs and how it chats are no part of it.
        """
        data = self.to_dict()
        parts = {name: data[name] for name in ("model", "embedding", "stages")}
        others = {*self.packed_files, *[CHAT_TEMPLATE_NAME] * (self.chat is not None)}
        parts["files"] = {name: file.sha256 for name, file in self.files.items() if name not in others}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def packed_files(self) -> tuple[str, ...]:
        """Names of all packed graphs."""
        return tuple(packed_graph_file(stage, rows) for stage in self.stages for rows in self.rows)

    @property
    def total_bytes(self) -> int:
        """Size of all files but the manifest."""
        return sum(record.bytes for record in self.files.values())

    def stage_bytes(self, stage: str) -> int:
        """Size of a stage's graph and weights."""
        spec = self.stages[stage]
        return self.files[spec.file].bytes + self.files[spec.data].bytes

    def precisions_of(self, stage: str) -> tuple[str, ...]:
        """What a stage's matrices are in: its precision, or int4 and int8w in a patcher that has both."""
        mix = self.quantization.mix if self.quantization and stage == "patcher" else None
        return ("int4", "int8w") if mix and mix.int4 and mix.int8w else (self.stages[stage].precision,)

    def with_files(self, files: Mapping[str, FileRecord]) -> Manifest:
        """The same description with the files' final sizes and hashes."""
        return replace(self, files=dict(files))


def _plain(value: Any) -> Any:
    """Numbers, texts, lists and objects as JSON has them."""
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


# 3. What the parts must say about each other.


def _check_schema(data: object) -> None:
    if isinstance(data, dict) and is_whole(data.get("schema"), SCHEMA + 1, _POSITIONS):
        schema, version = data["schema"], data.get("blt_edge")
        writer = f" (written by blt-edge {version[:40]!r})" if isinstance(version, str) else ""
        raise BundleError(
            f"{MANIFEST_NAME}: schema {schema}{writer} is newer than {SCHEMA}, the newest this version "
            "reads; upgrade blt-edge"
        )


def _check_references(manifest: Manifest) -> None:
    stages, embedding, model = manifest.stages, manifest.embedding, manifest.model
    for name in STAGES:
        needed = name != "patcher" or manifest.patching.needs_entropy
        if needed and name not in stages:
            raise BundleError(f"{MANIFEST_NAME}: stages.{name} is missing, this patching needs it; {AGAIN}")
    for name in ("batch", "bytes", "patches"):
        if name not in manifest.axes:
            raise BundleError(f"{MANIFEST_NAME}: axes.{name} is missing; {AGAIN}")
    for name, axis in manifest.axes.items():
        for bound, low, value in (("opt", axis.min, axis.opt), ("max", axis.opt, axis.max)):
            if value < low:
                raise fault(f"axes.{name}.{bound}", value, f"a whole number from {low} to {_POSITIONS}")
    for name, stage in stages.items():
        _check_listed(manifest, stage.file, f"stages.{name}.file")
        _check_listed(manifest, stage.data, f"stages.{name}.data")
        if (stage.patch_values is not None) != (name in ("latent", "decoder")):
            raise fault(f"stages.{name}.patch_values", stage.patch_values, "one in latent and decoder only")
    if list(manifest.rows) != sorted(set(manifest.rows)):
        raise fault("rows", list(manifest.rows), "a list of numbers that ascend")
    for name in manifest.packed_files:
        _check_listed(manifest, name, "rows")
    if manifest.chat is not None:
        _check_listed(manifest, CHAT_TEMPLATE_NAME, "chat")
    _check_mix(manifest)
    latent, decoder = stages["latent"], stages["decoder"]
    if latent.patch_values != decoder.patch_values:
        needed_values = "the same value as in the latent stage"
        raise fault("stages.decoder.patch_values", decoder.patch_values, needed_values)
    if latent.window is not None:
        raise fault("stages.latent.window", latent.window, "null")
    positions = min(stages["encoder"].max_positions, decoder.max_positions)
    if model.max_positions > positions:
        raise fault("model.max_positions", model.max_positions, f"at most the stages' {positions}")
    try:
        _ = embedding.hash
    except OptionError as error:
        raise BundleError(f"{MANIFEST_NAME}: embedding: {error}; {AGAIN}") from None
    if embedding.width != model.width:
        raise fault("embedding.width", embedding.width, f"the model's width {model.width}")
    _check_listed(manifest, embedding.file, "embedding.file")
    size = manifest.files[embedding.file].bytes
    if size != embedding.bytes:
        raise fault(f"files.{embedding.file}.bytes", size, f"{embedding.bytes} for tables of this shape")


def _check_mix(manifest: Manifest) -> None:
    mix, patcher = manifest.quantization and manifest.quantization.mix, manifest.stages.get("patcher")
    if mix:
        precision = "int4" if mix.int4 else "int8w"
        if patcher is None or patcher.precision != precision:
            raise fault("quantization.mix.int4", list(mix.int4), f"a patcher in {precision} for it")


def _check_listed(manifest: Manifest, name: str, where: str) -> None:
    if name not in manifest.files:
        raise fault(where, name, "a file of the list under files")


# 4. The file: read with suspicion, rendered in exactly one way.


def load_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Read and check `manifest.json` of a bundle; no other file is touched.

    Raises BundleError when the directory is no bundle, or the manifest is a link, damaged, changed in any
    byte since it was written, from a newer schema, or says something impossible.
    """
    text = _read_text(Path(directory))
    try:
        payload = parse_json(text)
        _check_schema(payload)
        same = _render(payload) == text
    except ValueError as error:
        raise BundleError(f"{MANIFEST_NAME} is damaged ({error}); {AGAIN}") from None
    if not isinstance(payload, dict):
        raise fault("", payload, "an object")
    # Spaces and doubled keys carry no meaning the checksum could see, yet every changed byte must show.
    if not same:
        raise BundleError(f"{MANIFEST_NAME} was changed after it was written (its layout differs); {AGAIN}")
    if payload.pop("checksum", None) != _checksum(payload):
        raise BundleError(f"{MANIFEST_NAME} was changed after it was written (its checksum differs); {AGAIN}")
    return Manifest.from_dict(payload)


def _read_text(directory: Path) -> str:
    path = directory / MANIFEST_NAME
    if not directory.is_dir():
        reason = "is not a directory" if os.path.lexists(directory) else "does not exist"
        raise BundleError(f"{directory} {reason}; {_NO_BUNDLE}")
    if not os.path.lexists(path):
        raise BundleError(f"{directory} has no {MANIFEST_NAME}; {_NO_BUNDLE}")
    try:
        return read_plain(path).decode("ascii")
    except UnicodeDecodeError:
        raise BundleError(f"{MANIFEST_NAME} is damaged (bytes that are not ASCII); {AGAIN}") from None


def write_manifest(directory: str | os.PathLike[str], manifest: Manifest) -> None:
    """Write `manifest.json` so that a reader sees the old one or the new one, never a part.

    Raises BundleError when the manifest would not be readable again, OSError when it cannot be written; the
    old file is then as it was.
    """
    payload = manifest.to_dict()
    Manifest.from_dict(payload)
    text = _render({**payload, "checksum": _checksum(payload)})
    try:
        parse_json(text)
    except ValueError as error:
        raise BundleError(
            f"{MANIFEST_NAME} would not be readable ({error}); simplify the checkpoint's config"
        ) from None
    write_whole(
        Path(directory) / MANIFEST_NAME,
        lambda path: path.write_text(text, encoding="ascii", newline="\n"),
        lasting=True,
    )


def _render(payload: object) -> str:
    return json.dumps(payload, indent=1, allow_nan=False) + "\n"


def _checksum(payload: Mapping[str, Any]) -> str:
    canonical = json.dumps(payload, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()

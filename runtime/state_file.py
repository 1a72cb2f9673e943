"""A text's state as a file: written whole or not at all, read by the same bundle, believed in nothing.

    offset  bytes
    0       16      "blt-edge state\r\n"
    16      4       version of this format, 2
    20      4       N, bytes of the header
    24      N       the header, JSON: what the file is, and where each array begins and ends
    24 + N          the arrays, one after the other, in the order of `ARRAYS`
    last    32      the seal: sha256 of all before the arrays and of each piece's sha256 (`state_pieces`)

All little endian. Arrays hold what is needed to go on and to roll back as far as the limits said, and nothing
else: no capacity, no engine's layout, no pickle. So a state goes from one engine of a bundle to another; the
numbers in it are then those of the first. docs/state.md has the format in full.

A reader checks sizes before it allocates, the seal before a text goes on, and values against each other even
if that is right, since whoever changes a file can compute it. What it can't find is a file whose numbers
somebody made up: a state is to be trusted as the bundle is.
What this does not know: how texts are read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from .errors import BltError, OptionError, StateError, engine_error
from .fields import Fields, parse_json, plain_text, shown
from .files import WriteError, clear_abandoned, open_plain, write_whole
from .manifest import Manifest
from .names import STAGES
from .patching import PatchingRule
from .state import TextState
from .state_pieces import AGAIN, SEAL, ArrayReader, ArrayWriter, read_exactly
from .vocabulary import VOCAB_SIZE, decode

__all__ = ["ARRAYS", "FORMAT", "StateDescription", "describe", "read_state", "write_state"]

Array = npt.NDArray[Any]

FORMAT = 2
"""Version of the format that is written, the newest that is read."""

ARRAYS = ("ids", "entropies", "starts", *STAGES, "patch_values", "byte_states", "logits")
"""What a file may hold, in this order; no entropies and no patcher where patches need none."""

_MAGIC = b"blt-edge state\r\n"
_MOST_HEADER = 1 << 16
_MOST = 2**31 - 1
_MOST_NAME = 200  # letters of what is for people
_SHOWN = 64  # ids of either end of the text that a description has
_DTYPES: dict[str, np.dtype[Any]] = {"ids": np.dtype("<u2"), "starts": np.dtype("<u4")}
_FLOAT = np.dtype("<f4")


# 1. What a file is.


@dataclass(frozen=True)
class _Part:
    """An array of the file."""

    first: int
    """Number of the position or patch that its first row (of keys and values: slot) is of."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StateDescription:
    """What a state file says of itself."""

    bundle: str
    """`Manifest.fingerprint` of the bundle that it belongs to."""
    model: str
    """What people call that bundle's checkpoint."""
    engine: str
    """What the bundle ran from and on."""
    made: datetime
    """When, in UTC."""
    patching: str
    """The rule that its patches follow."""
    length: int
    """Ids of the text, BOS included."""
    patches: int
    """Patches of them, the open one included."""
    text_sha256: str
    """sha256 of the ids, 16 bits each."""
    beginning: bytes
    """The text's first bytes, up to 64 ids; special ids are left out."""
    end: bytes
    """Its last bytes, likewise."""
    bytes: int
    """Size of the file."""


@dataclass(frozen=True)
class _Header:
    """The file's header, and what follows from it."""

    described: dict[str, Any]
    """Fields of `StateDescription` but patches, the ends of the text and the size."""
    parts: dict[str, _Part]

    def to_json(self) -> bytes:
        made = self.described["made"].isoformat(timespec="seconds")
        arrays = {name: [part.first, *part.shape] for name, part in self.parts.items()}
        return json.dumps({**self.described, "made": made, **arrays}, indent=1).encode("ascii")

    @property
    def array_bytes(self) -> int:
        return sum(math.prod(part.shape) * _dtype(name).itemsize for name, part in self.parts.items())


def _dtype(name: str) -> np.dtype[Any]:
    return _DTYPES.get(name, _FLOAT)


class _HeaderFields(Fields):
    def refusal(self, path: str, value: object, needed: str) -> BltError:
        return StateError(f"its header's {path}: got {shown(value)}, {needed} is needed; {AGAIN}")

    def missing(self, path: str) -> BltError:
        return StateError(f"its header has no {path}; {AGAIN}")

    def refuse_rest(self) -> None:
        for key in self._unread:
            raise StateError(f"its header has a field {shown(key)}, which no state has; {AGAIN}")


def _header(data: bytes) -> _Header:
    try:
        fields = _HeaderFields(parse_json(data))
    except ValueError as error:
        raise StateError(f"its header is damaged ({error}); {AGAIN}") from None
    described: dict[str, Any] = {
        "bundle": fields.digest("bundle"),
        "model": fields.text("model"),
        "engine": fields.text("engine"),
        "made": _moment(fields.text("made")),
        "patching": fields.text("patching"),
        "length": fields.whole("length", 1, _MOST),
        "text_sha256": fields.digest("text_sha256"),
    }
    parts = {}
    for name in ARRAYS:
        if name in fields:
            first, *shape = fields.wholes(name, 0, _MOST, 5) or [0]
            parts[name] = _Part(first, tuple(shape))
    fields.refuse_rest()
    length, none = described["length"], _Part(0, ())
    if parts.get("ids") != _Part(0, (length,)):
        raise StateError(f"its header gives {length} ids and an array of others; {AGAIN}")
    if len(parts.get("starts", none).shape) != 1:
        raise StateError(f"its header has no list of patches; {AGAIN}")
    return _Header(described, parts)


def _moment(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text).astimezone(timezone.utc)
    except (ValueError, OverflowError):
        raise StateError(f"its header's made: got {shown(text)}, a time is needed; {AGAIN}") from None


def _told(rule: PatchingRule) -> str:
    """A patching rule on one line, equal for equal rules."""
    return ", ".join(f"{name} {value}" for name, value in asdict(rule).items() if value not in (None, False))


# 2. Writing.


def write_state(path: str | os.PathLike[str], state: TextState, manifest: Manifest, engine: str) -> None:
    """Write the state of a text as a file at `path`, whole or not at all; it is on the disk on return.

    manifest: of the bundle; engine: what it runs from, for people. Raises OptionError where nothing was read,
    StateError for a state that holds what is no number, WriteError where the file can't be written: what was
    at `path` is then as it was.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise OptionError(f"path is {shown(path)}; allowed is the name of a file")
    if not state.length:
        raise OptionError("nothing was read yet: there is no state to save; append the ids of a text")
    target = Path(path)
    clear_abandoned(target)
    try:
        write_whole(target, lambda new: _write(new, state, manifest, engine), lasting=True)
    except OSError as error:
        told = error.strerror or type(error).__name__
        raise WriteError(f"{target} cannot be written ({told}); what was there is unchanged") from error


def _write(path: Path, state: TextState, manifest: Manifest, engine: str) -> None:
    ids = state.ids[: state.length].astype(_dtype("ids"))
    described = {
        "bundle": manifest.fingerprint,
        "model": plain_text(manifest.source.name, _MOST_NAME),
        "engine": plain_text(engine, _MOST_NAME),
        "made": datetime.now(timezone.utc),
        "patching": _told(manifest.patching),
        "length": state.length,
        "text_sha256": hashlib.sha256(ids.tobytes()).hexdigest(),
    }
    arrays = _arrays(state, ids)
    header = _Header(described, {name: part for name, (part, _) in arrays.items()}).to_json()
    assert len(header) <= _MOST_HEADER
    with path.open("wb") as file:
        lengths = FORMAT.to_bytes(4, "little") + len(header).to_bytes(4, "little")
        writer = ArrayWriter(file, _MAGIC + lengths + header)
        for name, (_, parts) in arrays.items():
            writer.put(name, (np.ascontiguousarray(part, _dtype(name)) for part in parts))
        writer.finish()


def _arrays(state: TextState, ids: Array) -> dict[str, tuple[_Part, Iterator[Array]]]:
    """By name, what an array is, and its values in parts."""
    length, starts = state.length, state.boundaries.starts
    closed, values, states, logits = len(starts) - 1, state.patch_values, state.byte_states, state.logits
    patches = range(values.oldest, closed)
    rows = np.arange(logits.oldest, length)
    whole: dict[str, tuple[int, Array]] = {"ids": (0, ids)}
    if "patcher" in state.caches:
        whole["entropies"] = 0, state.entropies[:length]
    whole["starts"] = 0, np.array(starts)
    whole["patch_values"] = patches.start, values.get(patches)
    whole["byte_states"] = states.base, np.asarray(states.get(states.base, length))
    whole["logits"] = logits.oldest, logits.rows[rows % len(logits.rows)]
    arrays = {name: (_Part(first, made.shape), iter([made])) for name, (first, made) in whole.items()}
    for stage, cache in state.caches.items():
        planes, _, heads, _, width = cache.buffer.shape
        shape = (planes, heads, cache.length - cache.first, width)
        arrays[stage] = _Part(cache.first, shape), cache.planes()
    return {name: arrays[name] for name in ARRAYS if name in arrays}


# 3. Reading.


def describe(path: str | os.PathLike[str], *, verify: bool = False) -> StateDescription:
    """What the state file at `path` is: of its arrays only the ends of the text are read.

    verify: read all of it, and compare its sha256. Raises StateError for what is no state file, or damaged.
    """
    with _opened(path) as (file, size):
        header, start = _begin(file, size)
        length, starts = header.described["length"], header.parts["starts"].shape[0]
        place = file.tell()
        shown_ids = min(length, _SHOWN)
        beginning = np.frombuffer(_read(file, 2 * shown_ids), _dtype("ids"))
        file.seek(place + 2 * (length - shown_ids))
        end = np.frombuffer(_read(file, 2 * shown_ids), _dtype("ids"))
        # The last start may be the one after the last id.
        file.seek(place + sum(_bytes(header, name) for name in ("ids", "entropies", "starts")) - 4)
        last = int.from_bytes(_read(file, 4), "little") if starts else 0
        _check_ids(beginning)
        _check_ids(end)
        if verify:
            reader = ArrayReader(file, start)
            for name in header.parts:
                reader.skip(_bytes(header, name))
            reader.check_seal()
        return StateDescription(
            **header.described,
            patches=starts - (last == length),
            beginning=decode(beginning),
            end=decode(end),
            bytes=size,
        )


def read_state(path: str | os.PathLike[str], manifest: Manifest, most: int, state: TextState) -> None:
    """Put what the file at `path` holds into `state`, of which nothing was read.

    most: ids that a text may have. Takes as much memory as the state, where caches lie in a device's memory
    once more as the largest of them.
    Raises StateError for a file that is damaged, or of another bundle or patching rule, or whose parts
    contradict each other, and OutOfMemoryError. The state is of no use then.
    """
    with _opened(path) as (file, size):
        header, start = _begin(file, size)
        _check_fits(header, manifest, most, state)
        reader = ArrayReader(file, start)
        _fill(state, header, reader)
        reader.check_seal()


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[BinaryIO, int]]:
    """The file and its size; what is wrong with it is told with its name."""
    if not isinstance(path, (str, os.PathLike)):
        raise OptionError(f"path is {shown(path)}; allowed is the name of a file")
    place = Path(path)
    with open_plain(
        place, rule="a saved state is a regular file", remedy="give a file that was saved", kind=StateError
    ) as file:
        try:
            yield file, os.fstat(file.fileno()).st_size
        except StateError as error:
            raise StateError(f"{place}: {error}") from None
        except OSError as error:
            raise StateError(f"{place} cannot be read ({error.strerror}); {AGAIN}") from None
        except MemoryError as error:
            raise engine_error(f"{place}: it can't be restored", error) from error


def _read(file: BinaryIO, count: int) -> bytearray:
    data = bytearray(count)
    read_exactly(file, memoryview(data))
    return data


def _begin(file: BinaryIO, size: int) -> tuple[_Header, bytes]:
    """The header, and everything up to its end; the file's size is what it has to be."""
    lead = len(_MAGIC) + 8
    start = bytes(_read(file, min(size, lead)))
    if not start or start[: len(_MAGIC)] != _MAGIC[: len(start)]:
        raise StateError(
            "it is no saved state; give a file that /save, --prompt-cache or Sequence.save wrote"
        )
    if len(start) < lead:
        raise StateError(f"it is truncated; {AGAIN}")
    version = int.from_bytes(start[-8:-4], "little")
    if version != FORMAT:
        newer = "newer than" if version > FORMAT else "not"
        remedy = "upgrade blt-edge" if version > FORMAT else AGAIN
        raise StateError(f"format {version} is {newer} {FORMAT}, which this version reads; {remedy}")
    count = int.from_bytes(start[-4:], "little")
    if count > min(_MOST_HEADER, size - lead):
        raise StateError(f"its header would have {count} bytes; {AGAIN}")
    data = bytes(_read(file, count))
    header = _header(data)
    needed = lead + count + header.array_bytes + SEAL
    if size != needed:
        what = "is truncated" if size < needed else "has extra bytes"
        raise StateError(f"it {what}: it has {size} bytes, its header says {needed}; {AGAIN}")
    return header, start + data


def _bytes(header: _Header, name: str) -> int:
    return math.prod(header.parts[name].shape) * _dtype(name).itemsize if name in header.parts else 0


# 4. What the parts must say of the model, and of each other.


def _check_fits(header: _Header, manifest: Manifest, most: int, state: TextState) -> None:
    """Compare with the bundle, before anything of a size that the file chose is allocated."""
    described, parts = header.described, header.parts
    if described["bundle"] != manifest.fingerprint:
        raise StateError(
            f"it belongs to another bundle ({described['model']}, fingerprint {described['bundle'][:16]}; "
            f"this one is {manifest.source.name}, {manifest.fingerprint[:16]}); load that one, or {AGAIN}"
        )
    if described["patching"] != (here := _told(manifest.patching)):
        raise StateError(f"its patches follow another rule ({described['patching'][:80]}; here {here})")
    length = described["length"]
    if length > most:
        raise StateError(f"its text has {length} ids, BOS included, {most} can be read here; {AGAIN}")
    patches = parts["starts"].shape[0]
    if patches > length + 1:
        raise StateError(f"it has {patches} patches of {length} ids; {AGAIN}")
    expected: dict[str, tuple[int, ...]] = {"ids": (length,), "starts": (patches,)}
    if "patcher" in state.caches:
        expected["entropies"] = (length,)
    for stage, cache in state.caches.items():
        planes, _, heads, _, width = cache.buffer.shape
        expected[stage] = (planes, heads, -1, width)
    expected["patch_values"] = (-1, state.patch_values.tensor.shape[1])
    expected["byte_states"] = (-1, manifest.model.width)
    expected["logits"] = (-1, manifest.model.vocab_size)
    if set(expected) != set(parts):
        odd = sorted(set(expected) ^ set(parts))[0]
        raise StateError(f"its arrays are not those of this model ({odd}); {AGAIN}")
    for name, shape in expected.items():
        found = parts[name].shape
        same = len(found) == len(shape) and all(b in (-1, a) for a, b in zip(found, shape, strict=True))
        if not same or (-1 not in shape and parts[name].first):
            raise StateError(
                f"its {name} have the shape {found} from {parts[name].first} on, not this model's; {AGAIN}"
            )


def _check_ids(ids: Array) -> None:
    if ids.size and int(ids.max()) >= VOCAB_SIZE:
        raise StateError(f"its ids have {int(ids.max())}; allowed are 0 to {VOCAB_SIZE - 1}; {AGAIN}")


def _check_span(name: str, first: int, count: int, end: int, needed: int) -> None:
    """Whether `count` positions from `first` on end where the text does and begin where it needs them."""
    if not 0 <= first <= max(0, min(needed, end - 1)) or first + count != end:
        raise StateError(
            f"its {name} are of {first} to {first + count}, the text needs {needed} to {end}; {AGAIN}"
        )


def _fill(state: TextState, header: _Header, reader: ArrayReader) -> None:
    """Put the arrays where they belong, in the file's order."""
    length, parts = header.described["length"], header.parts

    def take(name: str) -> Array:
        values = np.empty(parts[name].shape, _dtype(name))
        reader.read(name, values)
        return values

    ids = take("ids")
    _check_ids(ids)
    if hashlib.sha256(ids.tobytes()).hexdigest() != header.described["text_sha256"]:
        raise StateError(f"its text is not the one that its header names; {AGAIN}")
    state.store_ids(0, ids.astype(np.int64))
    if "entropies" in parts:
        state.entropies[:length] = take("entropies")
    # Patches follow from ids and entropies; that the file has them, too, is for people.
    state.boundaries.extend(state.ids[:length], state.entropies[:length])
    starts = state.boundaries.starts
    if take("starts").tolist() != starts:
        raise StateError(f"its patches are not those of its text; {AGAIN}")
    closed = len(starts) - 1
    for stage, cache in state.caches.items():
        part, end = parts[stage], closed if stage == "latent" else length
        window = cache.window
        _check_span(stage, part.first, part.shape[2], end, 0 if window is None else max(0, end - window + 1))
        room = cache.room(part.first, part.shape[2])
        if room is None:
            cache.place(part.first, take(stage)[:, np.newaxis])
        else:
            reader.read(stage, room)
    part = parts["patch_values"]
    _check_span("patch_values", part.first, part.shape[0], closed, closed - 1)
    state.patch_values.place(part.first, take("patch_values"))
    part = parts["byte_states"]
    if part.first != length or part.shape[0]:  # there may be none where a patch ends with the text
        _check_span("byte_states", part.first, part.shape[0], length, starts[-1])
    elif starts[-1] != length:
        raise StateError(f"its open patch has no states; {AGAIN}")
    state.byte_states.place(part.first, take("byte_states"))
    part = parts["logits"]
    _check_span("logits", part.first, part.shape[0], length, length - 1)
    state.logits.put(part.first, take("logits"))
    state.logits.oldest = max(state.logits.oldest, part.first)
    state.length = length

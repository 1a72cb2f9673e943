"""Is a bundle the model it was exported from? Stage by stage, boundary by boundary, byte by byte.

Compares a loaded bundle with transformers (`Reference`), with what transformers once computed (`Golden`), or
with the float32 bundle it was made from (`BundleReference`). Prints nothing; the report goes into the
manifest, as the record of the kernels that it was made on, and its rows make a table. Limits are set per
precision, in `quality`.

A quantized bundle can't have every boundary and greedy byte of its reference. Of it are demanded nearly all
boundaries, close distributions, and nearly the same choices, over some thousands of bytes of prose; after a
reference's greedy text, it must choose nearly each of its bytes too. A golden file has no other text than its
own: there wider limits hold, and bits per byte, of which so few bytes say nothing, are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..runtime.backends.ort_session import import_onnxruntime
from ..runtime.errors import BundleError, OptionError
from ..runtime.fields import plain_text
from ..runtime.host import MOST_NAME, processor_name
from ..runtime.integrity import check_files
from ..runtime.manifest import load_manifest
from ..runtime.model import BltModel
from ..runtime.options import GenerationOptions
from ..runtime.validation import ValidationRecord
from ..runtime.vocabulary import byte_ids
from .golden import GOLDEN_TEXT, Golden
from .quality import Tally, Tolerances, lead_length, least_precise, prose, tolerances_of
from .reference import Reference, pick_margins

__all__ = ["BundleReference", "ValidationReport", "ValidationRow", "validate_bundle"]

Floats = npt.NDArray[np.float32]

_OUTPUTS = ("patcher_logits", "entropies", "byte_states", "patch_values", "logits")
_GREEDY_PROMPT = 64
_CHANCE = 8.0
# Positions: transformers' attention takes memory with their square.
_PROSE_WINDOW = 1024
_CLOSE_ENTROPY = 1e-5
_CLOSE_LOGITS = 1e-4


class BundleReference:
    """A loaded float32 bundle, asked like `Reference`, for those made from it."""

    def __init__(self, model: BltModel) -> None:
        """`model` is a float32 bundle's; use `load`."""
        self._model = model

    @classmethod
    def load(cls, bundle: str | Path, threads: int | None = None) -> BundleReference:
        """Load it. Raises OptionError for a quantized bundle, BundleError, BackendError."""
        stages = load_manifest(bundle).stages.values()
        if any(stage.precision != "fp32" for stage in stages):
            raise OptionError(f"{bundle} is quantized; give the float32 bundle to compare with")
        return cls(BltModel.load(bundle, threads=threads))

    @property
    def name(self) -> str:
        return f"the float32 bundle {self._model.path.name}"

    @property
    def threshold(self) -> float | None:
        """The entropy above which the next byte starts a patch, in nats; None under any other rule."""
        rule = self._model.manifest.patching
        alone = rule.mode == "entropy" and not (rule.monotonic or rule.threshold_add)
        return rule.threshold if alone else None

    def trace(self, data: bytes) -> Mapping[str, Floats]:
        """What each stage gives, see `BltModel.trace`."""
        return self._model.trace(data)

    def patch_lengths(self, data: bytes) -> list[int]:
        """Lengths of the patches over BOS and `data`."""
        return self._model.patch_lengths(data)

    def logits(self, data: bytes) -> Floats:
        """[1 + n, 260] float32."""
        return self._model.logits(data)

    def greedy(self, prompt: bytes, count: int) -> bytes:
        """The `count` most likely next bytes, fewer where the model ends the text."""
        return self._model.generate(prompt, GenerationOptions(max_new_bytes=count)).data


@dataclass(frozen=True)
class ValidationRow:
    """One comparison."""

    check: str
    """What was compared."""
    measured: float | int
    """The worst value over all texts; a difference may be nan or inf."""
    rule: Literal["<=", ">=", "=="]
    """How `measured` must relate to `allowed`."""
    allowed: float | int
    """The limit."""
    note: str = ""
    """Where it first went wrong, or what else to know; may be empty."""

    @property
    def ok(self) -> bool:
        """Whether the rule holds; never for nan."""
        if self.rule == "==":
            return self.measured == self.allowed
        return self.measured <= self.allowed if self.rule == "<=" else self.measured >= self.allowed


@dataclass(frozen=True)
class ValidationReport:
    """The result of `validate_bundle`."""

    against: str
    """What it was compared with, such as "transformers 5.23.0"."""
    precision: str
    """The precision whose tolerances applied."""
    data_bytes: int
    """Bytes of text compared."""
    rows: tuple[ValidationRow, ...] = ()
    """All comparisons, in the order of the stages."""

    @property
    def passed(self) -> bool:
        return all(row.ok for row in self.rows)

    @property
    def breaches(self) -> tuple[ValidationRow, ...]:
        return tuple(row for row in self.rows if not row.ok)

    def record(self, model: BltModel) -> ValidationRecord:
        """The report of `model` with what that runs on, for the manifest."""
        on_cpu = model.engine.kernels is None
        return ValidationRecord(
            kernels=model.kernels,
            processor=processor_name() if on_cpu else plain_text(model.engine.device, MOST_NAME),
            onnxruntime=import_onnxruntime().__version__ if on_cpu else None,
            report=self.to_dict(),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold (nan and inf become strings), for the manifest and `--json`."""
        return {
            "passed": self.passed,
            "against": self.against,
            "precision": self.precision,
            "data_bytes": self.data_bytes,
            "rows": [
                {
                    "check": row.check,
                    "measured": _plain(row.measured),
                    "rule": row.rule,
                    "allowed": _plain(row.allowed),
                    "ok": row.ok,
                    "note": row.note,
                }
                for row in self.rows
            ],
        }


AnyReference = Reference | Golden | BundleReference


@dataclass(frozen=True, eq=False)
class _Pair:
    """One text, its arrays by name, found and expected, and both sides' patch starts."""

    data: bytes
    found: Mapping[str, Floats]
    expected: Mapping[str, Floats]
    found_starts: list[int]
    expected_starts: list[int]


def validate_bundle(
    model: BltModel,
    expected: AnyReference,
    texts: Sequence[bytes] | None = None,
    tolerances: Tolerances | None = None,
    *,
    greedy_bytes: int = 200,
    progress: Callable[[str], None] | None = None,
) -> ValidationReport:
    """Compare a loaded bundle with the reference, or with a golden file of the same checkpoint.

    texts: None takes `GOLDEN_TEXT`, cut to the model's positions; with a golden file only its own text can
    be compared. A quantized bundle reads `quality.prose` too, in windows. tolerances: None takes those of
    the bundle's precision. greedy_bytes: how many to generate
    after a short prompt, 0 for none; a golden file's own number counts instead. progress: called with what
    comes next.

    A breach is a row of the report, not an exception. Raises `GoldenError` for a golden file of another
    checkpoint, `OptionError` for texts with a golden file or a precision without tolerances,
    `PromptTooLongError`.
    """
    say = progress or (lambda what: None)
    manifest = model.manifest
    precision = least_precise(manifest)
    limits = tolerances or tolerances_of(manifest)
    if isinstance(expected, Golden):
        expected.check_checkpoint(manifest.source.sha256)
        if texts is not None:
            raise OptionError(
                "texts: a golden file knows its own text only; compare others with transformers"
            )
        texts = (expected.data,)
    texts = texts or (GOLDEN_TEXT[: manifest.model.max_positions - 1],)
    say("file hashes")
    rows = [_files_row(model)]
    pairs = []
    for number, text in enumerate(texts, 1):
        say(f"text {number} of {len(texts)}")
        pairs.append(_pair(model, expected, text))
    rows += _output_rows({"patcher_logits": "patcher: logits"}, pairs, limits)
    if "entropies" in pairs[0].expected:
        largest, note = _worst(pairs, "entropies", scaled=False)
        title = "patcher: entropies, largest difference in nats"
        rows.append(ValidationRow(title, largest, "<=", limits.entropy, note))
    compared = sum(map(len, texts))
    predictions: list[ValidationRow] = []
    if limits.exact:
        rows.append(_boundary_row(pairs, expected.threshold))
    elif isinstance(expected, Golden):
        own, same = _tallied(pairs)
        rows += _boundary_shares(own, limits.for_short_text())
        # Without more bits, of which so few bytes say nothing.
        predictions = _prediction_rows(own, same, limits.for_short_text())[:-1]
    else:
        say("prose")
        own, same = _read_prose(model, expected)
        rows += _boundary_shares(own, limits)
        predictions = _prediction_rows(own, same, limits)
        compared += own.bytes
    stages = {"byte_states": "encoder: byte states", "patch_values": "latent: patch keys and values"}
    rows += _output_rows(stages, pairs, limits)
    rows += _logit_rows(pairs, limits)
    rows += predictions
    if isinstance(expected, Golden) or greedy_bytes > 0:
        say("greedy bytes")
        rows.append(_greedy_row(model, expected, texts[0], greedy_bytes, limits))
    return ValidationReport(expected.name, precision, compared, tuple(rows))


def _pair(model: BltModel, expected: AnyReference, text: bytes) -> _Pair:
    found = model.trace(text)
    known: Any = expected if isinstance(expected, Golden) else expected.trace(text)
    wanted = known if isinstance(known, Mapping) else vars(known)
    lengths = known.patch_lengths if isinstance(expected, Golden) else expected.patch_lengths(text)
    arrays = {name: wanted[name] for name in _OUTPUTS if wanted.get(name) is not None}
    return _Pair(text, found, arrays, _starts(model.patch_lengths(text)), _starts(lengths))


def _starts(lengths: Sequence[int]) -> list[int]:
    return [0, *np.cumsum(lengths)[:-1].tolist()]


# 1. Rows. Differences are taken in float64; a missing or misshapen output counts as infinitely far.


def _files_row(model: BltModel) -> ValidationRow:
    sound = files = len(model.manifest.files)
    note = ""
    try:
        check_files(model.path, model.manifest, full=True)
    except BundleError as error:
        sound, note = 0, str(error)
    return ValidationRow("bundle: files with the right sha256", sound, "==", files, note)


def _logit_rows(pairs: Sequence[_Pair], limits: Tolerances) -> list[ValidationRow]:
    title = "decoder: logits, "
    largest, note = _worst(pairs, "logits", scaled=True)
    rows = [ValidationRow(f"{title}largest difference / scale", largest, "<=", limits.logits, note)]
    if not math.isfinite(rows[0].measured):
        return rows
    found = np.concatenate([pair.found["logits"] for pair in pairs]).astype(np.float64)
    wanted = np.concatenate([pair.expected["logits"] for pair in pairs]).astype(np.float64)
    mean = float(np.abs(found - wanted).mean()) / _scale(wanted)
    norms = float(np.linalg.norm(found) * np.linalg.norm(wanted))
    cosine = float((found * wanted).sum()) / norms if norms else float(not np.abs(found - wanted).any())
    agreed = found.argmax(-1) == wanted.argmax(-1)
    note = "" if agreed.all() else f"first differs at row {int(np.argmin(agreed))}"
    rows += [
        ValidationRow(f"{title}mean difference / scale", mean, "<=", limits.logits_mean),
        ValidationRow(f"{title}cosine", cosine, ">=", limits.cosine),
    ]
    if limits.exact:
        rows.append(
            ValidationRow(f"{title}argmax agreement", float(agreed.mean()), ">=", limits.argmax, note)
        )
    return rows


def _tallied(pairs: Sequence[_Pair]) -> tuple[Tally, Tally]:
    """Like `_read_prose`, of texts that were read."""
    own, same = Tally(), Tally()
    for pair in pairs:
        found, wanted = pair.found["logits"][:-1], pair.expected["logits"][:-1]
        _add(own, same, pair.data, found, wanted, pair.found_starts, pair.expected_starts)
    return own, same


def _read_prose(model: BltModel, expected: Reference | BundleReference) -> tuple[Tally, Tally]:
    """The model beside the reference, and the reference beside itself, on prose."""
    own, same, text = Tally(), Tally(), prose()
    size = min(_PROSE_WINDOW, model.manifest.model.trained_context, model.limits.max_positions) - 1
    for start in range(0, len(text), size):
        data = text[start : start + size]
        found, wanted = model.logits(data)[:-1], expected.logits(data)[:-1]
        lengths = model.patch_lengths(data), expected.patch_lengths(data)
        _add(own, same, data, found, wanted, *map(_starts, lengths))
    return own, same


def _add(
    own: Tally,
    same: Tally,
    data: bytes,
    found: Floats,
    wanted: Floats,
    found_starts: list[int],
    expected_starts: list[int],
) -> None:
    own.add_predictions(found, wanted, data)
    same.add_predictions(wanted, wanted, data)
    own.add_boundaries(found_starts, expected_starts)


def _boundary_shares(own: Tally, limits: Tolerances) -> list[ValidationRow]:
    shares = {"false": own.false_boundaries, "missed": own.missed_boundaries}
    return [
        ValidationRow(f"patcher: {name} boundaries, share", share, "<=", limits.boundaries)
        for name, share in shares.items()
    ]


def _prediction_rows(own: Tally, same: Tally, limits: Tolerances) -> list[ValidationRow]:
    """What a quantized bundle's user sees; bits last."""
    title, more = "predictions: ", own.bits_per_byte - same.bits_per_byte
    note = f"{own.bits_per_byte:.4f}, the reference {same.bits_per_byte:.4f}, on {own.bytes:,} bytes of prose"
    if same.bits_per_byte >= _CHANCE:
        note += "; that is no better than chance, and limits are for trained models, which differ less"
    return [
        ValidationRow(f"{title}argmax agreement", own.argmax_agreement, ">=", limits.argmax),
        ValidationRow(f"{title}mean KL, bits per byte", own.mean_divergence, "<=", limits.divergence),
        ValidationRow(f"{title}more bits per byte", more, "<=", limits.bits, note),
    ]


def _boundary_row(pairs: Sequence[_Pair], threshold: float | None) -> ValidationRow:
    """Boundaries must be equal. The note is about the first that differs, and how near its entropy came."""
    differing, note = 0, ""
    for number, pair in enumerate(pairs, 1):
        flips = sorted(set(pair.found_starts) ^ set(pair.expected_starts))
        differing += len(flips)
        if flips and not note:
            side = "the reference" if flips[0] in pair.expected_starts else "the bundle"
            where = f" of text {number}" if len(pairs) > 1 else ""
            note = f"only {side} starts a patch at position {flips[0]}{where}"
            note += _closeness(pair.expected.get("entropies"), flips[0] - 1, threshold)
    return ValidationRow("patcher: boundaries that differ", differing, "==", 0, note)


def _closeness(entropies: Floats | None, position: int, threshold: float | None) -> str:
    if threshold is None or entropies is None or not 0 <= position < len(entropies):
        return ""
    entropy = float(entropies[position])
    distance = abs(entropy - threshold)
    if distance >= _CLOSE_ENTROPY:
        return f"; the reference's entropy before it is {entropy:.5f}, the threshold {threshold:.5f}"
    return f"; entropy {entropy:.5f} is within {max(distance, 1e-8):.0e} of the threshold"


def _greedy_row(
    model: BltModel, expected: AnyReference, text: bytes, greedy_bytes: int, limits: Tolerances
) -> ValidationRow:
    if isinstance(expected, Golden):
        prompt, wanted, count = expected.prompt, expected.greedy, expected.greedy_count
        margins = expected.greedy_margins
    else:
        prompt, count = text[:_GREEDY_PROMPT], greedy_bytes
        wanted = expected.greedy(prompt, count)
        margins = pick_margins(expected.logits(prompt + wanted)[len(prompt) :])
    if not limits.exact:
        return _chosen_row(model, prompt, wanted, limits)
    found = model.generate(prompt, GenerationOptions(max_new_bytes=count)).data if count else b""
    title = f"greedy: equal bytes of {len(wanted)}"
    if found == wanted:
        return ValidationRow(title, len(wanted), "==", len(wanted))
    same = lead_length(found, wanted)
    note = f"byte {same} is {_byte(found, same)}, in the reference {_byte(wanted, same)}"
    if same < len(margins) and margins[same] < _CLOSE_LOGITS:
        note += f", whose two largest logits there are within {max(float(margins[same]), 1e-8):.0e}"
    # A bundle that goes on after the reference's end has all its bytes, and is still wrong.
    return ValidationRow(title, same if same < len(wanted) else len(found), "==", len(wanted), note)


def _chosen_row(model: BltModel, prompt: bytes, wanted: bytes, limits: Tolerances) -> ValidationRow:
    """How many of the reference's bytes the bundle would choose after the same ones.

    Texts that it writes by itself would say little: after one near-tie they are others.
    """
    never = model.manifest.generation.suppressed
    rows = np.delete(model.logits(prompt + wanted)[len(prompt) : -1], never, axis=-1)
    ids = np.delete(np.arange(model.manifest.model.vocab_size), never)[rows.argmax(-1)]
    same = ids == byte_ids(wanted)
    title = f"greedy: of {len(wanted)} bytes, chosen too"
    note = "" if same.all() else f"the first that is not is byte {int(np.argmin(same))}"
    return ValidationRow(title, int(same.sum()), ">=", math.ceil(limits.greedy * len(wanted)), note)


def _byte(data: bytes, index: int) -> str:
    return repr(data[index : index + 1])[1:] if index < len(data) else "the end of the text"


# 2. Measures.


def _output_rows(
    titles: Mapping[str, str], pairs: Sequence[_Pair], limits: Tolerances
) -> list[ValidationRow]:
    """Rows for the stages' outputs, title by name, that the reference has."""
    rows = []
    for name, title in titles.items():
        if name not in pairs[0].expected:
            continue
        if limits.exact:
            title, (error, note) = f"{title}, largest difference / scale", _worst(pairs, name, scaled=True)
        else:
            title, (error, note) = f"{title}, relative error", _relative_error(pairs, name)
        rows.append(ValidationRow(title, error, "<=", limits.stage, note))
    return rows


def _relative_error(pairs: Sequence[_Pair], name: str) -> tuple[float, str]:
    """The largest norm of a difference as a share of the output's norm."""
    error, note = 0.0, ""
    for pair in pairs:
        wanted, found = pair.expected[name], pair.found.get(name)
        if found is not None and name == "patch_values" and pair.found_starts != pair.expected_starts:
            # Patches after the first boundary that differs are others; the one before it ends elsewhere.
            same = max(0, lead_length(pair.found_starts, pair.expected_starts) - 1)
            note = note or f"of the {same} patches before the boundaries differ" * (same < len(wanted))
            found, wanted = found[:same], wanted[:same]
        if found is None or found.shape != wanted.shape:
            return _worst(pairs, name, scaled=True)
        norm = float(np.linalg.norm(wanted.astype(np.float64)))
        difference = float(np.linalg.norm(found.astype(np.float64) - wanted))
        # A nan stays: no comparison with it holds.
        error = float(np.maximum(error, difference / norm if norm else difference))
    return error, note


def _worst(pairs: Sequence[_Pair], name: str, *, scaled: bool) -> tuple[float, str]:
    """The largest difference over all texts, nan included, and what was wrong with the shapes if anything."""
    worst: list[float] = []
    for pair in pairs:
        wanted, found = pair.expected[name], pair.found.get(name)
        if found is None:
            return math.inf, f"the bundle has no {name.replace('_', ' ')}"
        if found.shape != wanted.shape:
            return math.inf, f"shape {list(found.shape)}, in the reference {list(wanted.shape)}"
        difference = float(np.abs(found.astype(np.float64) - wanted).max(initial=0.0))
        worst.append(difference / _scale(wanted) if scaled else difference)
    return float(np.max(worst)), ""


def _scale(wanted: npt.NDArray[Any]) -> float:
    return max(1.0, float(np.abs(wanted).max(initial=0.0)))


def _plain(value: float | int) -> float | int | str:
    return value if math.isfinite(value) else str(value)

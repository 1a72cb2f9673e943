"""How far a bundle's results are from its reference's over the same text, and how far they may be.

Figures are sums that add up over texts; what is allowed goes by precision.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.errors import OptionError
from ..runtime.manifest import Manifest
from ..runtime.sampling import log_probabilities
from ..runtime.self_test import STAGE_TOLERANCES
from ..runtime.vocabulary import BYTE_OFFSET

__all__ = ["TOLERANCES", "Tally", "Tolerances", "lead_length", "least_precise", "prose", "tolerances_of"]

Floats = NDArray[np.float32]
Data = bytes  # a class with a field `bytes` can't name the type

# Positions 0 and 1 start a patch in every text: agreeing on them says nothing.
_FIRST_FREE_START = 2


@dataclass
class Tally:
    """Sums over bytes and patch boundaries; the properties are the figures. Bits are log2."""

    bytes: int = 0
    """Bytes predicted."""
    bits: float = 0.0
    """Negative log2 probability of the bytes that came, over all 260 classes."""
    divergence: float = 0.0
    """Sum of KL(first model || this one) in bits."""
    agreed: int = 0
    """Bytes whose most likely class is the first model's."""
    boundaries: int = 0
    """This model's patch boundaries."""
    expected_boundaries: int = 0
    """The first model's."""
    common_boundaries: int = 0
    """Boundaries of both."""

    def add_predictions(self, logits: Floats, expected: Floats, data: Data) -> None:
        """`logits` and the first model's `expected`, float32 [n, 260], predicted the n bytes of `data`."""
        own, other = log_probabilities(logits), log_probabilities(expected)
        targets = np.frombuffer(data, np.uint8).astype(np.int64) + BYTE_OFFSET
        self.bytes += len(data)
        self.bits -= float(own[np.arange(len(targets)), targets].sum() / np.log(2.0))
        self.divergence += float((np.exp(other) * (other - own)).sum() / np.log(2.0))
        self.agreed += int((logits.argmax(axis=1) == expected.argmax(axis=1)).sum())

    def add_boundaries(self, starts: Iterable[int], expected: Iterable[int]) -> None:
        """Positions where patches start in one window; the two that every text has are left out."""
        own = {start for start in starts if start >= _FIRST_FREE_START}
        other = {start for start in expected if start >= _FIRST_FREE_START}
        self.boundaries += len(own)
        self.expected_boundaries += len(other)
        self.common_boundaries += len(own & other)

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            **{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        )

    @property
    def bits_per_byte(self) -> float:
        """Mean negative log2 probability."""
        return self.bits / max(1, self.bytes)

    @property
    def mean_divergence(self) -> float:
        """Mean KL divergence from the first model, bits per byte."""
        # Rounding alone can make it a tiny negative number.
        return max(0.0, self.divergence / max(1, self.bytes))

    @property
    def argmax_agreement(self) -> float:
        """Share of bytes whose most likely class is the first model's."""
        return self.agreed / max(1, self.bytes)

    @property
    def false_boundaries(self) -> float:
        """Share of this model's boundaries that the first one does not have."""
        return (self.boundaries - self.common_boundaries) / max(1, self.boundaries)

    @property
    def missed_boundaries(self) -> float:
        """Share of the first model's boundaries that this one does not have."""
        return (self.expected_boundaries - self.common_boundaries) / max(1, self.expected_boundaries)

    def to_dict(self) -> dict[str, Any]:
        """The figures, then the sums they come from."""
        return {
            "bits_per_byte": self.bits_per_byte,
            "mean_kl_bits": self.mean_divergence,
            "argmax_agreement": self.argmax_agreement,
            "false_boundaries": self.false_boundaries,
            "missed_boundaries": self.missed_boundaries,
            "sums": asdict(self),
        }


def lead_length(one: Sequence[object], other: Sequence[object]) -> int:
    """How many items (bytes of a text, starts of patches) two sequences begin with in common."""
    shorter = min(len(one), len(other))
    return next((index for index in range(shorter) if one[index] != other[index]), shorter)


@dataclass(frozen=True)
class Tolerances:
    """What a bundle may differ by. A scale is the largest magnitude in the reference's output, at least 1."""

    stage: float
    """Largest difference in a stage's output, as a share of its scale. When quantized: norm of the
    difference, as a share of the output's."""
    entropy: float
    """Largest difference of entropies, in nats."""
    logits: float
    """Largest difference of logits, as a share of their scale."""
    logits_mean: float
    """Mean difference of logits, as a share of their scale."""
    cosine: float
    """Smallest cosine between all logits of a text and the reference's."""
    argmax: float
    """Smallest share of positions with the same most likely next byte."""
    boundaries: float = 0.0
    """Largest share of false, and of missed, patch boundaries. At 0 boundaries and greedy bytes must be
    equal; above, the bundle is judged as a quantized one, and the rest holds. All of these, and `argmax`, are
    then of prose (`prose`)."""
    divergence: float = 0.0
    """Largest mean KL divergence from the reference's predictions, in bits per byte."""
    bits: float = 0.0
    """Most bits per byte more than the reference's."""
    greedy: float = 1.0
    """Smallest share of the reference's greedy bytes that the bundle would choose too, after the same."""

    @property
    def exact(self) -> bool:
        """Whether boundaries and greedy bytes must be equal."""
        return self.boundaries == 0

    def for_short_text(self) -> Tolerances:
        """For a few hundred bytes of many scripts and code, where rarer bytes differ twice as much."""
        wider = {name: 2 * getattr(self, name) for name in ("boundaries", "divergence", "bits")}
        return self if self.exact else replace(self, argmax=round(2 * self.argmax - 1, 6), **wider)


_LIMITS: Mapping[str, tuple[float, ...]] = {
    # entropy, logits, logits_mean, cosine, argmax, boundaries, divergence, bits, greedy
    "fp32": (1e-4, 1e-4, 1e-5, 0.999999, 0.999),
    "fp16": (0.05, 0.05, 0.001, 0.9999, 0.99, 0.02, 0.001, 0.002, 0.98),
    "int8w": (0.5, 0.25, 0.007, 0.9996, 0.97, 0.02, 0.004, 0.0035, 0.97),
    "int8": (0.5, 0.25, 0.01, 0.9995, 0.955, 0.02, 0.007, 0.006, 0.96),
    "int4": (0.5, 0.3, 0.016, 0.9987, 0.915, 0.02, 0.016, 0.012, 0.94),
}
TOLERANCES: Mapping[str, Tolerances] = {
    precision: Tolerances(STAGE_TOLERANCES[precision], *limits) for precision, limits in _LIMITS.items()
}
"""By the precision of a bundle's least precise part, most precise first.

Those of integers are twice the worst of what the default mixes show on the demo: up to `cosine` over
`GOLDEN_TEXT` and eight pieces of 700 bytes of English and other scripts, from `argmax` on over ten pieces of
6 KB of English. fp16's are set, not measured: ONNX Runtime's CPU computes float16 products in float32, where
the demo, whose weights are float16, shows no difference; other engines round each product's input and output.
"""

# Twice the worst of a patcher all in 4 bits, over the same texts as the others.
_NARROW_ENTROPY = 4.2

_PROSE = Path(__file__).parent / "text" / "alice.txt"


def prose() -> bytes:
    """Some 6 KB of English that neither the demo's training nor the bundled calibration texts hold."""
    return _PROSE.read_bytes()


def tolerances_of(manifest: Manifest) -> Tolerances:
    """The tolerances of a bundle's least precise part. Raises `OptionError` when there are none."""
    precision = least_precise(manifest)
    if precision not in TOLERANCES:
        known = ", ".join(TOLERANCES)
        raise OptionError(
            f"precision: got {precision!r}, tolerances are known for {known}; give them yourself"
        )
    limits, mix = TOLERANCES[precision], manifest.quantization and manifest.quantization.mix
    if not mix or not mix.int4:
        return limits
    share = round(2 * (1 - mix.target), 6)  # twice, like the others, what was asked for
    return replace(limits, boundaries=max(limits.boundaries, share), entropy=_NARROW_ENTROPY)


def least_precise(manifest: Manifest) -> str:
    """The precision of the bundle's least precise stage or table; one without tolerances comes first."""
    known = {stage.precision for stage in manifest.stages.values()}
    unknown = sorted(known - TOLERANCES.keys())
    return unknown[0] if unknown else max(known | {_table_precision(manifest)}, key=list(TOLERANCES).index)


def _table_precision(manifest: Manifest) -> str:
    """The precision whose tolerances the tables need: rows in integers differ as much as such weights."""
    if manifest.embedding.dtype == "float16":
        # Exact where the checkpoint's own are float16 or, nearly always, bfloat16.
        return "fp16" if manifest.source.config.get("dtype") == "float32" else "fp32"
    return {"float32": "fp32", "int8": "int8w", "int4": "int4"}[manifest.embedding.dtype]

"""How far one model's predictions are from another's over the same text: sums that add up over texts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.sampling import log_probabilities
from ..runtime.vocabulary import BYTE_OFFSET

__all__ = ["Tally", "lead_length"]

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
        """The sums over both."""
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
    def boundary_precision(self) -> float:
        """Share of this model's boundaries that the first one has too; 1 when there are none."""
        return self.common_boundaries / self.boundaries if self.boundaries else 1.0

    @property
    def boundary_recall(self) -> float:
        """Share of the first model's boundaries that this one has too; 1 when there are none."""
        return self.common_boundaries / self.expected_boundaries if self.expected_boundaries else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The figures, then the sums they come from."""
        return {
            "bits_per_byte": self.bits_per_byte,
            "mean_kl_bits": self.mean_divergence,
            "argmax_agreement": self.argmax_agreement,
            "boundary_precision": self.boundary_precision,
            "boundary_recall": self.boundary_recall,
            "sums": asdict(self),
        }


def lead_length(one: bytes, other: bytes) -> int:
    """How many bytes two texts begin with in common."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))

"""How far a bundle may be from its reference, by precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..runtime.errors import OptionError
from ..runtime.manifest import Manifest
from ..runtime.self_test import STAGE_TOLERANCES

__all__ = ["TOLERANCES", "Tolerances", "least_precise", "tolerances_for", "tolerances_of"]


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
    boundaries: float = 1.0
    """Smallest precision and recall of patch boundaries. At 1 boundaries and greedy bytes must be equal;
    below, the bundle is judged as a quantized one, and the next two hold."""
    divergence: float = 0.0
    """Largest mean KL divergence from the reference's predictions, in bits per byte."""
    bits: float = 0.0
    """Most bits per byte more than the reference's, on the texts compared."""


# Whole texts are promised 0.99 (`blt-edge compare` measures that); the text compared here has some 340
# boundaries, of which one more or less is already 0.003.
_BOUNDARIES = 0.97

TOLERANCES: Mapping[str, Tolerances] = {
    "fp32": Tolerances(
        stage=STAGE_TOLERANCES["fp32"],
        entropy=1e-4,
        logits=1e-4,
        logits_mean=1e-5,
        cosine=0.999999,
        argmax=0.999,
    ),
    "fp16": Tolerances(
        stage=STAGE_TOLERANCES["fp16"],
        entropy=0.05,
        logits=0.05,
        logits_mean=0.001,
        cosine=0.9999,
        argmax=0.99,
        boundaries=_BOUNDARIES,
        divergence=0.001,
        bits=0.002,
    ),
    "int8w": Tolerances(
        stage=STAGE_TOLERANCES["int8w"],
        entropy=0.5,
        logits=0.25,
        logits_mean=0.007,
        cosine=0.9996,
        argmax=0.96,
        boundaries=_BOUNDARIES,
        divergence=0.012,
        bits=0.02,
    ),
    "int8": Tolerances(
        stage=STAGE_TOLERANCES["int8"],
        entropy=0.5,
        logits=0.25,
        logits_mean=0.01,
        cosine=0.9995,
        argmax=0.945,
        boundaries=_BOUNDARIES,
        divergence=0.015,
        bits=0.02,
    ),
    "int4": Tolerances(
        stage=STAGE_TOLERANCES["int4"],
        entropy=0.5,
        logits=0.3,
        logits_mean=0.016,
        cosine=0.9987,
        argmax=0.855,
        boundaries=_BOUNDARIES,
        divergence=0.036,
        bits=0.05,
    ),
}
"""By the precision of a bundle's least precise part, most precise first.

Those of integers are twice the worst of what the default mixes show on the demo, over `GOLDEN_TEXT` and eight
pieces of 700 bytes of English and other scripts. Boundaries and bits per byte are what default mixes are
promised to keep. fp16's are set, not measured: ONNX Runtime's CPU computes float16 products in float32, where
the demo, whose weights are float16, shows no difference; other engines round each product's input and output.
"""


def tolerances_for(precision: str) -> Tolerances:
    """The tolerances of a precision. Raises `OptionError` when there are none."""
    if precision not in TOLERANCES:
        known = ", ".join(TOLERANCES)
        raise OptionError(
            f"precision: got {precision!r}, tolerances are known for {known}; give them yourself"
        )
    return TOLERANCES[precision]


def tolerances_of(manifest: Manifest) -> Tolerances:
    """The tolerances of a bundle's least precise part. Raises `OptionError` when there are none."""
    return tolerances_for(least_precise(manifest))


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

"""What to try when a bundle of lower precision fails its validation, in its table's own words."""

from __future__ import annotations

from ..graphs.precision import format_precision
from ..runtime.manifest import Manifest
from ..runtime.names import STAGES
from .validate import ValidationReport

__all__ = ["next_step"]

_BETTER = {"int4": "int8w", "int8": "int8w", "int8w": "fp16", "fp16": "fp32"}
_SMOOTH = 0.5


def next_step(manifest: Manifest, report: ValidationReport) -> str:
    """Options and the reason, such as "--precision int8w,latent=int4: the decoder is the first to differ".

    Each stage reads what those before it gave, so the first whose rows fail is to blame; where none does by
    itself, the least precise are. Empty where there is nothing more precise to take.
    """
    failed = {row.check.partition(":")[0] for row in report.breaches}
    stages = {stage: spec.precision for stage, spec in manifest.stages.items()}
    first = next((stage for stage in STAGES if stage in failed and stage in stages), None)
    why = f"the {first} is the first to differ" if first else "no stage differs too much by itself"
    # The patcher alone reads no tables, and no stage's row is of them alone.
    if manifest.embedding.precision == "int4" and first != "patcher":
        return f"--tables int8: {why}, and the tables are int4"
    worst = next((word for word in _BETTER if word in stages.values()), None)
    blamed = [first] if first and stages[first] in _BETTER else [s for s in stages if stages[s] == worst]
    if not blamed:
        return ""
    mix = manifest.quantization.mix if manifest.quantization else None
    better = {**stages, **{stage: _BETTER[stages[stage]] for stage in blamed}}
    kept = mix is not None and "patcher" not in blamed
    if kept:  # the search makes of 8 bits what it can
        better["patcher"] = "int8w"
    step = f"--precision {format_precision(better)}"
    if mix is not None and kept:
        step += f" --target-boundaries {mix.target:g}"
    calibration = manifest.quantization and manifest.quantization.calibration
    if calibration and calibration.smooth is None and "int8" in {stages[stage] for stage in blamed}:
        step = f"--smooth {_SMOOTH}, or {step}"
    return f"{step}: {why}"

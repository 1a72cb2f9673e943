"""blt_edge.export: checkpoints to bundles, and bundles compared with their reference."""

from .build_ort import build_engine
from .checkpoint import Checkpoint, CheckpointError, open_checkpoint
from .export import ExportPlan, export_checkpoint, plan_export
from .quantize import QuantizationOptions, quantize_bundle

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "ExportPlan",
    "QuantizationOptions",
    "build_engine",
    "export_checkpoint",
    "open_checkpoint",
    "plan_export",
    "quantize_bundle",
]

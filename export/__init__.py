"""blt_edge.export: checkpoints to bundles, and bundles compared with their reference."""

from .checkpoint import Checkpoint, CheckpointError, open_checkpoint
from .engines import build_engine
from .export import ExportPlan, export_checkpoint, plan_export
from .quantization import QuantizationOptions
from .quantize import quantize_bundle

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

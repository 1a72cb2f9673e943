"""blt_edge.export: checkpoints to bundles, and bundles compared with their reference."""

from .checkpoint import Checkpoint, CheckpointError, open_checkpoint
from .export import ExportPlan, export_checkpoint, plan_export

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "ExportPlan",
    "export_checkpoint",
    "open_checkpoint",
    "plan_export",
]

"""blt_edge.runtime: run a BLT bundle. Needs numpy and an inference engine, never torch or onnx."""

from .errors import BackendError, BltError, BundleError, OptionError, PromptTooLongError
from .generation import FinishReason, GenerationChunk, GenerationResult, GenerationStats
from .model import DEVICES, BltModel
from .options import GenerationOptions
from .scoring import ByteDetail, Score
from .sequence import Sequence

__all__ = [
    "DEVICES",
    "BackendError",
    "BltError",
    "BltModel",
    "BundleError",
    "ByteDetail",
    "FinishReason",
    "GenerationChunk",
    "GenerationOptions",
    "GenerationResult",
    "GenerationStats",
    "OptionError",
    "PromptTooLongError",
    "Score",
    "Sequence",
]

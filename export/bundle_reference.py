"""A float32 bundle as the reference of those made from it: what `quantize` compares its result with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..runtime.errors import OptionError
from ..runtime.manifest import load_manifest
from ..runtime.model import BltModel
from ..runtime.options import GenerationOptions

__all__ = ["BundleReference"]

Floats = npt.NDArray[np.float32]


class BundleReference:
    """A loaded float32 bundle, asked like `Reference`."""

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
        """What reports call it."""
        return f"the float32 bundle {self._model.path.name}"

    @property
    def threshold(self) -> float | None:
        """The entropy above which the next byte starts a patch, in nats; None under any other rule."""
        rule = self._model.manifest.patching
        alone = rule.mode == "entropy" and not (rule.monotonic or rule.threshold_add)
        return rule.threshold if alone else None

    def trace(self, data: bytes) -> Mapping[str, Floats]:
        """See `BltModel.trace`."""
        return self._model.trace(data)

    def patch_lengths(self, data: bytes) -> list[int]:
        """Lengths of the patches over BOS and `data`."""
        return self._model.patch_lengths(data)

    def logits(self, data: bytes) -> Floats:
        """[1 + n, 260] float32."""
        return self._model.trace(data)["logits"]

    def greedy(self, prompt: bytes, count: int) -> bytes:
        """The `count` most likely next bytes, fewer where the model ends the text."""
        return self._model.generate(prompt, GenerationOptions(max_new_bytes=count)).data

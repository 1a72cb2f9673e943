"""Reading tensors out of a PyTorch `.pth` file without running what its pickle says.

Needs torch, imported when a file is opened. `weights_only` restricts the pickle to tensors and plain
containers, and the file is mapped, so that only what is asked for is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.errors import first_line
from .checkpoint_base import CheckpointError, one_line, sample_blocks

__all__ = ["TorchFile"]

_WRAPPERS = ("model", "state_dict")


class TorchFile:
    """One `.pth` file's state dict, at the top or under `model` or `state_dict`. Raises `CheckpointError`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            import torch
        except ImportError as error:
            raise CheckpointError(
                f"{path}: reading a .pth file needs torch: pip install 'blt-edge[validate]'"
            ) from error
        self._torch = torch
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # a damaged or hostile pickle can raise nearly anything
            told = first_line(error)[:200]
            raise CheckpointError(f"{path}: not a readable file of plain tensors: {told}") from error
        for wrapper in _WRAPPERS:
            if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
                loaded = loaded[wrapper]
        if not isinstance(loaded, Mapping):
            raise CheckpointError(f"{path}: holds {type(loaded).__name__}, expected a dict of tensors")
        self._tensors: dict[str, Any] = {
            str(name): value for name, value in loaded.items() if isinstance(value, torch.Tensor)
        }

    def names(self) -> tuple[str, ...]:
        """Names of the stored tensors."""
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> str:
        """float16, bfloat16 or float32; any other stored type is refused."""
        torch, tensor = self._torch, self._tensors[name]
        names = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
        if tensor.dtype not in names or tensor.layout is not torch.strided or tensor.device.type != "cpu":
            raise CheckpointError(
                f"{self.path}: tensor {one_line(name)} is {tensor.dtype}, {tensor.layout}, on "
                f"{tensor.device}; allowed: dense {', '.join(names.values())}"
            )
        return names[tensor.dtype]

    def read(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) as a new float32 array."""
        self.dtype(name)
        tensor = self._tensors[name]
        part = tensor[start:stop] if tensor.ndim else tensor
        copy = part.detach().to(self._torch.float32, copy=True).contiguous()
        array: NDArray[np.float32] = copy.numpy()
        return array

    def fingerprint(self, digest: Any) -> None:
        """Feed size and sampled contents to a hashlib object."""
        sample_blocks(self.path, digest)

    def close(self) -> None:
        """Release the mapping."""
        self._tensors = {}

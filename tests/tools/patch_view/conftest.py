"""Cut texts without a model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from blt_edge.runtime.patching import PatchingRule
from blt_edge.tools.patch_view.view import PatchView, cut

MakeView = Callable[..., PatchView]

ODD = (
    "Alice|été, 你好。 مرحبا नमस्ते 한국어 한 cafe\u0301 👩‍👩‍👧 🇩🇪 👍🏽\t\r\n"
    "<script>alert('&')</script>\u202ex\u00a0$x^2$ \U0001fbc5"
).encode() + bytes(range(256))
"""Many scripts, marks, joined emoji, markup, direction overrides, every byte value."""


@pytest.fixture
def odd_text() -> bytes:
    return ODD


@pytest.fixture
def make_view() -> MakeView:
    """`make_view(data, share=0.3, **rule)`: random entropies, about `share` of them over the threshold."""

    def make(
        data: bytes, *, share: float = 0.3, patcher: bool = True, seed: int = 0, **rule: object
    ) -> PatchView:
        values = np.random.default_rng(seed).uniform(0, 4, len(data) + 1).astype(np.float32)
        options = {"mode": "entropy", "threshold": 4 * (1 - share), **rule}
        return cut(data, PatchingRule(**options), values if patcher else None)  # type: ignore[arg-type]

    return make

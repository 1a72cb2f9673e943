"""What is computed for several texts at once is compared with each alone, whatever computes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from blt_edge.export import export_checkpoint
from blt_edge.export.build_ort import build_engine
from blt_edge.runtime import BltModel
from blt_edge.runtime.backends.base import EngineLimits, PackedPart, PackedStage
from blt_edge.runtime.engines import engine_limits
from blt_edge.runtime.errors import BackendError
from blt_edge.runtime.names import STAGES
from blt_edge.runtime.packed_check import check_packed
from support.random_models import write_random_model
from support.state_walks import WIDE


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BltModel]:
    folder = tmp_path_factory.mktemp("packed")
    write_random_model(WIDE, folder / "checkpoint")
    bundle = export_checkpoint(folder / "checkpoint", folder / "bundle", rows=(2, 4))
    build_engine(bundle, rows=(2, 4))
    return {
        layout: BltModel.load(bundle, "cpu", 1, portable=layout == "ring") for layout in ("ring", "ordered")
    }


def check(model: BltModel, stage: str, packed: PackedStage, texts: int, **limits: int) -> None:
    reach = replace(engine_limits(model.manifest), **limits)
    check_packed(model.manifest, stage, model._backends[stage], packed, texts, reach)


@pytest.mark.parametrize("layout", ["ring", "ordered"])
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_right_passes(models: dict[str, BltModel], layout: str, stage: str) -> None:
    model = models[layout]
    for texts in (2, 4):
        check(model, stage, model._backends[stage].packed(texts), texts)
    # A text of one position, patches of one byte, passes of one byte.
    small = EngineLimits(1, 1, 1, prefill_chunk=1, rollback=0)
    check_packed(model.manifest, stage, model._backends[stage], model._backends[stage].packed(4), 4, small)


class Wrong:
    """A packed stage of which `spoil` changes what the texts get."""

    def __init__(self, packed: PackedStage, spoil: Callable[[Sequence[PackedPart]], object]) -> None:
        self._packed, self._spoil = packed, spoil
        self.release = packed.release

    def run(self, parts: Sequence[PackedPart]) -> float:
        seconds = self._packed.run(parts)
        self._spoil(parts)
        return seconds


def swap(parts: Sequence[PackedPart]) -> None:
    """The first text's last position becomes the last text's."""
    for name, values in parts[0].call.outputs.items():
        if name != "new_kv":
            values[0, -1] = parts[-1].call.outputs[name][0, -1]


def forget(parts: Sequence[PackedPart]) -> None:
    """New keys and values of one text are lost."""
    parts[1].call.outputs["new_kv"][...] = 0


def no_number(parts: Sequence[PackedPart]) -> None:
    next(iter(parts[1].call.outputs.values()))[...] = np.nan


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("spoil", [swap, forget, no_number])
def test_what_is_wrong_is_named(
    models: dict[str, BltModel], stage: str, spoil: Callable[[Sequence[PackedPart]], object]
) -> None:
    model = models["ring"]
    wrong = Wrong(model._backends[stage].packed(4), spoil)
    with pytest.raises(BackendError, match=f"^{stage}, 4 texts at once: .* from what each alone gives"):
        check(model, stage, wrong, 4)

"""Random checkpoints with what is known of them: reference, golden file and greedy sample, each made once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from blt_edge.export.reference import Reference
from blt_edge.runtime import BltModel
from blt_edge.runtime.patching import PatchingRule

from .goldens import GreedySample, ParityGolden, read_golden
from .numpy_blt import load_reference
from .random_models import RandomModel, write_random_model

__all__ = ["RandomModels", "altered"]


def altered(model: BltModel, rule: PatchingRule | None = None, **limits: int) -> BltModel:
    """A loaded model with another patching rule or other limits, such as `rollback`."""
    manifest = model.manifest if rule is None else replace(model.manifest, patching=rule)
    return BltModel(
        manifest, model._backends, model._table, replace(model.limits, **limits), model.path, model.engine
    )


class RandomModels:
    """Checkpoints under one folder, by name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._references: dict[str, Reference] = {}
        self._goldens: dict[str, ParityGolden] = {}

    def folder(self, model: RandomModel) -> Path:
        """The checkpoint's folder, written at the first call."""
        folder = self._folder / model.name
        if not (folder / "config.json").exists():
            write_random_model(model, folder)
        return folder

    def reference(self, model: RandomModel) -> Reference:
        """transformers' view of the checkpoint, or numpy's where transformers is not installed."""
        if model.name not in self._references:
            self._references[model.name] = load_reference(self.folder(model))
        return self._references[model.name]

    def golden(self, model: RandomModel) -> ParityGolden:
        """What transformers once computed of a parity case."""
        if model.name not in self._goldens:
            self._goldens[model.name] = read_golden(model, self.folder(model))
        return self._goldens[model.name]

    def greedy(self, model: RandomModel, count: int) -> GreedySample:
        """A parity case's prompt and the `count` greedy bytes after it."""
        whole = self.golden(model).greedy
        assert len(whole.data) >= count
        return GreedySample(whole.prompt, whole.data[:count])

"""The modules that are mutated, and the tests that each has to answer to: those beside it."""

from __future__ import annotations

__all__ = ["TARGETS", "tests_of"]

_STAGES = ("graphs/test_stages",)
_CONFIG = ("graphs/test_config",)

TARGETS: dict[str, tuple[str, ...]] = {
    "runtime.cache": ("runtime/test_cache",),
    "runtime.hashing": ("runtime/test_hashing",),
    "runtime.sampling": ("runtime/test_sampling",),
    "runtime.scoring": ("runtime/test_scoring", "runtime/test_model"),
    "runtime.stopping": ("runtime/test_stopping",),
    "runtime.patching": ("runtime/test_patching",),
    "runtime.sequence": ("runtime/test_sequence",),
    "runtime.speculation": ("runtime/test_speculation",),
    "runtime.generation": ("runtime/test_generation", "runtime/test_continuing"),
    "graphs.rope": ("graphs/test_rope",),
    "graphs.config": _CONFIG,
    "graphs._fields": ("graphs/test_fields",),
    "graphs._inert": _CONFIG,
    "graphs.layers": _STAGES,
    "graphs.latent": _STAGES,
    "graphs.decoder": _STAGES,
    "graphs.encoder": _STAGES,
    "graphs.patcher": _STAGES,
    "graphs.stages": _STAGES,
    "graphs.weights": _STAGES,
}


def tests_of(target: str) -> list[str]:
    """Paths of the target's tests from the project's root."""
    return [f"tests/{name}.py" for name in TARGETS[target]]

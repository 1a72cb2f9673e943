"""Generations that never were, with round numbers, and profiles of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from blt_edge.runtime import GenerationStats
from blt_edge.runtime.embedding_spec import EmbeddingSpec
from blt_edge.runtime.manifest import FileRecord, Manifest, ModelSpec, StageSpec
from blt_edge.tools.profile.ceiling import Bandwidth
from blt_edge.tools.profile.measure import Profile, ProfileOptions
from blt_edge.tools.profile.recorder import Arrival, Recording, StageEvent
from blt_edge.tools.profile.statistics import Case, Run, summarize

from .bundles import describe

__all__ = ["STAGES", "demo_manifest", "make_bandwidth", "make_case", "make_profile", "make_round"]

STAGES = ("patcher", "encoder", "latent", "decoder")
_DEMO = Path(__file__).parents[2] / "export" / "demo" / "config.json"


def demo_manifest() -> Manifest:
    """The description of the bundled demo's float32 bundle, as far as costs go."""
    shapes = {
        "patcher": (2, 4, 128, 1_873_920, None),
        "encoder": (1, 3, 128, 1_622_016, None),
        "latent": (3, 4, None, 10_665_984, 1536),
        "decoder": (4, 3, 128, 7_867_392, 1536),
    }
    stages, files = {}, {}
    for name, (layers, heads, window, size, values) in shapes.items():
        data = f"{name}.onnx.data"
        spec = (f"{name}.onnx", data, "fp32", layers, heads, 32, window, 16384, size // 4, values)
        stages[name], files[data] = StageSpec(*spec), FileRecord(size, "", "")
    manifest = describe()
    return replace(
        manifest,
        source=replace(manifest.source, name="demo", config=json.loads(_DEMO.read_text())),
        model=ModelSpec(260, 192, 2, 16384, 1024, {}),
        embedding=EmbeddingSpec("tables.bin", "float16", 192, 260, (3, 4, 5, 6, 7, 8), 1, 2053),
        stages=stages,
        files=files,
    )


def make_round(start: float = 100.0, slower: float = 1.0, **stats: Any) -> Recording:
    """A prompt of 4 bytes in two chunks, three new bytes: two steps of `slower` seconds each, of which the
    second ends a patch.
    """

    step, first = 1.2 + slower, stats.get("prompt_bytes", 4) - 1
    runs = {
        "patcher": [(0.0, 0.1, first), (0.7, 0.1, 2), (1.2, 0.1, 1), (step, 0.1, 1)],
        "encoder": [(0.1, 0.1, first), (0.8, 0.05, 2), (1.3, 0.1, 1), (step + 0.1, 0.1, 1)],
        "latent": [(0.2, 0.2, 2), (step + 0.2, 0.3, 1)],
        "decoder": [(0.4, 0.2, first), (0.85, 0.05, 2), (1.4, 0.2, 1), (step + 0.5, 0.2, 1)],
    }
    events = [
        StageEvent(stage, start + moment, seconds, rows)
        for stage, every in runs.items()
        for moment, seconds, rows in every
    ]
    events.sort(key=lambda event: event.start)
    end = step + slower
    given = {"prompt_bytes": 4, "new_bytes": 3, "patches": 4, "state_bytes": 5000, **stats}
    given = {"prefill_seconds": 1.0, "first_byte_seconds": 1.2, "decode_seconds": end - 1.0, **given}
    arrivals = (Arrival(start + 1.2, 1, 7), Arrival(start + step, 1, 10), Arrival(start + end, 1, 14))
    return Recording(start, tuple(events), arrivals, GenerationStats(**given), "length")


def make_case(*rounds: Recording, threads: int | None = 2, draft: str = "none", **changes: Any) -> Case:
    """A case of these rounds (one when none is given) on a memory of 1 GB/s."""
    run = Run(threads, draft, 0.5, None, 0.0, 2_000_000, None, rounds or (make_round(),))
    return replace(summarize(run, demo_manifest(), make_bandwidth()), **changes)


def make_bandwidth(cache_bytes: int = 1 << 20) -> Bandwidth:
    """1 GB/s."""
    return Bandwidth(1e9, 2, 1 << 28, cache_bytes, 6, "CPU", "by hand")


def make_profile(*cases: Case, **options: Any) -> Profile:
    """A profile of these cases (one when none is given)."""
    cases = cases or (make_case(),)
    threads = tuple(dict.fromkeys(case.threads for case in cases))
    asked = ProfileOptions(threads=threads, **{"new_bytes": 3, "prompt_bytes": (4,), **options})
    return Profile(
        path="demo-bundle",
        manifest=demo_manifest(),
        engine="portable graphs",
        prefill_chunk=256,
        options=asked,
        text_bytes=1000,
        machine={"processor": "Abacus", "system": "Linux x86_64", "cpus": 2, "onnxruntime": "1.0"},
        jetson=None,
        raspberry_pi=None,
        peaks_reset=True,
        cases=cases,
    )

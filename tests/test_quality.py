"""What the mixes that a word stands for keep of the demo: on English, and on a text of many scripts.

Parts of both texts only, to take seconds; `blt-edge compare` reads all of them for the README.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from blt_edge.calibration.collect import DEFAULT_METHOD, collect_observations
from blt_edge.calibration.observers import METHODS
from blt_edge.export import export_checkpoint
from blt_edge.export.quality import Tally
from blt_edge.export.quantize import QuantizationOptions, quantize_bundle
from blt_edge.graphs.precision import MIXES
from blt_edge.tools.compare.bundles import BundleReport, CompareOptions, compare_bundles

DATA = Path(__file__).parent / "data"
TEXTS = {name: (DATA / name).read_bytes() for name in ("alice.txt", "udhr_sample.txt")}
# Eight windows of the trained context, spread over each text. Speed is not looked at.
OPTIONS = CompareOptions(max_bytes=8 * 1023, prompts=0, new_bytes=1, repeat=1, threads=1)
MORE_BITS = {"fp16": 0.002, "int8": 0.02, "int8w": 0.02, "int4": 0.05}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BundleReport]:
    """By the bundle's name; each word's mix has int8 tables but for fp16."""
    folder = tmp_path_factory.mktemp("quality")
    bundles = [export_checkpoint("demo", folder / "fp32")]
    # Read once: every method reads its ranges from the same observations.
    stages = [stage for stage, precision in MIXES["int8"].items() if precision == "int8"]
    seen = collect_observations(bundles[0], stages=stages, threads=1)
    for name in (*MORE_BITS, *(f"int8-{method}" for method in METHODS if method != DEFAULT_METHOD)):
        word, _, method = name.partition("-")
        ranges = seen.ranges(method or DEFAULT_METHOD) if word == "int8" else None
        bundles.append(
            quantize_bundle(
                bundles[0],
                folder / name,
                precision=word,
                tables=None if word == "fp16" else "int8",
                quantization=QuantizationOptions(ranges=ranges),
            )
        )
    comparison = compare_bundles(bundles, TEXTS, OPTIONS)
    return {bundle.name: report for bundle, report in zip(bundles, comparison.bundles, strict=True)}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("word", MORE_BITS)
def test_a_mix_keeps_predictions_and_boundaries(
    reports: dict[str, BundleReport], word: str, text: str
) -> None:
    plain, mix = reports["fp32"].texts[text], reports[word].texts[text]
    assert mix.bytes > 8000
    assert mix.bits_per_byte - plain.bits_per_byte <= MORE_BITS[word]
    assert mix.expected_boundaries > 1000
    assert mix.false_boundaries <= 0.01
    assert mix.missed_boundaries <= 0.01


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("method", [method for method in METHODS if method != "minmax"])
def test_every_method_is_better_than_clipping_nothing(
    reports: dict[str, BundleReport], method: str, text: str
) -> None:
    def tally(name: str) -> Tally:
        return reports[name].texts[text]

    found = tally("int8" if method == DEFAULT_METHOD else f"int8-{method}")
    assert found.mean_divergence < tally("int8-minmax").mean_divergence
    assert found.bits_per_byte - tally("fp32").bits_per_byte <= MORE_BITS["int8"]

"""Comparing whole bundles: figures against logits, boundaries and greedy texts computed here."""

from __future__ import annotations

import json
import os
import shutil
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blt_edge.export.quality import Tally
from blt_edge.runtime import BltModel, BundleError, GenerationOptions, OptionError
from blt_edge.runtime.child import Outcome
from blt_edge.runtime.errors import BltError
from blt_edge.tools.compare import bundles as module
from blt_edge.tools.compare.bundles import (
    BundleReport,
    CompareError,
    CompareOptions,
    Comparison,
    compare_bundles,
    draw_comparison,
)
from support.random_models import PARITY_TEXT, RandomModel, base_config, write_random_model

TEXTS = {"english": PARITY_TEXT[:250], "scripts": PARITY_TEXT[700:900]}
OPTIONS = CompareOptions(
    context=101, prompts=3, lead_bytes=10, prompt_bytes=40, new_bytes=8, repeat=1, threads=1
)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same model with float32 and int4 tables."""
    from blt_edge.export import export_checkpoint

    folder = tmp_path_factory.mktemp("compare")
    config = base_config(encoder={"max_position_embeddings": 400})
    write_random_model(RandomModel("tiny", config, share=0.3), folder / "checkpoint")
    return [
        export_checkpoint(folder / "checkpoint", folder / tables, tables=tables)
        for tables in ("fp32", "int4")
    ]


@pytest.fixture(scope="module")
def comparison(bundles: list[Path]) -> Comparison:
    return compare_bundles(bundles, TEXTS, OPTIONS)


def windows(data: bytes) -> list[bytes]:
    return [data[at : at + 100] for at in range(0, len(data), 100)]


def test_predictions(bundles: list[Path], comparison: Comparison) -> None:
    models = [BltModel.load(bundle, threads=1) for bundle in bundles]
    for name, text in TEXTS.items():
        pairs, targets = [], []
        for window in windows(text):
            pairs.append([model.logits(window)[:-1] for model in models])
            targets += [byte + 4 for byte in window]
        logits = (np.concatenate(part).astype(np.float64) for part in zip(*pairs, strict=True))
        # Bits, straight from the definition: these logits are far from overflow.
        first, second = (np.log2(np.exp(part) / np.exp(part).sum(1, keepdims=True)) for part in logits)
        kl = (np.exp2(first) * (first - second)).sum(1).mean()
        losses = [-part[np.arange(len(targets)), targets].mean() for part in (first, second)]
        same = (first.argmax(1) == second.argmax(1)).mean()
        base, other = (report.texts[name] for report in comparison.bundles)
        assert base.bytes == other.bytes == comparison.text_bytes[name] == len(text)
        assert base.bits_per_byte == pytest.approx(float(losses[0]), rel=1e-6)
        assert other.bits_per_byte == pytest.approx(float(losses[1]), rel=1e-6)
        assert other.mean_divergence == pytest.approx(float(kl), rel=1e-4)
        assert other.argmax_agreement == float(same) < 1
        assert (base.mean_divergence, base.argmax_agreement, base.boundary_recall) == (0, 1, 1)


def test_boundaries_are_those_of_the_models(bundles: list[Path], comparison: Comparison) -> None:
    models = [BltModel.load(bundle, threads=1) for bundle in bundles]
    for name, text in TEXTS.items():
        own = common = 0
        for window in windows(text):
            lengths = [model.patch_lengths(window) for model in models]
            first, second = (set(np.cumsum(part).tolist()) - {1, len(window) + 1} for part in lengths)
            own += len(second)
            common += len(first & second)
        tally = comparison.bundles[1].texts[name]
        assert (tally.boundaries, tally.common_boundaries) == (own, common)
        assert own > 10


def test_greedy_lead(bundles: list[Path], comparison: Comparison) -> None:
    prompts = module._prompts(list(TEXTS.values()), 3)
    assert len(prompts) == 3
    options = GenerationOptions(max_new_bytes=10)
    models = [BltModel.load(bundle, threads=1) for bundle in bundles]
    for index, prompt in enumerate(prompts):
        first, second = (model.generate(prompt, options).data for model in models)
        same = [a == b for a, b in zip(first, second, strict=False)]
        lead = (*same, False).index(False)
        assert comparison.bundles[0].greedy_leads[index] == (len(first), len(first))
        assert comparison.bundles[1].greedy_leads[index] == (lead, len(first))


def test_sizes_speed_and_memory(bundles: list[Path], comparison: Comparison) -> None:
    for bundle, report in zip(bundles, comparison.bundles, strict=True):
        on_disk = {path.name: path.stat().st_size for path in bundle.iterdir()}
        assert report.table_bytes == on_disk["tables.bin"]
        assert report.graph_bytes == sum(size for name, size in on_disk.items() if ".onnx" in name)
        assert report.prefill_bytes_per_second > 0
        assert report.decode_bytes_per_second > 0
        if Path("/proc/self/smaps").exists():
            assert 10_000_000 < report.peak_private < report.peak_resident < 1_000_000_000
            assert 0 < report.tables_resident <= report.table_bytes + 4096
    assert [report.tables for report in comparison.bundles] == ["fp32", "int4"]


def test_it_is_json(comparison: Comparison) -> None:
    document = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    second = document["bundles"][1]
    assert second["total"]["sums"]["bytes"] == 450
    assert second["texts"]["english"]["boundary_recall"] <= 1
    assert document["machine"]["cpus"] == os.cpu_count()


def test_another_checkpoint_is_noted(bundles: list[Path], tmp_path: Path) -> None:
    from blt_edge.export import export_checkpoint

    config = base_config(encoder={"max_position_embeddings": 400})
    write_random_model(RandomModel("other", config, share=0.3, seed=1), tmp_path / "checkpoint")
    other = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle")
    report = compare_bundles([bundles[0], other], {"t": b"some text"}, OPTIONS).bundles[1]
    assert report.note == "made from another checkpoint than the first bundle"


def test_progress_names_bundle_and_phase(bundles: list[Path]) -> None:
    said: dict[str, None] = {}
    compare_bundles(bundles[:1], {"t": b"text"}, OPTIONS, lambda what, done, total: said.update({what: None}))
    assert [*said] == [f"fp32: {phase}" for phase in ("loading", "timing", "greedy texts", "text 1 of 1")]


# What can't be compared.


@pytest.mark.parametrize(
    ("texts", "options", "line"),
    [
        ({}, {}, "there is no text to compare on"),
        ({"a.txt": b""}, {}, "text a.txt is empty"),
        ({"a": b"x"}, {"context": 401}, "context: got 401, .*fp32 has 400 positions"),
    ],
)
def test_refusals(bundles: list[Path], texts: dict[str, bytes], options: dict[str, int], line: str) -> None:
    with pytest.raises(OptionError, match=line):
        compare_bundles(bundles, texts, CompareOptions(**options))


@pytest.mark.parametrize("name", ["context", "max_bytes", "prompts", "lead_bytes", "new_bytes", "threads"])
@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_options_out_of_range(name: str, value: object) -> None:
    with pytest.raises(OptionError, match=f"{name} is {value}; allowed is a whole number from"):
        CompareOptions(**{name: value})


def test_a_damaged_bundle_is_named(bundles: list[Path], tmp_path: Path) -> None:
    broken = Path(shutil.copytree(bundles[0], tmp_path / "broken"))
    with (broken / "latent.onnx.data").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CompareError, match=r"latent\.onnx\.data"):
        compare_bundles([bundles[0], broken], {"t": b"text"}, OPTIONS)
    (broken / "manifest.json").write_text("{}")
    with pytest.raises(BundleError):
        compare_bundles([broken], {"t": b"text"}, OPTIONS)


@pytest.mark.parametrize(
    ("outcome", "kind", "line"),
    [
        (Outcome(death="crashed (SIGSEGV)"), CompareError, r"its process crashed \(SIGSEGV\); close other"),
        (Outcome(error=MemoryError()), CompareError, "out of memory"),
        (Outcome(error=OptionError("threads")), OptionError, "threads"),
        (Outcome(error=BltError("broken")), CompareError, "broken"),
    ],
)
def test_a_process_that_ends_early(
    bundles: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    outcome: Outcome,
    kind: type[BltError],
    line: str,
) -> None:
    monkeypatch.setattr(module, "run_child", lambda *_: outcome)
    with pytest.raises(kind, match=line):
        compare_bundles(bundles[:1], {"t": b"text"}, OPTIONS)


def test_no_room_for_predictions(bundles: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(CompareError, match="predictions need 4160 bytes, 1 are free; set TMPDIR"):
        compare_bundles(bundles, {"t": b"text"}, OPTIONS)


# Which parts of a text are read.


@pytest.mark.parametrize(
    ("length", "most", "expected"),
    [
        (25, None, [(0, 10), (10, 20), (20, 25)]),
        (25, 100, [(0, 10), (10, 20), (20, 25)]),
        (100, 35, [(0, 10), (30, 40), (60, 70)]),
        (100, 10, [(0, 10)]),
        (100, 7, [(0, 7)]),
        (1, None, [(0, 1)]),
    ],
)
def test_windows(length: int, most: int | None, expected: list[tuple[int, int]]) -> None:
    assert module._windows(length, 10, most) == expected


def test_prompts_take_turns_and_begin_with_characters() -> None:
    texts = ["ไทย".encode() * 100, b"ascii " * 100]
    prompts = module._prompts(texts, 20)
    assert len(prompts) == 20
    assert len(set(prompts[::2])) > 1
    for prompt in prompts[::2]:
        assert prompt.decode("utf-8", "ignore")[0] in "ไทย"
        assert prompt[0] & 0xC0 != 0x80
    assert all(b"ascii" in prompt for prompt in prompts[1::2])
    assert module._prompts([b"x"], 2) == [b"x", b"x"]


# The picture.

NEEDS_MATPLOTLIB = "needs matplotlib: pip install 'blt-edge[plot]'"


def drawn_comparison(*bits: float) -> Comparison:
    reports = [
        BundleReport(
            path=f"/some/where/bundle-{index}",
            precisions={"encoder": "fp32"},
            tables="fp16",
            graph_bytes=10_000_000 // (index + 1),
            table_bytes=5_000_000,
            texts={name: Tally(bytes=1000, bits=1000 * value) for name in ("a <b>.txt", "c$d$.txt")},
            greedy_leads=[(3, 4)],
            prefill_bytes_per_second=1000.0,
            decode_bytes_per_second=100.0 * (index + 1),
            load_seconds=1.0,
            peak_resident=None,
            peak_private=None,
            tables_resident=None,
        )
        for index, value in enumerate(bits)
    ]
    sizes = {"a <b>.txt": 1000, "c$d$.txt": 1000}
    return Comparison(reports, CompareOptions(), 128, sizes, {"processor": "Some Processor", "cpus": 2})


@pytest.mark.parametrize("bits", [(1.5, 1.51, 1.7), (1.5, 1.5), (1.5,)])
def test_a_picture(tmp_path: Path, bits: tuple[float, ...]) -> None:
    pytest.importorskip("matplotlib", reason=NEEDS_MATPLOTLIB)
    draw_comparison(drawn_comparison(*bits), tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    draw_comparison(drawn_comparison(*bits), tmp_path / "out.svg")
    assert "bundle-0" in (tmp_path / "out.svg").read_text()


def test_points_lie_where_the_figures_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason=NEEDS_MATPLOTLIB)
    from matplotlib.axes import Axes

    drawn: list[Any] = []
    scatter = Axes.scatter

    def watched(self: Axes, across: Any, up: Any, **options: Any) -> Any:
        drawn.append((list(across), list(up), list(options["c"])))
        return scatter(self, across, up, **options)

    monkeypatch.setattr(Axes, "scatter", watched)
    draw_comparison(drawn_comparison(1.5, 1.6), tmp_path / "out.png")
    assert drawn == [([15.0, 10.0], [1.5, 1.6], [100.0, 200.0])] * 2


@pytest.mark.parametrize(
    "bits", [(1.8759, 1.8759, 1.8770, 1.8760, 1.8789), (1.5,) * 5, (1.5, 1.5001, 1.5, 9, 9.0001)]
)
def test_names_do_not_cover_each_other(bits: tuple[float, ...]) -> None:
    sizes = [27.3, 16.6, 9.1, 9.6, 7.3]
    places = module._places(sizes, list(bits))
    # 250 points for 1.4 of the range, or for 0.02 where that is more.
    point = max(1.4 * (max(bits) - min(bits)), 0.02) / 250
    for one, other in combinations(range(5), 2):
        if abs(sizes[one] - sizes[other]) < 5:
            heights = [bits[at] / point + places[at][1] for at in (one, other)]
            assert abs(heights[0] - heights[1]) >= 12


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BltError, match=r"pip install 'blt-edge\[plot\]'"):
        draw_comparison(drawn_comparison(1.5), tmp_path / "out.png")

"""Comparing whole bundles: figures against logits, boundaries and greedy texts computed here."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from blt_edge.export.quality import Tally
from blt_edge.runtime import BltModel, BundleError, GenerationOptions, OptionError
from blt_edge.runtime.child import Outcome
from blt_edge.runtime.errors import BltError
from blt_edge.tools.compare import bundles as module
from blt_edge.tools.compare.bundles import CompareError, CompareOptions, Comparison, compare_bundles
from support.random_models import PARITY_TEXT, RandomModel, base_config, write_random_model

TEXTS = {"english": PARITY_TEXT[:250], "scripts": PARITY_TEXT[700:900]}
OPTIONS = CompareOptions(
    context=101, prompts=3, lead_bytes=10, prompt_bytes=40, new_bytes=8, repeat=1, threads=1
)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same model with float32 and int4 tables, and another with float32."""
    from blt_edge.export import export_checkpoint

    folder = tmp_path_factory.mktemp("compare")
    config = base_config(encoder={"max_position_embeddings": 400})
    for seed in (0, 1):
        write_random_model(RandomModel("tiny", config, share=0.3, seed=seed), folder / f"checkpoint-{seed}")
    return [
        export_checkpoint(folder / f"checkpoint-{seed}", folder / name, tables=tables)
        for name, seed, tables in (("fp32", 0, "fp32"), ("int4", 0, "int4"), ("other", 1, "fp32"))
    ]


@pytest.fixture(scope="module")
def models(bundles: list[Path]) -> list[BltModel]:
    return [BltModel.load(bundle, threads=1) for bundle in bundles[:2]]


@pytest.fixture(scope="module")
def comparison(bundles: list[Path]) -> Comparison:
    return compare_bundles(bundles[:2], TEXTS, OPTIONS)


@pytest.mark.parametrize("name", TEXTS)
def test_predictions_and_boundaries(models: list[BltModel], comparison: Comparison, name: str) -> None:
    data = TEXTS[name]
    windows = [data[at : at + 100] for at in range(0, len(data), 100)]
    targets = [byte + 4 for byte in data]
    logits = (np.concatenate([model.logits(window)[:-1] for window in windows]) for model in models)
    # Bits, straight from the definition: these logits are far from overflow.
    exponentials = (np.exp(part.astype(np.float64)) for part in logits)
    first, second = (np.log2(part / part.sum(1, keepdims=True)) for part in exponentials)
    base, other = (report.texts[name] for report in comparison.bundles)
    assert base.bytes == other.bytes == comparison.text_bytes[name] == len(data)
    for tally, part in ((base, first), (other, second)):
        loss = -part[np.arange(len(targets)), targets].mean()
        assert tally.bits_per_byte == pytest.approx(float(loss), rel=1e-6)
    kl = (np.exp2(first) * (first - second)).sum(1).mean()
    assert other.mean_divergence == pytest.approx(float(kl), rel=1e-4)
    assert other.argmax_agreement == float((first.argmax(1) == second.argmax(1)).mean()) < 1
    assert (base.mean_divergence, base.argmax_agreement, base.missed_boundaries) == (0, 1, 0)
    own = common = 0
    for window in windows:
        lengths = [model.patch_lengths(window) for model in models]
        before, after = (set(np.cumsum(part).tolist()) - {1, len(window) + 1} for part in lengths)
        own += len(after)
        common += len(before & after)
    assert (other.boundaries, other.common_boundaries) == (own, common)
    assert own > 10


def test_greedy_lead(models: list[BltModel], comparison: Comparison) -> None:
    prompts = module._prompts(list(TEXTS.values()), 3)
    assert len(prompts) == 3
    for index, prompt in enumerate(prompts):
        first, second = (model.generate(prompt, GenerationOptions(max_new_bytes=10)).data for model in models)
        lead = (*(a == b for a, b in zip(first, second, strict=False)), False).index(False)
        leads = [report.greedy_leads[index] for report in comparison.bundles]
        assert leads == [(len(first), len(first)), (lead, len(first))]


def test_sizes_speed_memory_and_json(bundles: list[Path], comparison: Comparison) -> None:
    assert [report.tables for report in comparison.bundles] == ["fp32", "int4"]
    for bundle, report in zip(bundles, comparison.bundles, strict=False):
        on_disk = {path.name: path.stat().st_size for path in bundle.iterdir()}
        assert report.table_bytes == on_disk["tables.bin"]
        assert report.graph_bytes == sum(size for name, size in on_disk.items() if ".onnx" in name)
        assert min(report.prefill_bytes_per_second, report.decode_bytes_per_second) > 0
        if Path("/proc/self/smaps").exists():
            assert 10_000_000 < report.peak_private < report.peak_resident < 1_000_000_000
            assert 0 < report.tables_resident <= report.table_bytes + 4096
    document = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    second = document["bundles"][1]
    assert second["total"]["sums"]["bytes"] == 450
    assert second["texts"]["english"]["missed_boundaries"] <= 1
    assert document["machine"]["cpus"] == os.cpu_count()


def test_progress_names_bundle_and_phase_and_another_checkpoint_is_noted(bundles: list[Path]) -> None:
    said: dict[str, None] = {}
    pair = [bundles[0], bundles[2]]
    compared = compare_bundles(pair, {"t": b"text"}, OPTIONS, lambda what, *_: said.update({what: None}))
    phases = ("loading", "timing", "greedy texts", "text 1 of 1")
    assert [*said] == [f"{name}: {phase}" for name in ("fp32", "other") for phase in phases]
    assert "another checkpoint" in str(compared.bundles[1].note)


# What can't be compared.


@pytest.mark.parametrize(
    ("texts", "options", "line"),
    [
        ({}, {}, "no text"),
        ({"a.txt": b""}, {}, r"a\.txt is empty"),
        ({"a": b"x"}, {"context": 401}, "context: got 401, .*fp32 has 400"),
        *(
            ({"a": b"x"}, {name: value}, f"{name} is {value}; allowed is")
            for name in ("context", "max_bytes", "prompts", "lead_bytes", "new_bytes", "threads")
            for value in (-1, 1.5, True)
        ),
    ],
)
def test_refusals(bundles: list[Path], texts: dict[str, bytes], options: dict[str, Any], line: str) -> None:
    with pytest.raises(OptionError, match=line):
        compare_bundles(bundles[:2], texts, CompareOptions(**options))


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
        (Outcome(death="crashed (SIGSEGV)"), CompareError, r"crashed \(SIGSEGV\)"),
        (Outcome(error=MemoryError()), CompareError, "out of memory"),
        (Outcome(error=OptionError("threads")), OptionError, "threads"),
        (Outcome(error=BltError("broken")), CompareError, "broken"),
    ],
)
def test_a_process_that_ends_early(
    bundles: list[Path], monkeypatch, outcome: Outcome, kind: type[BltError], line: str
) -> None:
    monkeypatch.setattr(module, "run_child", lambda *_: outcome)
    with pytest.raises(kind, match=line):
        compare_bundles(bundles[:1], {"t": b"text"}, OPTIONS)


def test_no_room_for_predictions(bundles: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(CompareError, match=r"need 4160 bytes.*TMPDIR"):
        compare_bundles(bundles[:2], {"t": b"text"}, OPTIONS)


# Which parts of a text are read.


@pytest.mark.parametrize(
    ("length", "most", "expected"),
    [
        (25, None, [(0, 10), (10, 20), (20, 25)]),
        (25, 100, [(0, 10), (10, 20), (20, 25)]),
        (100, 35, [(0, 10), (30, 40), (60, 70)]),
        (100, 7, [(0, 7)]),
        (1, None, [(0, 1)]),
    ],
)
def test_windows(length: int, most: int | None, expected: list[tuple[int, int]]) -> None:
    assert module._windows(length, 10, most) == expected


def test_prompts_take_turns_and_begin_with_characters() -> None:
    prompts = module._prompts(["ไทย".encode() * 100, b"ascii " * 100], 20)
    assert len(prompts) == 20
    assert len(set(prompts[::2])) > 1
    for prompt in prompts[::2]:
        assert prompt.decode("utf-8", "ignore")[0] in "ไทย"
        assert prompt[0] & 0xC0 != 0x80
    assert all(b"ascii" in prompt for prompt in prompts[1::2])
    assert module._prompts([b"x"], 2) == [b"x", b"x"]


# The picture.

NEEDS_MATPLOTLIB = "needs matplotlib: pip install 'blt-edge[plot]'"


@pytest.mark.parametrize("bits", [(1.5, 1.51, 1.7), (1.5, 1.5), (1.5,)])
def test_a_picture(tmp_path: Path, comparison: Comparison, bits: tuple[float, ...]) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'blt-edge[plot]'")
    from matplotlib.axes import Axes

    names = ("a <b>.txt", "c$d$.txt")
    reports = [
        replace(
            comparison.bundles[0],
            path=f"/some/where/bundle-{index}",
            graph_bytes=10_000_000 // (index + 1),
            table_bytes=5_000_000,
            texts={name: Tally(bytes=1000, bits=1000 * value) for name in names},
            decode_bytes_per_second=100.0 * (index + 1),
            **dict.fromkeys(("peak_resident", "peak_private", "tables_resident")),
        )
        for index, value in enumerate(bits)
    ]
    drawn = replace(comparison, bundles=reports, text_bytes=dict.fromkeys(names, 1000))
    module.draw_comparison(drawn, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with patch.object(Axes, "scatter", autospec=True, side_effect=Axes.scatter) as scatter:
        module.draw_comparison(drawn, tmp_path / "out.svg")
    assert "bundle-0" in (tmp_path / "out.svg").read_text()
    for call in scatter.call_args_list:
        assert [*call.args[1]] == pytest.approx([15.0, 10.0, 8.3333][: len(bits)], rel=1e-4)
        assert ([*call.args[2]], [*call.kwargs["c"]]) == ([*bits], [100.0, 200.0, 300.0][: len(bits)])
    assert scatter.call_count == 2


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

"""The pure pieces of the comparison with other engines: no engine runs here."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

import pytest
from blt_edge.runtime import BltModel
from blt_edge.runtime.vocabulary import encode
from blt_edge.tools.bench import peers
from blt_edge.tools.bench.common import BenchError, ModelCard, Speeds, Task, TokenBudget, need
from blt_edge.tools.bench.llama_cpp import LLAMA_1B, LlamaCppSpec, LlamaShape, write_random_llama
from blt_edge.tools.bench.peers import Measured, Worker, show
from blt_edge.tools.bench.speculation import Simulated, read_on

SMALL = LlamaShape(layers=2, width=64, heads=4, kv_heads=2, ffn=96, vocabulary=300)


class FakePeer:
    """Answers with the length of what it is given."""

    card = ModelCard("fake", 1, 2, "test")

    def run(self, task: Task) -> Speeds:
        if task.new_bytes > 100:
            raise BenchError("too many")
        return Speeds(len(task.prompt), task.new_bytes)


class FakeSpec:
    """Loads in another process; fails there as it is told."""

    name = "fake"
    memory_bytes = 0

    def __init__(self, failure: str = "") -> None:
        self.failure = failure

    def open(self) -> FakePeer:
        if self.failure == "dies":
            os._exit(3)
        if self.failure:
            raise BenchError(self.failure)
        return FakePeer()


def measured(name: str, *decode: float) -> Measured:
    return Measured(ModelCard(name, 5_000_000, 2_000, "test"), [Speeds(10.0, value) for value in decode])


def test_the_table_has_a_row_an_engine_and_a_ratio_a_bundle(capsys: pytest.CaptureFixture[str]) -> None:
    """Ratios are taken round by round."""
    tables = replace(measured("a").card, table_parameters=3_000_000_000, table_bytes=7_000_000)
    rows = [Measured(tables, measured("a", 20, 40).rounds), measured("peer", 10, 10)]
    show(rows, ["a"])
    shown = capsys.readouterr().out
    for figure in ("5.0 M + 3.0 B tables", "2.0 KB + 7.0 MB tables", "10 (10 to 10)", "3 (2 to 4)"):
        assert figure in shown
    document = rows[1].to_dict(rows, ["a"])
    times = {"median": 3, "low": 2, "high": 4, "mean": 3, "deviation": pytest.approx(2**0.5)}
    assert document["bundle_times_as_fast"] == {"a": times}
    assert document["decode_rounds"] == [10, 10]


def test_tokens_stand_for_bytes() -> None:
    budget = TokenBudget(threads=2, bytes_per_token=4.0, positions=512)
    ids = budget.prompt(Task(b"x" * 256, 128), vocabulary=1000)
    assert len(ids) == 64
    assert all(100 <= number < 1000 for number in ids)
    assert budget.tokens(1) == 2
    assert budget.speeds(10, 4.0, 30, 2.0) == Speeds(10.0, 60.0)


def test_a_missing_package_is_named_with_its_command() -> None:
    with pytest.raises(BenchError, match="pip install no-such-package-xyz"):
        need("no_such_package_xyz")


def test_the_1b_shape_counts_every_tensor() -> None:
    layer = 2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192 + 2 * 2048
    assert LLAMA_1B.parameters == 16 * layer + 49_152 * 2048 + 2048


def test_a_written_file_needs_no_other_and_reads_back(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'blt-edge[bench]'")
    write_random_llama(tmp_path / "random.gguf", SMALL)
    reader = gguf.GGUFReader(tmp_path / "random.gguf")
    assert reader.fields["llama.block_count"].contents() == SMALL.layers
    assert reader.fields["llama.attention.head_count_kv"].contents() == SMALL.kv_heads
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert len({*tokens}) == SMALL.vocabulary
    assert tokens[2:5] == ["</s>", "<0x00>", "<0x01>"]
    assert sum(int(tensor.n_elements) for tensor in reader.tensors) == SMALL.parameters
    embedding = reader.tensors[0]
    assert (embedding.name, embedding.tensor_type.name) == ("token_embd.weight", "Q4_0")
    assert list(embedding.shape) == [SMALL.width, SMALL.vocabulary]
    weights = gguf.dequantize(embedding.data, embedding.tensor_type)
    assert float(weights.std()) == pytest.approx(0.02, rel=0.2)
    assert [file.name for file in tmp_path.iterdir()] == ["random.gguf"]


def test_a_random_llama_asks_for_no_other_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "LLAMA_1B", SMALL)
    monkeypatch.setattr(peers, "smollm2", lambda: pytest.fail("smollm2 was not asked for"))
    written: list[Path] = []
    monkeypatch.setattr(peers, "write_random_llama", lambda path, shape: written.append(path))
    assert peers._gguf("random-1b", tmp_path) == written[0]


def test_llama_cpp_runs_a_random_llama(tmp_path: Path) -> None:
    for package in ("gguf", "xllamacpp"):
        pytest.importorskip(package, reason=f"needs {package}: pip install 'blt-edge[bench]'")
    write_random_llama(tmp_path / "random.gguf", SMALL)
    budget = TokenBudget(threads=1, bytes_per_token=4.0, positions=64)
    peer = LlamaCppSpec(tmp_path / "random.gguf", budget).open()
    speeds = peer.run(Task(b"x" * 64, 32))
    assert peer.card.parameters == SMALL.parameters
    assert min(speeds.prefill, speeds.decode) > 0


def test_a_peer_answers_from_its_own_process() -> None:
    with Worker(FakeSpec(), Task(b"", 1)) as worker:
        assert worker.card.name == "fake"
        assert worker.run(Task(b"abc", 5)) == Speeds(3, 5)
        with pytest.raises(BenchError, match="too many"):
            worker.run(Task(b"", 101))


@pytest.mark.parametrize(
    ("failure", "told"), [("no such file", "no such file"), ("dies", "fake: its process")]
)
def test_a_peer_that_cannot_load_says_why(failure: str, told: str) -> None:
    with pytest.raises(BenchError, match=told):
        Worker(FakeSpec(failure), Task(b"", 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bundle", "missing"], "missing"),
        (["--gguf", "missing.gguf"], "neither a file nor one of smollm2, random-1b"),
        (["--genai", "missing"], "neither a folder with genai_config.json nor random-1b"),
    ],
)
def test_a_mistake_is_one_line(arguments, message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    bundle = [] if "--bundle" in arguments else ["--bundle", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["peers", "--workdir", str(tmp_path), *bundle, *arguments])
    with pytest.raises(SystemExit) as caught:
        peers.main()
    assert caught.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


@pytest.mark.parametrize("case", ["none", "decoder:3:0.5", "patcher:3:1.0", "lookup:3:0.0"])
def test_reading_on_in_a_text(case: str, model: BltModel) -> None:
    simulated = Simulated.argument(case)
    text = bytes(range(32, 127)) * 3
    run = read_on(model, encode(text), 101, 60, simulated, seed=1)
    assert min(run.prefill, run.decode) > 0
    # What was read is the text, whatever was guessed.
    patches = model.patch_lengths(text[:159])
    assert run.bytes_per_patch == pytest.approx(59 / (len(patches) - len(model.patch_lengths(text[:100]))))
    if simulated.source != "none":
        assert run.figures.rounds > 0
        assert (run.figures.accepted == run.figures.drafted) == (simulated.rate == 1.0)


@pytest.mark.parametrize("case", ["nobody:1:1", "decoder", "decoder:x:1"])
def test_odd_simulations_are_refused(case: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="give none or SOURCE:LENGTH:RATE"):
        Simulated.argument(case)

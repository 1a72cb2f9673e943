"""`blt-edge score --ray`: the same results as without, and what is refused; the cluster is this process."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from blt_edge.runtime import BackendError, BltModel
from blt_edge.tools.corpus import cluster
from blt_edge.tools.corpus.engines import local_engine
from blt_edge.tools.corpus.texts import Engine, ScoredText, Text


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Mapping[str, Any]]]:
    """What clusters are asked for; they answer in the reverse order."""
    found: list[tuple[str, Mapping[str, Any]]] = []

    @contextmanager
    def fake(where: str, scorer: Mapping[str, Any], processors: int | None = None) -> Iterator[Engine]:
        found.append((where, scorer))
        model = BltModel.load(scorer["bundle"], threads=1).with_patching(scorer["rule"])
        engine = local_engine(model, scorer["context"])

        def backwards(texts: Iterator[Text]) -> Iterator[ScoredText]:
            yield from reversed(list(engine(texts)))

        yield backwards

    monkeypatch.setattr(cluster, "cluster_engine", fake)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    texts = tmp_path / "texts"
    texts.mkdir()
    for name, text in (("a", "The first."), ("b", "One of several windows. " * 9), ("c", ""), ("d", "Größe")):
        (texts / f"{name}.txt").write_text(text, encoding="utf-8")
    return texts


def test_files_are_the_same_bytes(cli, tiny_model, asked: list, folder: Path, tmp_path: Path) -> None:
    flags = ("score", "-m", tiny_model.bundle, folder, "--context", 50, "--mode", "space")
    here = cli(*flags, "--jsonl", tmp_path / "here", "--csv", tmp_path / "here.csv", code=0)
    there = cli(
        *flags,
        *("--jsonl", tmp_path / "there", "--csv", tmp_path / "there.csv", "--ray", "auto", "-t", 1),
        code=0,
    )
    assert (tmp_path / "here").read_bytes() == (tmp_path / "there").read_bytes()
    assert (tmp_path / "here.csv").read_bytes() == (tmp_path / "there.csv").read_bytes()
    assert "connecting to Ray (auto)" in there.stderr
    assert [line.split()[:2] for line in here.stdout.splitlines()[2:]] == [
        line.split()[:2] for line in there.stdout.splitlines()[2:]
    ]
    ((where, scorer),) = asked
    assert (where, scorer["context"], scorer["rule"].mode, scorer["threads"]) == ("auto", 50, "space", 1)
    assert scorer["fingerprint"] == BltModel.load(tiny_model.bundle, threads=1).manifest.fingerprint


def test_the_window_is_the_trained_context(cli, tiny_model, asked: list, folder: Path) -> None:
    cli("score", "-q", "-m", tiny_model.bundle, folder, "--ray", "local", code=0)
    assert asked[0][1]["context"] == 500


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--sweep", "1,2"), "--ray and --sweep"),
        (("--max-memory", "1GB"), "--max-memory has no effect with --ray"),
        (("--context", 501), "501"),
    ],
)
def test_what_does_not_go_together(refused, tiny_model, asked: list, folder: Path, flags, said: str) -> None:
    assert said in refused("score", "-m", tiny_model.bundle, folder, "--ray", "local", *flags)
    assert not asked


def test_a_cluster_that_is_not_there_leaves_no_file(
    refused, tiny_model, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("-q", "-m", tiny_model.bundle, folder, "--jsonl", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "[corpus]" in refused("score", *flags, "--ray", "auto", code=1)

    def missing(*_: object) -> None:
        raise BackendError("no Ray cluster answers at h:1: refused")

    monkeypatch.setattr(cluster, "_imported", lambda: None)
    monkeypatch.setattr(cluster, "_check_address", missing)
    assert "no Ray cluster answers" in refused("score", *flags, "--ray", "h:1", code=1)
    assert not (tmp_path / "out").exists()

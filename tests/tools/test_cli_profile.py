"""`blt-edge profile`: the tables, the document, pictures and timelines, and what is refused."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from blt_edge.tools.cli.profile import show
from blt_edge.tools.doctor.machine import read_jetson
from blt_edge.tools.profile import ceiling, measure
from blt_edge.tools.profile.ceiling import measure_bandwidth
from support.machines import ORIN, system
from support.profiles import make_case, make_profile, make_round

QUICK = ("--prompt-bytes", 40, "--new-bytes", 12, "--repeat", 2, "--threads", 1)


@pytest.fixture(autouse=True)
def small_bandwidth_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "_SECONDS", 0.01)
    monkeypatch.setattr(measure, "measure_bandwidth", lambda threads: measure_bandwidth(threads, 1 << 20))


def test_one_case(cli, tiny_model, tmp_path: Path) -> None:
    files = {name: tmp_path / f"out.{name}" for name in ("json", "svg", "trace")}
    outputs = ("--json", files["json"], "--plot", files["svg"], "--trace", files["trace"])
    result = cli("profile", "-m", tiny_model.bundle, *QUICK, *outputs)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "{" not in result.stdout  # people get no JSON that they did not ask for
    document = json.loads(files["json"].read_text())
    (case,) = document["cases"]
    assert (case["threads"], case["prompt_bytes"], case["draft"]) == (1, 40, "none")
    assert case["cost"]["table_rows"] == 4
    assert case["decode"]["stages"]["encoder"]["calls_per_byte"] == 1
    warnings = [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")]
    assert warnings == document["warnings"]
    # The cost card comes first.
    header = next(line for line in lines if line.startswith("stage "))
    assert header.split() == ["stage", "precision", "weights", "cache", "runs/byte", "read/byte"]
    words = [line.split()[0] for line in lines if line]
    order = ["bundle", "stage", "tables", "bandwidth", "ceiling", "prefill", "decode", "ms/byte", "time"]
    places = [words.index(word) for word in order]
    assert places == sorted(places)
    assert files["svg"].read_text().startswith("<?xml")
    assert json.loads(files["trace"].read_text())["traceEvents"]
    assert sorted(tmp_path.iterdir()) == sorted(files.values())
    assert "round 2 of 2" in result.stderr


def test_a_sweep_with_json_alone(cli, tiny_model) -> None:
    sweep = ("--prompt-bytes", "10,20", "--prompt-bytes", "10", "--draft", "none,lookup", "--threads", "1,2")
    flags = ("--new-bytes", 8, "--repeat", 1, "--warmup", 0, "--json", "-", "-q")
    result = cli("profile", "-m", tiny_model.bundle, *sweep, *flags)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    cases = json.loads(result.stdout)["cases"]
    assert [(case["threads"], case["prompt_bytes"], case["draft"]) for case in cases] == [
        (threads, size, draft) for threads in (1, 2) for size in (10, 20) for draft in ("none", "lookup")
    ]


def test_tables_of_a_sweep(cli, tiny_model, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"the cat and the hat and the cat")
    sweep = ("--draft", "decoder", "--text", tmp_path / "a.txt", "--threads", "1", "--prompt-bytes", "10,50")
    result = cli("profile", "-m", tiny_model.bundle, *sweep, "--new-bytes", 8, "--repeat", 1)
    assert result.exit_code == 0, result.stderr
    headers = [line.split() for line in result.stdout.splitlines() if line.startswith("threads")]
    assert [header[:3] for header in headers] == [["threads", "draft", "prompt"]] * 3
    assert headers[0][3:] == ["prefill", "first", "decode", "p50", "p99", "ceiling", "reached"]
    assert headers[1][-3:] == ["other", "accepted", "bytes/round"]
    assert "warning: the text has 31 bytes and is repeated to make prompts of 50" in result.stdout


@pytest.mark.parametrize("flag", ["--markdown", "--csv"])
def test_a_table_in_llama_benchs_manner(cli, tiny_model, tmp_path: Path, flag: str) -> None:
    """With its flag alone it is all of stdout; with a file, people's tables stay there."""
    asked = ("profile", "-m", tiny_model.bundle, *QUICK[2:], "--prompt-bytes", "10,20", "-q")
    result = cli(*asked, "--json", tmp_path / "out.json", flag, code=0)
    cases = json.loads((tmp_path / "out.json").read_text())["cases"]
    tests = [name for size in (10, 20) for name in (f"pp{size}", f"tg12 @ d{size}")]
    speeds = [case[part]["bytes_per_second"] for case in cases for part in ("prefill", "decode")]
    if flag == "--csv":
        rows = list(csv.DictReader(io.StringIO(result.stdout)))
        assert [row["test"] for row in rows] == tests
        assert [float(row["deviation"]) for row in rows] == [speed["deviation"] for speed in speeds]
        assert {row["threads"] for row in rows} == {"1"}
    else:
        head, line, *rows = (row for row in result.stdout.splitlines() if row.startswith("|"))
        assert head == "| model | size | params | engine | threads | draft | test | bytes/s |"
        assert {*line} == {*"|-: "}
        cells = [row.split(" | ")[-2:] for row in rows]
        shown = [f"{speed['mean']:,.1f} ± {speed['deviation']:,.1f} |" for speed in speeds]
        assert cells == [list(pair) for pair in zip(tests, shown, strict=True)]
    filed = cli(*asked, flag, tmp_path / "table", code=0)
    assert filed.stdout.startswith("bundle ")
    assert (tmp_path / "table").read_text().count("pp20") == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--threads", "2,many"], "--threads: 'many' is not"),
        (["--threads", "0"], "--threads is 0; allowed is a whole number from 1 to 1024"),
        (["--prompt-bytes", "495"], "--prompt-bytes: got 495, with 128 new bytes"),
        (["--draft", "none,oracle"], "--draft: got 'oracle'"),
        (["--draft-length", "0"], "--draft-length"),
        (["--text", "-"], "--text: stdin is empty"),
        (["--plot", "out.jpg"], "--plot: got out.jpg"),
        (["--trace", "-"], "--trace: got -"),
        (["--trace", "a.json", "--json", "a.json"], "two of them go to one place"),
        (["--markdown", "--csv"], "two of them go to one place"),
    ],
)
def test_refusals(
    refused, tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert line in refused("profile", "-m", tiny_model.bundle, "-q", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_jetson_is_shown_with_its_power(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    jetson = read_jetson(system(tmp_path, ORIN))
    profile = replace(make_profile(), jetson=jetson)
    show(profile, [])
    shown = capsys.readouterr().out
    assert "Developer Kit Super, JetPack 6.2, 8.0 GB shared by processors and GPU\n" in shown
    assert "power     mode 25W, clocks moving\n" in shown
    assert profile.to_dict()["machine"]["jetson"]["power_mode"] == "25W"
    assert make_profile().to_dict()["machine"]["jetson"] is None


def test_drafts_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    one = make_round(rounds=2, drafted=8, accepted=6)
    arrivals = (one.arrivals[0], replace(one.arrivals[2], count=2))
    show(make_profile(make_case(replace(one, arrivals=arrivals), draft="lookup")), [])
    shown = capsys.readouterr().out
    assert "lookup: 75.0% of 8 guesses accepted, 4.00 bytes a round" in shown
    assert "2 of 2 bytes came several at once, by drafts" in shown
    show(make_profile(make_case(draft="auto")), [])
    assert "auto: nothing was guessed" in capsys.readouterr().out

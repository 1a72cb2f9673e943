"""The golden file's command: exit codes, and what goes to stdout and stderr."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from blt_edge.export.golden import read_golden
from blt_edge.tools.models.write_golden import main
from support.model_store import RandomModels
from support.random_models import RandomModel, base_config
from support.torch_only import transformers_or_skip

CASE = RandomModel("golden_command", base_config(k=1, local_attention_window_len=16), seed=80)


def test_writes_beside_the_checkpoint_or_where_it_is_told(
    random_models: RandomModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers_or_skip()
    shutil.copytree(random_models.folder(CASE), tmp_path, dirs_exist_ok=True)
    assert main([str(tmp_path), "-n", "3"]) == 0
    path = tmp_path / "golden.safetensors"
    assert len(read_golden(path).greedy) == 3
    shown = capsys.readouterr()
    assert shown.out == f"{path}\n"
    assert "3 greedy bytes, by transformers" in shown.err
    target = tmp_path / "named.safetensors"
    assert main([str(tmp_path), "-o", str(target), "-n", "0"]) == 0
    assert read_golden(target).greedy == b""


def test_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "missing")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 1  # no checkpoint in it
    assert len(capsys.readouterr().err.splitlines()) == 1
    for arguments in ([], [str(tmp_path), "-n", "-1"], [str(tmp_path), "-n", "many"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2

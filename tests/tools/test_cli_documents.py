"""Documents that are written whole or not at all, and inputs that are read whole."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from blt_edge.tools.cli.documents import read_input, write_json
from blt_edge.tools.cli.options import STDIN
from blt_edge.tools.output import Messages


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    target.write_text("old")
    with pytest.raises(TypeError):
        write_json(target, {"no": object()})
    assert target.read_text() == "old"
    write_json(target, {"text": "é\n", "nan": math.nan, "list": [1, (math.inf,)]})
    assert json.loads(target.read_text()) == {"text": "é\n", "nan": "nan", "list": [1, ["inf"]]}
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("name", ["あ" * 83 + ".json", "a" * 250 + ".json"])
def test_a_name_as_long_as_names_may_be(tmp_path: Path, name: str) -> None:
    write_json(tmp_path / name, {"a": 1})
    assert json.loads((tmp_path / name).read_text()) == {"a": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_an_error_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        write_json(tmp_path / "nowhere" / "file", {})
    assert missing.value.filename == str(tmp_path / "nowhere" / "file")


def test_json_to_a_device_does_not_replace_it(tmp_path: Path) -> None:
    write_json(Path(os.devnull), {"a": 1})
    assert not Path(os.devnull).is_file()


def test_missing_stdin_is_empty(monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert read_input(STDIN, Messages(), "the prompt") == b""

"""`blt-edge build`: the form's path on stdout, and who says that it is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture
def bundle(cli, tiny_model, tmp_path: Path) -> Path:
    """The tiny bundle with two stages in float16."""
    output = tmp_path / "half"
    result = cli("quantize", tiny_model.bundle, "-o", output, "--precision", "latent=fp16,decoder=fp16")
    assert result.exit_code == 0, result.stderr
    return output


def test_a_form_is_built_used_and_shown(cli, bundle: Path) -> None:
    before = cli("generate", "-m", bundle, "-p", "Once", "-n", 8, "--json", "-")
    assert json.loads(before.stdout)["engine"]["name"] == "portable graphs"
    assert (
        f"engine: portable graphs: no form was built for this device; blt-edge build {bundle}"
        in before.stderr
    )
    built = cli("build", bundle)
    assert built.exit_code == 0, built.stderr
    form = Path(built.stdout.strip())
    assert form.parent == bundle / "engines"
    assert [line.split()[0] for line in built.stderr.splitlines() if " graph  " in line] == [
        "patcher",
        "encoder",
        "latent",
        "decoder",
    ]
    after = cli("generate", "-m", bundle, "-p", "Once", "-n", 8, "--json", "-")
    assert json.loads(after.stdout)["engine"] == {"name": f"engines/{form.name}", "reason": None}
    assert json.loads(after.stdout)["data_base64"] == json.loads(before.stdout)["data_base64"]
    assert after.stderr.endswith(f"engine: engines/{form.name}\n")
    assert f"engines/{form.name}" in cli("inspect", bundle).stdout
    assert (
        json.loads(cli("inspect", bundle, "--json", "-").stdout)["engine"]["name"] == f"engines/{form.name}"
    )
    again = cli("build", bundle, "-q")
    assert (again.exit_code, again.stdout, again.stderr) == (0, built.stdout, "")


def test_a_damaged_form_is_told_of(cli, bundle: Path) -> None:
    form = Path(cli("build", bundle, "-q").stdout.strip())
    path = form / "latent.onnx"
    path.write_bytes(b"x" + path.read_bytes()[1:])
    (form.parent / "onnxruntime-0123456789abcdef").mkdir()
    shown = cli("inspect", bundle, "--verify")
    assert shown.exit_code == 0
    assert "portable graphs: latent.onnx was changed" in shown.stdout
    mended = cli("build", bundle)
    assert Path(mended.stdout.strip()) == form
    assert "to remove by hand: onnxruntime-0123456789abcdef" in mended.stderr
    assert f"engines/{form.name}" in cli("inspect", bundle, "--verify").stdout


def test_refusals(cli, tiny_model, tmp_path: Path) -> None:
    assert cli("build", tmp_path / "none").exit_code == 2
    assert cli("build", tiny_model.bundle, "--target", "x").exit_code == 2

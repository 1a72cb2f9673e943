"""README.md and docs/: commands and Python run as they stand, links lead somewhere, pages are up to date.

A page's blocks run in their order, in a directory that holds the demo model's bundle and a few bytes of the
texts. Commands are made fast where that changes no more than how much is done: fewer bytes, fewer rounds.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from support.markdown_blocks import RUNNABLE, Block, anchors, blocks, commands, links

ROOT = Path(__file__).parents[1]
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = [page for page in PAGES if any(block.language in RUNNABLE for block in blocks(page))]

TEXT_BYTES = 3000
"""Of each text under tests/data."""

FAST = {
    "optimum-cli export blt": "--no-validate",
    "blt-edge export": "--no-validate",
    "blt-edge quantize": "--windows 2 --no-validate",
    "blt-edge generate": "-n 8",
    "blt-edge chat": "-n 8",
    "blt-edge profile": "--repeat 1 --warmup 0 --new-bytes 8 --prompt-bytes 32",
    "blt-edge compare": "--max-bytes 1000 --prompts 1 --lead-bytes 8 --repeat 1 --new-bytes 8 "
    "--prompt-bytes 32",
}
"""Options that a command is given, in the place of those that the page gives."""

_WORD = r"(?:[^\s\"']|\"[^\"]*\"|'[^']*')+"
_ADDRESS = re.compile(r"(127\.0\.0\.1|localhost):8080")


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make demo` leaves."""
    from blt_edge.export import build_engine, export_checkpoint

    bundle = export_checkpoint("demo", tmp_path_factory.mktemp("docs") / "demo-bundle")
    build_engine(bundle)
    return bundle


@pytest.fixture
def workshop(demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory like a fresh checkout after `make demo`, the current one meanwhile."""
    shutil.copytree(demo_bundle, tmp_path / "demo-bundle")
    for folder in ("calibration", "export", "tools"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "tests" / "data").mkdir(parents=True)
    for text in (ROOT / "tests" / "data").glob("*.txt"):
        (tmp_path / "tests" / "data" / text.name).write_bytes(text.read_bytes()[:TEXT_BYTES])
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/checkpoint").symlink_to(ROOT / "export" / "demo")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Page:
    """A page being gone through: what its blocks have left behind so far."""

    def __init__(self, workshop: Path) -> None:
        self._names: dict[str, Any] = {"__name__": "page"}
        self._server: subprocess.Popen[str] | None = None
        self._address = "127.0.0.1:8080"
        self._environment = {**os.environ, "PATH": PATH, "HOME": str(workshop)}

    def run(self, block: Block, place: str) -> None:
        """Run a block; AssertionError with its place when a command fails."""
        if block.language == "python":
            code = _ADDRESS.sub(self._address, block.text)
            exec(compile("\n" * block.line + code, place.partition(":")[0], "exec"), self._names)
            return
        for command in map(fast, commands(block)):
            if command.startswith("blt-edge serve"):
                self._serve(command)
            elif not elsewhere(command):
                self._shell(command, place)

    def _shell(self, command: str, place: str) -> None:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", _ADDRESS.sub(self._address, command)],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{place}: {command}\n{done.stdout.decode(errors='replace')}"

    def _serve(self, command: str) -> None:
        command = re.sub(r" --port \d+|[ &]+$", "", command.partition("#")[0])
        self.close()
        self._server = subprocess.Popen(
            ["bash", "-c", f"exec {command} --port 0 </dev/null"],
            env=self._environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        told = re.search(r":(\d+)", self._server.stdout.readline())
        assert told, command
        self._address = f"127.0.0.1:{told[1]}"

    def close(self) -> None:
        if self._server is not None:
            self._server.terminate()
            self._server.communicate(timeout=60)
            self._server = None


@pytest.mark.parametrize("path", RUN, ids=lambda path: path.name)
def test_commands_and_python_of_a_page_run(path: Path, workshop: Path) -> None:
    with closing(Page(workshop)) as page:
        for block in blocks(path):
            if block.language in RUNNABLE and block.needs is None:
                page.run(block, f"{path.name}:{block.line}")


def fast(command: str) -> str:
    """The same command with less to do, and with the environment's programs in the place of a checkout's."""
    command = re.sub(r"(?<!\S)\.venv/bin/", "", command)
    for head, options in FAST.items():
        if not re.search(rf"\b{head}\b", command):
            continue
        for flag, value in re.findall(r"(--?[\w-]+)(?: (\d+))?", options):
            given = rf"(?:[ =]{_WORD})?" if value else ""
            command = re.sub(rf" {flag}{given}(?=\s|$)", "", command)
        command = re.sub(rf"\b{head}\b", f"{head} {options}", command)
    return command


def elsewhere(command: str) -> bool:
    """Whether a command sets up what is there already, or needs a program that is not here."""
    words = command.partition(" #")[0].split()
    if words[0] == "make":
        assert {*words[1:]} <= {*re.findall(r"^(\S+):", (ROOT / "Makefile").read_text(), re.M)}
        return True
    if words[:2] == ["pip", "install"]:
        extras = re.findall(r"^([\w-]+) = ", (ROOT / "pyproject.toml").read_text(), re.M)
        named = ",".join(re.findall(r"\[([\w,-]+)\]", command)).split(",")
        assert {*named} <= {"", *extras}, command
        return True
    if "--target tensorrt-rtx" in command and find_spec("tensorrt_rtx_bindings") is None:
        return True
    return words[0] in ("optimum-cli", "curl") and shutil.which(words[0], path=PATH) is None


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in links(path):
        name, _, anchor = target.partition("#")
        found = path if not name else path.parent / name
        assert found.exists(), f"{path.name}: {target}"
        if anchor:
            assert anchor in anchors(found), f"{path.name}: {target}"


def test_every_page_is_in_the_index() -> None:
    index = set(links(ROOT / "docs" / "README.md"))
    assert {page.name for page in PAGES if page.parent.name == "docs"} - {"README.md"} <= index


def test_every_field_of_a_manifest_is_described(demo_bundle: Path) -> None:
    told = (ROOT / "docs" / "bundle.md").read_text()
    manifest = json.loads((demo_bundle / "manifest.json").read_text())
    manifest["source"]["config"] = manifest["model"]["parameters"] = manifest["axes"] = {}  # open-ended
    manifest.update(stages=manifest["stages"]["decoder"], files=next(iter(manifest["files"].values())))

    def names(part: dict[str, Any]) -> Iterator[str]:
        for name, value in part.items():
            yield name
            yield from names(value) if isinstance(value, dict) else ()

    missing = [name for name in names(manifest) if not re.search(rf"[`.]{name}[`.]", told)]
    assert not missing


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "images").glob("*.svg")), ids=lambda path: path.name)
def test_drawings_stand_alone_and_have_a_description_and_a_dark_side(path: Path) -> None:
    tags = {element.tag.rpartition("}")[2] for element in ElementTree.parse(path).iter()}
    assert not tags & {"script", "image", "foreignObject", "use", "a"}
    assert not re.search(r"@import|url\((?!#)", path.read_text())
    if path.name in ("stages.svg", "speculation.svg"):
        assert {"title", "desc"} <= tags
        assert "prefers-color-scheme: dark" in path.read_text()

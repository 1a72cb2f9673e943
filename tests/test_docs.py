"""README.md and docs/: commands and Python run as they stand, links lead somewhere, pages are up to date.

A page's blocks run in their order, in a directory that holds the demo model's bundle and a few bytes of the
texts. Commands are made fast where that changes no more than how much is done: fewer bytes, fewer rounds.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from support.markdown_blocks import Block, anchors, blocks, commands, links

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = [
    page for page in PAGES if any(block.language in ("console", "bash", "python") for block in blocks(page))
]

TEXT_BYTES = 3000
"""Of each text under tests/data."""

FAST = {
    "optimum-cli export blt": {"--no-validate": ""},
    "blt-edge export": {"--no-validate": ""},
    "blt-edge quantize": {"--windows": "2", "--no-validate": ""},
    "blt-edge generate": {"-n": "8"},
    "blt-edge chat": {"-n": "8"},
    "blt-edge profile": {"--repeat": "1", "--warmup": "0", "--new-bytes": "8", "--prompt-bytes": "32"},
    "blt-edge compare": {
        "--max-bytes": "1000",
        "--prompts": "1",
        "--lead-bytes": "8",
        "--repeat": "1",
        "--new-bytes": "8",
        "--prompt-bytes": "32",
    },
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
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "checkpoint").symlink_to(ROOT / "export" / "demo")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Page:
    """A page being gone through: what its blocks have left behind so far."""

    def __init__(self, workshop: Path) -> None:
        self._names: dict[str, Any] = {"__name__": "page"}
        self._server: subprocess.Popen[str] | None = None
        self._address = "127.0.0.1:8080"
        self._environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(workshop)}

    def run(self, block: Block, place: str) -> None:
        """Run a block; AssertionError with its place when a command fails."""
        if block.language == "python":
            code = _ADDRESS.sub(self._address, block.text)
            exec(compile("\n" * block.line + code, place.partition(":")[0], "exec"), self._names)
            return
        for command in commands(block):
            self._shell(fast(command), place)

    def _shell(self, command: str, place: str) -> None:
        if elsewhere(command):
            return
        if command.startswith("blt-edge serve"):
            self._serve(command)
            return
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", _ADDRESS.sub(self._address, command)],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=120,
            check=False,
        )
        told = done.stdout.decode(errors="replace") + done.stderr.decode(errors="replace")
        assert done.returncode == 0, f"{place}: {command}\n{told}"

    def _serve(self, command: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = re.sub(r" --port \d+|[ &]+$", "", command.partition("#")[0])
        self.close()
        self._server = subprocess.Popen(
            ["bash", "-c", f"exec {command} --port {port}"],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._server.stdout is not None
        assert str(port) in self._server.stdout.readline(), command
        self._address = f"127.0.0.1:{port}"

    def close(self) -> None:
        """End what still runs."""
        if self._server is not None:
            self._server.terminate()
            self._server.communicate(timeout=60)
            self._server = None


@pytest.fixture
def page_run(workshop: Path) -> Iterator[Page]:
    """A page that begins."""
    run = Page(workshop)
    yield run
    run.close()


@pytest.mark.parametrize("path", RUN, ids=lambda path: path.name)
def test_commands_and_python_of_a_page_run(path: Path, page_run: Page) -> None:
    for block in blocks(path):
        if block.language in ("console", "bash", "python") and block.needs is None:
            page_run.run(block, f"{path.name}:{block.line}")


def fast(command: str) -> str:
    """The same command with less to do, and with the environment's programs in the place of a checkout's."""
    command = re.sub(r"(?<!\S)\.venv/bin/", "", command)
    for head, options in FAST.items():
        if not re.search(rf"\b{head}\b", command):
            continue
        for flag, value in options.items():
            command = re.sub(
                rf" {flag}(?:[ =]{_WORD})?(?=\s|$)" if value else rf" {flag}(?=\s|$)", "", command
            )
        given = " ".join(f"{flag} {value}".strip() for flag, value in options.items())
        command = re.sub(rf"\b{head}\b", f"{head} {given}", command)
    return command


def elsewhere(command: str) -> bool:
    """Whether a command sets up what is there already, or needs a program that is not here."""
    words = command.split()
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(
            re.search(rf"^{target}:", makefile, re.M)
            for target in words[1 : words.index("#") if "#" in words else None]
        )
        return True
    if words[:2] == ["pip", "install"]:
        project = (ROOT / "pyproject.toml").read_text()
        named = re.findall(r"\[([\w,-]+)\]", command)
        for extra in ",".join(named).split(",") if named else ():
            assert re.search(rf"^{extra} = ", project, re.M), f"{command}: there is no extra {extra}"
        return True
    if "--target tensorrt-rtx" in command and find_spec("tensorrt_rtx_bindings") is None:
        return True
    return (
        words[0] in ("optimum-cli", "curl")
        and shutil.which(words[0], path=f"{BIN}:{os.environ['PATH']}") is None
    )


@pytest.mark.parametrize(
    ("typed", "run"),
    [
        (".venv/bin/blt-edge generate -m b -p x -n 200", "blt-edge generate -n 8 -m b -p x"),
        ("blt-edge generate -m b --seed 1", "blt-edge generate -n 8 -m b --seed 1"),
        ("echo x | blt-edge generate -p - -n 5 | cat", "echo x | blt-edge generate -n 8 -p - | cat"),
        ("blt-edge export demo -o b --no-validate", "blt-edge export --no-validate demo -o b"),
        ("blt-edge inspect b", "blt-edge inspect b"),
    ],
)
def test_fast_commands_do_the_same(typed: str, run: str) -> None:
    assert fast(typed) == run


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
    open_ended = {"config": {}, "parameters": {}, "axes": {}, "validation": {}}
    manifest["source"].update(config={})
    manifest.update(
        axes={}, stages=manifest["stages"]["decoder"], files=next(iter(manifest["files"].values()))
    )
    manifest["model"].update(parameters={})
    assert set(open_ended) <= {*manifest, *manifest["source"], *manifest["model"]}

    def names(part: dict[str, Any]) -> Iterator[str]:
        for name, value in part.items():
            yield name
            yield from names(value) if isinstance(value, dict) else ()

    missing = [name for name in names(manifest) if not re.search(rf"[`.]{name}[`.]", told)]
    assert not missing


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "images").glob("*.svg")), ids=lambda path: path.name)
def test_drawings_stand_alone(path: Path) -> None:
    tags = {element.tag.rpartition("}")[2] for element in ElementTree.parse(path).iter()}
    assert not tags & {"script", "image", "foreignObject", "use", "a"}
    assert not re.search(r"@import|url\((?!#)", path.read_text())


@pytest.mark.parametrize("name", ["stages.svg", "speculation.svg"])
def test_drawings_have_a_description_and_a_dark_side(name: str) -> None:
    path = ROOT / "docs" / "images" / name
    assert {"title", "desc"} <= {element.tag.rpartition("}")[2] for element in ElementTree.parse(path).iter()}
    assert "prefers-color-scheme: dark" in path.read_text()

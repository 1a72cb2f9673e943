"""The floors: which folder may import which, no circle between files, imports where a reader expects them.

Read off the syntax trees: an import counts wherever it stands, under TYPE_CHECKING and in functions too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BELOW = {
    "runtime": {"runtime"},
    "graphs": {"runtime", "graphs"},
    "calibration": {"runtime", "graphs", "calibration"},
    "export": {"runtime", "graphs", "calibration", "export"},
    "tools": {"runtime", "graphs", "calibration", "export", "tools"},
}
OPTIONAL = {"resource", "importlib.metadata", "onnxruntime", "tensorrt", "tensorrt_rtx_bindings", "cuda"} | {
    "torch",
    "transformers",
    "safetensors",
    "huggingface_hub",
    "llguidance",
}
FOREIGN_TO_RUNTIME = {
    "torch",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "transformers",
    "safetensors",
    "click",
    "rich",
}


def module_name(path: Path) -> str:
    name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    return name.removesuffix(".__init__")


FILES = {
    module_name(path): path
    for folder in BELOW
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "optimum_plugin" not in path.parts
}


def imports(name: str) -> Iterator[tuple[str, ast.stmt]]:
    """(imported module, statement) of every import, wherever it stands; modules of ours by full name."""
    path = FILES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])
            if not node.level:
                base = (node.module or "").removeprefix("blt_edge.")
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield (full if full in FILES else base), node


def test_every_folder_is_known() -> None:
    assert {name.partition(".")[0] for name in FILES} == set(BELOW)
    assert len(FILES) > 100


@pytest.mark.parametrize("folder", BELOW)
def test_no_import_goes_up(folder: str) -> None:
    wrong = [
        f"{name}:{node.lineno} imports {target}"
        for name in FILES
        if name.partition(".")[0] == folder
        for target, node in imports(name)
        if target.partition(".")[0] in set(BELOW) - BELOW[folder]
    ]
    assert not wrong, wrong


def test_the_runtime_needs_neither_torch_nor_onnx_nor_a_terminal() -> None:
    wrong = [
        f"{name}:{node.lineno} imports {target}"
        for name in FILES
        if name.startswith("runtime")
        for target, node in imports(name)
        if target.partition(".")[0] in FOREIGN_TO_RUNTIME
    ]
    assert not wrong, wrong


def test_no_circle_between_files() -> None:
    """A package's `__init__` collects names from below it: importing it is not importing each of them."""
    edges = {
        name: {target for target, _ in imports(name) if target in FILES and target != name} for name in FILES
    }
    for name, path in FILES.items():
        if path.name == "__init__.py":
            edges[name] = set()
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name in done:
            return
        for target in sorted(edges[name]):
            visit(target, (*way, name))
        done.add(name)

    for name in FILES:
        visit(name, ())


def test_below_the_tools_imports_stand_at_the_top() -> None:
    """In functions only what is optional: packages of extras, and what the system may lack."""
    wrong = [
        f"{name}:{node.lineno} imports {target}"
        for name in FILES
        if not name.startswith("tools")
        for target, node in imports(name)
        if node.col_offset > 4 or (node.col_offset == 4 and _in_function(FILES[name], node))
        if target.partition(".")[0] not in OPTIONAL and target not in OPTIONAL
    ]
    assert not wrong, wrong


def _in_function(path: Path, node: ast.stmt) -> bool:
    tree = ast.parse(path.read_text("utf-8"))
    return any(
        isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef))
        and outer.lineno <= node.lineno <= (outer.end_lineno or 0)
        for outer in ast.walk(tree)
    )


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_stay_readable(name: str) -> None:
    lines = FILES[name].read_text("utf-8").count("\n")
    assert lines <= 500, f"{name} has {lines} lines: look for the second thing in it"

"""A minute of fuzzing with a fixed seed; and that it sees what it is there to see."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

pytest.importorskip("onnx", reason="needs onnx: pip install 'blt-edge[export]'")
if not sys.platform.startswith("linux"):
    pytest.skip("watches processes as Linux does", allow_module_level=True)

from blt_edge.runtime.errors import BltError
from blt_edge.tools.fuzz.mutate import RAW, SECRET, spoil_bytes, spoil_json, spoil_message
from blt_edge.tools.fuzz.states import kill_saves
from blt_edge.tools.fuzz.targets import Config, Files, Safetensors, Target
from blt_edge.tools.fuzz.worker import make, run
from onnx import helper


@pytest.mark.parametrize(
    "targets",
    [
        "manifest graphs engines",
        "config generation index safetensors golden meta pth",
        "calibration requests chats connections states constraints",
    ],
)
def test_a_minute_of_hostile_inputs(targets: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "blt_edge.tools.fuzz", *targets.split(), "--quick", "--seed", "2026"]
    ended = subprocess.run([*command, "--save", str(tmp_path)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = {row.split()[0]: row.split()[1:5] for row in ended.stdout.splitlines()[2:]}
    assert list(rows) == targets.split()
    for row in rows.values():
        if row[0] != "skipped,":
            inputs, accepted, refused, failed = map(int, row)
            assert inputs == accepted + refused > 0 == failed


def test_a_save_that_is_killed_leaves_the_old_state_or_the_new() -> None:
    assert kill_saves(5, seed=2026) == []


@pytest.mark.parametrize("kind", [Config, Safetensors])
def test_a_seed_and_a_number_name_an_input(kind: type[Target]) -> None:
    inputs = make(kind(), 3, [5, 9])
    assert inputs[5] != inputs[9]
    assert make(kind(), 3, [9, 5]) == inputs
    assert make(kind(), 4, [5])[5] != inputs[5]


def test_spoilt_values_are_of_every_kind() -> None:
    texts = [spoil_json(Random(seed), {"a": [1, "b", None, True, 0.5]}) for seed in range(3000)]
    assert all(any(raw in text for text in texts) for raw in RAW)
    assert any(text.count(b'"a": ') == 2 for text in texts), "a name twice"
    bytes_of = [spoil_bytes(Random(seed), bytes(range(100)), (b"word",)) for seed in range(300)]
    assert {len(data) < 100 for data in bytes_of} == {True, False}
    assert any(b"word" in data for data in bytes_of)


def test_messages_are_spoilt_alike_and_stay_sound() -> None:
    node = helper.make_node("Add", ["a", "b"], ["c"], axis=1)
    model = helper.make_model(helper.make_graph([node, node], "g", [], []))
    made = []
    for seed in [*range(300), *range(300)]:
        spoilt = type(model).FromString(model.SerializeToString())
        spoil_message(Random(seed), spoilt)
        made.append(spoilt.SerializeToString(deterministic=True))
    assert made[:300] == made[300:]
    assert len(set(made)) > 100


class Planted(Target):
    """Does something on its second input of three."""

    name, seconds, memory, valid = "planted", 0.2, 64 << 20, {"x": b""}

    def __init__(self, what: Callable[[Path], object]) -> None:
        self._what = what

    def make(self, random: Random) -> Files:
        return {"x": b"", "number": str(random.random()).encode()}

    def attack(self, files: Files) -> None:
        (self.folder / "x").write_bytes(b"inside it may write")
        if self._number(1) == files.get("number"):
            self._what(self.folder)

    def _number(self, number: int) -> bytes:
        return str(Random(f"1/planted/{number}").random()).encode()


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("what", "told"),
    [
        (lambda folder: _raise(TypeError("no\nline")), "TypeError: no"),
        (lambda folder: _raise(BltError("it is \x1b[2J wrong")), "message: 'it is"),
        (lambda folder: _raise(BltError("long" * 300)), "message: 'long"),
        (lambda folder: os.write(2, b"\x1b[2J"), "prints: '"),
        (lambda folder: (folder / "../elsewhere").write_bytes(b"x"), "open: "),
        (lambda folder: os.rename(folder / "x", folder / "../y"), "os.rename: "),  # noqa: PTH104
        (lambda folder: Path("/etc/hostname").read_bytes(), "open: ("),
        (lambda folder: os.system("true"), "os.system: "),
        (lambda folder: os.open(os.fsencode(folder / ".." / SECRET), os.O_RDONLY), "open: "),
        (lambda folder: b"x" * (100 << 20), "takes "),
        (lambda folder: sum(range(30_000_000)), "takes "),
        (lambda folder: time.sleep(60), "takes more than 6 s"),
        (lambda folder: os.kill(os.getpid(), 11), "ends the process with SIGSEGV"),
        (lambda folder: os._exit(3), "ends the process with code 3"),
    ],
)
def test_what_goes_wrong_is_seen_and_the_rest_goes_on(what: Callable[[Path], object], told: str) -> None:
    outcome = run(Planted(what), 1, range(3))
    (fault,) = outcome.faults.values()
    assert fault.what.startswith(told)
    assert fault.numbers == [1]
    assert (outcome.inputs, outcome.accepted) == (3, 2)


def test_a_valid_input_that_fails_is_no_run() -> None:
    class Broken(Planted):
        def attack(self, files: Files) -> None:
            raise BltError("not even this")

    with pytest.raises(RuntimeError, match="not even this"):
        run(Broken(print), 1, range(3))


def test_a_missing_package_is_named() -> None:
    class Missing(Planted):
        def prepare(self, folder: Path) -> None:
            raise ModuleNotFoundError("No module named 'x'", name="x")

    assert run(Missing(print), 1, range(3)).skipped == "x"

"""Attacks on saved states; and saves that are killed: `python -m blt_edge.tools.fuzz.states --kills 50`."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import signal
import sys
import tempfile
import time
import zlib
from pathlib import Path
from random import Random

import numpy as np

from ...runtime.errors import BltError
from ...runtime.model import BltModel
from ...runtime.sequence import Sequence
from ...runtime.state_file import ARRAYS, describe
from ...runtime.state_pieces import PIECE
from ...runtime.vocabulary import byte_ids, encode
from .bundles import export_tiny
from .mutate import spoil_bytes, spoil_json
from .targets import Files, Target

_TEXT = b"Boats came in at dusk, and the lamp was lit. " * 4
_FILE = "text.state"


def _read(model: BltModel, text: bytes) -> Sequence:
    sequence = model.sequence()
    sequence.append(encode(text))
    return sequence


def _seal(start: bytes, header: bytes, arrays: bytes) -> bytes:
    """The seal of a file with this header, if that makes sense."""
    seal, at = hashlib.sha256(start), 0
    try:
        told = json.loads(header)
        shapes = {name: told[name][1:] for name in ARRAYS if name in told}
        sizes = [math.prod(shape) * {"ids": 2}.get(name, 4) for name, shape in shapes.items()]
        if sum(sizes) == len(arrays) and min(sizes) >= 0:
            for size in sizes:
                for piece in range(at, at + size, PIECE):
                    seal.update(hashlib.sha256(arrays[piece : min(piece + PIECE, at + size)]).digest())
                at += size
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
        pass  # it will be refused before
    return seal.digest()


class States(Target):
    """A saved state: its header by structure, its arrays by bytes, mostly with a right seal. Described,
    restored and gone on with.
    """

    name = "states"
    seconds = 5.0

    def prepare(self, folder: Path) -> None:
        super().prepare(folder)
        bundle = folder / "bundle"
        bundle.mkdir()
        export_tiny(bundle)
        self._model = BltModel.load(bundle, "cpu", 1, portable=True, prefill_chunk=32, rollback=8)
        sequence = _read(self._model, _TEXT[:90])
        sequence.save(folder / _FILE)
        sequence.append(byte_ids(b"on"))  # whatever is only made at a first step is made now
        data = (folder / _FILE).read_bytes()
        end = 24 + int.from_bytes(data[20:24], "little")
        self._header, self._arrays = json.loads(data[24:end]), data[end:-32]
        self.valid = {_FILE: data}

    def make(self, random: Random) -> Files:
        header, arrays = json.dumps(self._header).encode(), self._arrays
        if random.random() < 0.6:
            header = spoil_json(random, self._header, keys=(*ARRAYS, "format", "generator"))
        elif random.random() < 0.5:
            arrays = spoil_bytes(
                random, arrays, (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f")
            )
        if random.random() < 0.2:
            arrays = arrays[: random.randrange(len(arrays))] + bytes(random.choice((0, 1, 4, 4096)))
        start = b"blt-edge state\r\n" + (2).to_bytes(4, "little") + len(header).to_bytes(4, "little") + header
        data = start + arrays + _seal(start, header, arrays)
        return {_FILE: data if random.random() < 0.9 else spoil_bytes(random, data, (header, b"\xff" * 4))}

    def attack(self, files: Files) -> None:
        self.write(files)
        path, model = self.folder / _FILE, self._model
        try:
            str(describe(path, verify=True))
        except BltError as error:
            with contextlib.suppress(BltError):
                model.restore(path)
                raise AssertionError("it was restored, but can't be described") from error
            raise
        sequence = model.restore(path)
        again = self.folder / "again.state"
        sequence.save(again)
        assert model.restore(again).ids.tolist() == sequence.ids.tolist()
        if zlib.crc32(files[_FILE]) % 4 == 0:
            with contextlib.suppress(BltError), np.errstate(all="ignore"):  # of numbers that somebody made up
                model.generate(b"on", max_new_bytes=4, sequence=sequence)
                sequence.roll_back(min(12, sequence.length - 1))


def kill_saves(count: int, seed: int = 1) -> list[str]:
    """Kill `count` processes while they save one of two texts over and over; what was wrong afterwards."""
    random, faults = Random(seed), []
    with tempfile.TemporaryDirectory(prefix="blt-edge-kills-") as folder:
        bundle = Path(folder) / "bundle"
        bundle.mkdir()
        export_tiny(bundle)
        model = BltModel.load(bundle, "cpu", 1, portable=True)
        texts = [_read(model, _TEXT), _read(model, b"another " * 20)]
        known = [sequence.ids.tolist() for sequence in texts]
        path = Path(folder) / "states" / _FILE
        path.parent.mkdir()
        texts[0].save(path)
        abandoned = 0
        for number in range(count):
            child = os.fork()
            if child == 0:
                try:
                    while True:
                        for sequence in texts:
                            sequence.save(path)
                finally:
                    os._exit(1)
            time.sleep(random.uniform(0.002, 0.1))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            try:
                if not os.WIFSIGNALED(status):
                    faults.append(f"{number}: the child ended by itself")
                describe(path, verify=True)
                if model.restore(path).ids.tolist() not in known:
                    faults.append(f"{number}: another text")
            except BltError as error:
                faults.append(f"{number}: {error}")
            abandoned += len(list(path.parent.iterdir())) - 1
            if number % 2:
                texts[0].save(path)
                if [one.name for one in path.parent.iterdir()] != [_FILE]:
                    faults.append(f"{number}: what a killed process left is still there")
        print(f"{count} saves killed, {abandoned} of them half-way; {len(faults)} faults")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m blt_edge.tools.fuzz.states", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="processes to kill; default 50")
    parser.add_argument(
        "--seed", type=int, default=1, metavar="N", help="what moments are made from; default 1"
    )
    arguments = parser.parse_args()
    faults = kill_saves(arguments.kills, arguments.seed)
    for fault in faults:
        print(fault)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())

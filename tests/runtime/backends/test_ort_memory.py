"""What ONNX Runtime's sessions keep of the runs that they have done: nothing that grows with their shapes."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = """
import ctypes, gc, sys
from blt_edge.runtime import BltModel
from blt_edge.runtime.host import release_memory

class Figures(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena o s h hblkhd u f used free keep".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Figures
model = BltModel.load(sys.argv[1], threads=1)
text = bytes(range(32, 120)) * 9

def used(first, last):
    for count in range(first, last):
        model.score(text[:count])
    gc.collect()
    release_memory()
    return libc.mallinfo2().used

before = used(1, 100)
print(used(100, 300) - before)
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None) if sys.platform == "linux" else None, "mallinfo2"),
    reason="needs glibc 2.33",
)
def test_memory_does_not_grow_with_each_size_of_a_text(tiny_bundle: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(tiny_bundle)], check=True, capture_output=True, text=True
    )
    assert int(done.stdout) < 700_000  # 1,030,000 with a plan of memory for each size

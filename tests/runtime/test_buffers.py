"""Arrays with pages of their own: like any other array, and private."""

from __future__ import annotations

import gc
import mmap
import os
import weakref
from pathlib import Path

import numpy as np
import pytest
from blt_edge.runtime import buffers
from blt_edge.runtime.host import size_in

LARGE = (4, 1, 3, 5000, 7)
HUGE = (5, 1 << 20)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 5), (7,), (64, 2), (8191,), (8192,), LARGE, HUGE])
def test_an_array_is_one_of_zeros_that_can_be_written(shape: tuple[int, ...]) -> None:
    made = buffers.zeros(shape)
    assert (made.shape, made.dtype, made.flags.c_contiguous, made.flags.writeable) == (
        shape,
        np.float32,
        True,
        True,
    )
    assert not made.any()
    made += 1
    assert made.sum() == made.size


@pytest.mark.parametrize("shape", [(8192,), (256, 260), HUGE])
def test_kernels_may_read_a_vector_behind_an_array_of_whole_pages(shape: tuple[int, ...]) -> None:
    made = buffers.zeros(shape)
    assert made.nbytes % mmap.PAGESIZE == 0
    base: object = made
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base, memoryview)
    assert base.nbytes >= made.nbytes + 64


def test_a_copy_is_one() -> None:
    source = np.arange(60_000, dtype=np.float32).reshape(3, 4, 5000)[:, :, 100:]
    copied = buffers.duplicate(source)
    assert np.array_equal(copied, source)
    assert copied.flags.c_contiguous
    copied[:] = 0
    assert source.all()


def test_pages_are_given_back_with_the_last_view() -> None:
    made = buffers.zeros(HUGE)
    made[:] = 1
    held = size_in(Path("/proc/self/status"), "RssAnon:")
    view, gone = made[2:3, 5:], weakref.ref(made)
    del made
    gc.collect()
    assert view.all()
    del view
    gc.collect()
    assert gone() is None
    if held is not None:
        left = size_in(Path("/proc/self/status"), "RssAnon:")
        assert left is not None
        assert held - left > 15 << 20


def test_where_no_more_can_be_mapped_it_is_an_array_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    made = buffers.zeros(LARGE)
    assert made.shape == LARGE
    assert not made.any()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only where processes fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_its_own() -> None:
    made = buffers.zeros(LARGE)
    child = os.fork()
    if not child:
        made[:] = 5
        os._exit(0)
    os.waitpid(child, 0)
    assert not made.any()

"""Which pass is next, by what texts wait for."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from blt_edge.runtime.costs import CostTable
from blt_edge.runtime.names import STAGES
from blt_edge.runtime.passes import MOST_SHORT, Chooser
from hypothesis import example, given
from hypothesis import strategies as st


@dataclass
class Wait:
    stage: str
    count: int = 1
    kind: object = "engine"
    since: int = 0
    rows: tuple[int, ...] = (1, 2, 4, 8)


def costs(local: dict[int, float], latent: dict[int, float]) -> CostTable:
    """Milliseconds by rows of each local stage, and of the latent one."""
    table = CostTable()
    for stage in STAGES:
        for rows, milliseconds in (latent if stage == "latent" else local).items():
            table.observe(stage, 0.0, milliseconds / 1000, rows)
    return table


WAITS = st.builds(
    Wait,
    st.sampled_from(STAGES),
    st.sampled_from([1, 1, 1, 2, 9, MOST_SHORT, MOST_SHORT + 1, 256]),
    st.sampled_from(["engine", "other"]),
    st.integers(0, 5),
    st.sampled_from([(1,), (1, 2), (1, 2, 4, 8)]),
)


@given(st.lists(st.lists(WAITS, min_size=1, max_size=12), min_size=1, max_size=8))
@example([[Wait("latent"), Wait("latent", rows=(1, 2)), Wait("latent")]])
def test_a_pass_is_of_one_stage_and_kind_and_has_room(rounds: list[list[Wait]]) -> None:
    chooser = Chooser(256, CostTable())
    for waiting in rounds:
        group = chooser.choose(waiting, len(waiting))
        lead = group[0]
        assert all(one in waiting for one in group)
        assert len({id(one) for one in group}) == len(group) <= min(one.rows[-1] for one in group)
        assert {(one.stage, one.kind) for one in group} == {(lead.stage, lead.kind)}
        beside = [one.count for one in group[1:] if one.count > MOST_SHORT]
        assert lead.count + sum(beside) <= 256 or not beside


def test_who_has_too_many_positions_for_company_goes_alone() -> None:
    chooser = Chooser(256, CostTable())
    alone = (1,)
    waiting = [
        Wait("decoder"),
        Wait("decoder", 100, rows=alone),
        Wait("decoder"),
        Wait("decoder", 20, rows=alone),
    ]
    assert chooser.choose(waiting, 4) == [waiting[0], waiting[2]]
    assert chooser.choose(waiting[1:2] + waiting[3:], 4) == [waiting[1]]
    assert chooser.choose([waiting[3], Wait("decoder")], 4) == [waiting[3]]


def test_who_is_behind_goes_first_and_the_others_catch_up() -> None:
    chooser = Chooser(256, CostTable())
    waiting = [Wait("decoder"), Wait("encoder"), Wait("patcher"), Wait("encoder")]
    assert chooser.choose(waiting, 4) == [waiting[2]]
    assert chooser.choose(waiting[:2] + waiting[3:], 4) == [waiting[1], waiting[3]]


def test_bytes_and_chunks_take_turns() -> None:
    chooser = Chooser(256, CostTable())
    chunk, byte = Wait("patcher", 256), Wait("encoder")
    assert chooser.choose([chunk, byte], 2) == [byte]
    assert chooser.choose([chunk, Wait("decoder")], 2)[0].stage == "decoder"
    assert chooser.choose([chunk, Wait("patcher")], 2)[0] is chunk
    assert chooser.choose([Wait("encoder", 256), byte], 2) == [byte]


def test_a_byte_goes_along_with_a_chunk_that_waits_for_the_same_stage() -> None:
    chooser = Chooser(256, CostTable())
    chooser.choose([Wait("decoder")], 1)
    chunk, byte, other = Wait("encoder", 256), Wait("encoder"), Wait("encoder", 256)
    assert chooser.choose([byte, chunk, other], 3) == [chunk, byte]


def test_short_prompts_share_a_chunk() -> None:
    prompts = [Wait("patcher", 100), Wait("patcher", 100), Wait("patcher", 100)]
    assert Chooser(256, CostTable()).choose(prompts, 3) == prompts[:2]


def test_a_short_prompt_goes_before_a_chunk_but_not_for_ever() -> None:
    """All four stages of 64 bytes; then the chunk, however many short ones there are."""
    chooser = Chooser(256, CostTable())
    chunk = Wait("patcher", 256)
    for stage in STAGES:
        short = Wait(stage, 64)
        assert chooser.choose([chunk, short], 2)[0] is short
    for _ in range(3):
        found = [chooser.choose([chunk, Wait("encoder", 64)], 2)[0] is chunk for _ in range(5)]
        assert found.count(True) == 1
    other = Wait("decoder")
    chooser.choose([chunk, other], 2)
    assert chooser.choose([chunk, Wait("encoder", 64), other], 3)[0] is not other  # a byte, then a reader
    assert chooser.choose([chunk, Wait("encoder", 64), other], 3)[0] is other


def test_long_prompts_take_turns() -> None:
    """A short prompt gets its four passes with at most as many of a long one between them."""
    chooser, order = Chooser(256, CostTable()), []
    waiting = [Wait("patcher", 256, since=0), Wait("patcher", 200, since=1)]
    for _ in range(8):
        (one,) = chooser.choose(waiting, 2)
        order.append(one.count)
        waiting.remove(one)
        waiting.append(Wait(STAGES[(STAGES.index(one.stage) + 1) % 4], one.count))
    assert order == [200, 256] * 4


# What passes cost: a latent pass costs little more for four than for one.
PAYS = costs({1: 10, 4: 11, 8: 12}, {1: 40, 2: 42, 4: 45, 8: 90})
NEVER = costs({1: 10, 4: 40, 8: 80}, {1: 4, 2: 9, 4: 20, 8: 50})


@pytest.mark.parametrize(("table", "wanted"), [(PAYS, 4), (NEVER, 1), (CostTable(), 1)])
def test_closed_patches_wait_for_each_other_where_it_pays(table: CostTable, wanted: int) -> None:
    chooser = Chooser(256, table)
    closed, open_ = [Wait("latent")], [Wait("decoder")] * 7
    first = chooser.choose([*closed, *open_], 8)
    assert (first[0].stage == "latent") == (wanted == 1)
    assert chooser.patches_waited_for == wanted
    while len(closed) < wanted:
        closed.append(Wait("latent"))
    assert chooser.choose([*closed, *open_], 8) == closed


def test_a_patch_too_many_for_a_graph_waits_for_the_next() -> None:
    steps = costs({1: 10, 8: 12}, {1: 40, 2: 42, 4: 45, 8: 80})
    closed = [Wait("latent") for _ in range(8)]
    for there, taken in ((8, 8), (7, 4), (5, 4), (4, 4), (3, 3), (1, 1)):
        chooser = Chooser(256, steps)
        assert len(chooser.choose(closed[:there], 8)) == taken
    assert len(Chooser(256, CostTable()).choose(closed[:5], 8)) == 5


def test_closed_patches_wait_neither_for_nobody_nor_for_ever() -> None:
    chooser = Chooser(256, PAYS)
    closed = Wait("latent")
    assert chooser.choose([closed], 8) == [closed]
    chooser.choose([closed, Wait("decoder")], 8)
    for _ in range(1000):
        group = chooser.choose([closed, Wait("decoder", since=chooser.passes)], 8)
        if group == [closed]:
            break
    else:
        pytest.fail("its turn never came")
    assert chooser.passes < 100


@pytest.mark.parametrize("other", [Wait("decoder"), Wait("encoder", 256)])
def test_who_asks_for_the_first_stage_alone_does_not_keep_the_others_waiting(other: Wait) -> None:
    chooser = Chooser(256, CostTable())
    for _ in range(1000):
        group = chooser.choose([other, Wait("patcher", since=chooser.passes)], 2)
        if group == [other]:
            break
    else:
        pytest.fail("its turn never came")
    assert chooser.passes < 100

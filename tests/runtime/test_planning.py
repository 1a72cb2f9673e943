"""Costs, gates, and what follows from them."""

from __future__ import annotations

import pytest
from blt_edge.runtime.drafting import Match
from blt_edge.runtime.options import GenerationOptions
from blt_edge.runtime.planning import CostTable, Gate, Planner


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_guess_s_share_is_read_off_a_line_over_rounds(share: float) -> None:
    line = CostTable().line("decoder")
    usual = line.share
    for guesses in (3, 3, 3):
        line.add(guesses, 7.0 * (1 + share * guesses))
    assert line.share == usual  # one point is no line
    for guesses in (0, 8, 1, 16, 2, 5) * 5:
        line.add(guesses, 7.0 * (1 + share * guesses))
    assert line.share == pytest.approx(share)


@pytest.mark.parametrize(("slope", "share"), [(-1.0, 0.05), (0.0, 0.05), (0.96, 0.95), (30.0, 0.95)])
def test_a_share_has_bounds(slope: float, share: float) -> None:
    line = CostTable().line("lookup")
    for guesses in (0, 1, 2, 3) * 20:
        line.add(guesses, 10.0 + 10.0 * slope * guesses if slope < 30 else 30.0 * guesses - 5.0)
    assert line.share == share


def test_a_gate_closes_when_a_round_is_unlikely_to_get_there() -> None:
    gate = Gate([0.8] * 8, 0.5)
    assert [gate.admits(0.5) for _ in range(5)] == [True, True, True, False, False]
    assert gate.buckets == [4, 4, 4]
    assert gate.survival == pytest.approx(0.8**3)
    always = Gate([0.0] * 8, 0.0)
    assert all(always.admits(1.0) for _ in range(32))


def planned(
    planner: Planner, match: Match | None, rounds: int, share: float, seconds: tuple[float, float]
) -> dict[str, int]:
    """What is chosen how often when this share of guesses is right; seconds: of a round, of a guess in it."""
    chosen: dict[str, int] = {}
    for _ in range(rounds):
        plan = planner.plan(match, 100)
        chosen[plan.source] = chosen.get(plan.source, 0) + 1
        guesses = 0
        confidence = match.confidence if plan.source == "lookup" and match else lambda index: 0.9
        while guesses < plan.length and plan.gate.admits(confidence(guesses)):
            guesses += 1
        planner.learn(plan, guesses, int(share * guesses), seconds[0] + seconds[1] * guesses)
    return chosen


def new(draft: str, length: int | None = None, has_patcher: bool = True) -> Planner:
    options = GenerationOptions(draft=draft, draft_length=length)
    return Planner(CostTable(), options, has_patcher=has_patcher)


def test_right_guesses_are_used_where_a_pass_costs_more_than_its_rows() -> None:
    assert planned(new("auto"), Match(10, 12), 400, 1.0, (1.0, 0.02)).get("none", 0) < 40


def test_wrong_guesses_are_given_up() -> None:
    for match in (Match(10, 12), None):
        assert planned(new("auto"), match, 600, 0.0, (1.0, 0.3))["none"] > 450


def test_nothing_is_guessed_where_rows_cost_as_much_as_passes() -> None:
    assert planned(new("auto"), Match(10, 12), 400, 1.0, (1.0, 1.0))["none"] > 300


def test_what_was_given_up_is_tried_again() -> None:
    planner = new("auto")
    planned(planner, Match(10, 12), 500, 0.0, (1.0, 0.3))
    assert planned(planner, Match(10, 12), 1000, 1.0, (1.0, 0.05)).get("none", 0) < 300


@pytest.mark.parametrize("draft", ["decoder", "patcher"])
def test_a_source_asked_for_is_used_whatever_comes_of_it(draft: str) -> None:
    assert planned(new(draft), None, 50, 0.0, (1.0, 1.0)) == {draft: 50}


def test_no_room_no_match_no_patcher_no_draft() -> None:
    planner = new("lookup")
    assert planner.plan(None, 10).source == "none"
    assert planner.plan(Match(3, 9), 0).source == "none"
    assert planner.plan(Match(3, 9), 5).length == 5
    assert new("none").plan(Match(3, 9), 10).source == "none"
    assert "patcher" not in planned(new("auto", has_patcher=False), None, 200, 1.0, (1.0, 0.1))


def test_a_given_length_is_kept() -> None:
    plan = new("decoder", 7, has_patcher=False).plan(None, 100)
    assert plan.length == 7
    assert all(plan.gate.admits(0.0) for _ in range(7))

"""Costs, acceptance, and what follows from them."""

from __future__ import annotations

import numpy as np
import pytest
from blt_edge.runtime.costs import CostTable
from blt_edge.runtime.drafting import Match
from blt_edge.runtime.options import GenerationOptions
from blt_edge.runtime.planning import Acceptance, Gate, Planner


def costs_of(per_pass: float, per_row: float) -> CostTable:
    """A machine where each stage takes as much for starting a pass and for each position in it."""
    costs = CostTable()
    for stage in ("patcher", "encoder", "latent", "decoder"):
        for rows in (1, 2, 4, 8, 16, 32):
            costs.observe(stage, 0.0, per_pass + per_row * rows, rows)
    return costs


# 1. Costs.


def test_unknown_row_counts_lie_on_the_line_between_known_ones() -> None:
    costs = CostTable()
    assert costs.seconds("decoder", 4) == 0.0
    costs.observe("decoder", 0.0, 1.0, 1)
    assert costs.known("decoder")
    assert 1.0 < costs.seconds("decoder", 5) < 5.0
    costs.observe("decoder", 0.0, 3.0, 9)
    assert costs.seconds("decoder", 1) == 1.0
    assert costs.seconds("decoder", 5) == pytest.approx(2.0)
    assert costs.seconds("decoder", 9) == 3.0
    assert costs.seconds("decoder", 18) > 3.0


def test_one_slow_moment_counts_little() -> None:
    costs = CostTable()
    for _ in range(20):
        costs.observe("decoder", 0.0, 1.0, 1)
    costs.observe("decoder", 0.0, 50.0, 1)
    assert costs.seconds("decoder", 1) < 1.3
    for _ in range(60):
        costs.observe("decoder", 0.0, 1.0, 1)
    assert costs.seconds("decoder", 1) == pytest.approx(1.0, rel=0.15)


def test_a_slow_time_of_the_machine_changes_no_ratio() -> None:
    costs = CostTable()
    rng = np.random.default_rng(0)
    for index in range(4000):
        slower = 2.0 if index // 500 % 2 else 1.0
        rows = int(rng.choice([1, 1, 1, 8]))
        if slower == 1.0 or rows == 1:  # guesses were tried in quiet times only
            costs.observe("decoder", 0.0, slower * (1.0 + 0.1 * rows), rows)
    assert costs.seconds("decoder", 8) / costs.seconds("decoder", 1) == pytest.approx(1.8 / 1.1, rel=0.2)


# 2. Acceptance and gates.


def test_acceptance_goes_from_belief_to_evidence() -> None:
    acceptance = Acceptance(0.5)
    assert acceptance.rate == 0.5
    for _ in range(100):
        acceptance.add(True)
    assert acceptance.rate > 0.95
    for _ in range(100):
        acceptance.add(False)
    assert acceptance.rate < 0.2


def test_a_gate_closes_when_a_round_is_unlikely_to_get_there() -> None:
    rates = [Acceptance(0.8) for _ in range(8)]
    gate = Gate(rates, 0.5)
    assert [gate.admits(0.5) for _ in range(5)] == [True, True, True, False, False]
    assert gate.buckets == [4, 4, 4]
    always = Gate(rates, 0.0)
    assert all(always.admits(1.0) for _ in range(32))


# 3. Plans.


def planned(costs: CostTable, draft: str, match: Match | None, rounds: int, share: float) -> dict[str, int]:
    """What is chosen how often when of each round's guesses this share is right."""
    planner = Planner(costs, GenerationOptions(draft=draft), has_patcher=True)
    chosen: dict[str, int] = {}
    for _ in range(rounds):
        plan = planner.plan(match, 100, 0.25)
        chosen[plan.source] = chosen.get(plan.source, 0) + 1
        guesses = 0
        confidence = match.confidence if plan.source == "lookup" and match else lambda index: 0.9
        while guesses < plan.length and plan.gate.admits(confidence(guesses)):
            guesses += 1
        seconds = planner._round_seconds(plan.source, guesses)
        planner.learn(plan, guesses, int(share * guesses), seconds, 0.0)
    return chosen


def test_right_guesses_are_used_where_a_pass_costs_more_than_its_rows() -> None:
    chosen = planned(costs_of(1.0, 0.02), "auto", Match(10, 12), 400, 1.0)
    assert chosen.get("none", 0) < 40


def test_wrong_guesses_are_given_up() -> None:
    chosen = planned(costs_of(1.0, 0.3), "auto", Match(10, 12), 400, 0.0)
    # Guessing by the patcher costs nothing where it then makes no guess.
    assert chosen.get("lookup", 0) + chosen.get("decoder", 0) < 60


def test_nothing_is_guessed_where_rows_cost_as_much_as_passes() -> None:
    chosen = planned(costs_of(0.0, 1.0), "auto", Match(10, 12), 400, 1.0)
    assert chosen.get("lookup", 0) + chosen.get("decoder", 0) < 20


@pytest.mark.parametrize("draft", ["decoder", "patcher"])
def test_a_source_asked_for_is_used_whatever_comes_of_it(draft: str) -> None:
    assert planned(costs_of(0.0, 1.0), draft, None, 50, 0.0) == {draft: 50}


def test_a_source_slower_than_no_guesses_is_not_taken_for_being_faster_than_the_patcher() -> None:
    planner = Planner(costs_of(1.0, 0.1), GenerationOptions(draft="auto"), has_patcher=True)
    planner.plan(None, 10, 0.25)
    speeds = {"patcher": 0.93, "decoder": 0.95}
    for _ in range(50):
        planner._plain_rounds.add(1, 1.0)
        for name, speed in speeds.items():
            planner._sources[name].add(1, 1 / speed)
    assert planner.plan(None, 10, 0.25).source == "patcher"
    planner._sources["patcher"].seconds *= 2
    assert planner.plan(None, 10, 0.25).source == "none"


def test_no_room_no_match_no_draft() -> None:
    planner = Planner(costs_of(1.0, 0.1), GenerationOptions(draft="lookup"), has_patcher=True)
    assert planner.plan(None, 10, 0.25).source == "none"
    assert planner.plan(Match(3, 9), 0, 0.25).source == "none"
    assert planner.plan(Match(3, 9), 5, 0.25).length == 5


def test_a_given_length_is_kept() -> None:
    planner = Planner(
        costs_of(1.0, 0.1), GenerationOptions(draft="decoder", draft_length=7), has_patcher=False
    )
    plan = planner.plan(None, 100, 0.25)
    assert plan.length == 7
    assert all(plan.gate.admits(0.0) for _ in range(7))


def test_seconds_below_zero_are_none() -> None:
    """Two clocks can disagree by a little: a cost that became negative once grew without bound."""
    costs = CostTable()
    for seconds in (1e-9, *[-1e-9] * 200):
        costs.observe("host none", 0.0, seconds, 1)
    assert 0.0 <= costs.seconds("host none", 1) <= 1e-9

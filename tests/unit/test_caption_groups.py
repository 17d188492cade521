"""The plan of caption groups: properties that hold for any lengths, and that no other plan is cheaper."""

from __future__ import annotations

from itertools import product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cliprd_core.caption_groups import CaptionGroup, plan_groups

CONTEXT_LENGTH = 77
lengths_of_captions = st.lists(st.integers(1, CONTEXT_LENGTH), min_size=1, max_size=60)
group_costs = st.integers(0, 500)
multiples = st.sampled_from([1, 4, 8, 16])


def plan(lengths: list[int], group_cost: int, multiple: int = 1) -> list[CaptionGroup]:
    return plan_groups(np.array(lengths, dtype=np.int64), CONTEXT_LENGTH, group_cost=group_cost, multiple=multiple)


def cost(groups: list[CaptionGroup], group_cost: int) -> int:
    return sum(len(group.rows) * group.length + group_cost for group in groups)


@given(lengths=lengths_of_captions, group_cost=group_costs, multiple=multiples)
def test_each_caption_is_in_one_group_that_is_long_enough(lengths: list[int], group_cost: int, multiple: int) -> None:
    groups = plan(lengths, group_cost, multiple)
    assert sorted(row for group in groups for row in group.rows.tolist()) == list(range(len(lengths)))
    for group in groups:
        assert max(lengths[row] for row in group.rows) <= group.length <= CONTEXT_LENGTH
        assert group.length % multiple == 0 or group.length == CONTEXT_LENGTH


@given(lengths=lengths_of_captions, group_cost=group_costs, multiple=multiples)
def test_it_never_costs_more_than_the_full_context(lengths: list[int], group_cost: int, multiple: int) -> None:
    assert cost(plan(lengths, group_cost, multiple), group_cost) <= len(lengths) * CONTEXT_LENGTH + group_cost


@given(lengths=st.lists(st.integers(1, CONTEXT_LENGTH), min_size=1, max_size=5), group_cost=group_costs)
def test_no_assignment_of_captions_to_groups_is_cheaper(lengths: list[int], group_cost: int) -> None:
    def cost_of(assignment: tuple[int, ...]) -> int:
        members = [[length for length, group in zip(lengths, assignment, strict=True) if group == one] for one in set(assignment)]
        return sum(len(group) * max(group) + group_cost for group in members)

    cheapest = min(cost_of(assignment) for assignment in product(range(len(lengths)), repeat=len(lengths)))
    assert cost(plan(lengths, group_cost), group_cost) == cheapest


def test_one_long_caption_does_not_lengthen_the_others() -> None:
    groups = plan([12, 77, 10, 12], 20)
    assert [(group.rows.tolist(), group.length) for group in groups] == [([2, 0, 3], 12), ([1], 77)]
    assert [group.length for group in plan([12, 77, 10, 12], 10_000)] == [77], "not if a group cost so much"
    assert [group.length for group in plan([12, 77, 10, 12], 20, 8)] == [16, 77]

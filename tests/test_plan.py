"""The plan: who reads what, when."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vae_scale.data.plan import Plan, evaluation_rows, permutation

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=8)


@given(SIZES, st.integers(0, 5), st.integers(1, 4), st.integers(1, 6), st.integers(1, 8))
def test_every_image_comes_exactly_once_per_epoch_for_any_number_of_ranks(
    sizes: list[int], seed: int, ranks: int, share: int, window: int
) -> None:
    plan = Plan(sizes, seed, ranks * share, window)
    epochs = 3
    batches = -(-epochs * plan.images // plan.batch)
    seen = [
        row for batch in range(batches) for rank in range(ranks) for row in plan.rows(batch * plan.batch, rank, ranks).tolist()
    ]
    for epoch in range(epochs):
        assert Counter(seen[epoch * plan.images : (epoch + 1) * plan.images]) == Counter(range(plan.images))


@given(SIZES, st.integers(0, 5), st.integers(1, 3), st.integers(0, 200))
def test_batches_do_not_depend_on_the_number_of_ranks(sizes: list[int], seed: int, share: int, seen: int) -> None:
    plan = Plan(sizes, seed, 12 * share, 2)
    whole = plan.rows(seen, 0, 1)
    for ranks in (2, 3, 4, 12):
        parts = [plan.rows(seen, rank, ranks) for rank in range(ranks)]
        assert np.array_equal(np.concatenate(parts), whole)


@given(SIZES, st.integers(0, 5), st.integers(0, 300))
def test_any_place_is_reached_without_what_came_before(sizes: list[int], seed: int, seen: int) -> None:
    walked = Plan(sizes, seed, 4, 3)
    for place in range(0, seen, 4):
        walked.rows(place, 0, 1)
    assert np.array_equal(walked.rows(seen, 0, 1), Plan(sizes, seed, 4, 3).rows(seen, 0, 1))


def test_a_window_mixes_only_its_own_shards() -> None:
    plan = Plan([10] * 9, seed=1, batch=10, window=3)
    order, shards = plan.epoch(0), plan.shards(0)
    for begin in range(0, 9, 3):
        assert set(order[begin * 10 : begin * 10 + 30] // 10) == set(shards[begin : begin + 3])


def test_epochs_and_seeds_differ() -> None:
    plan = Plan([50, 50], seed=1, batch=10, window=2)
    assert not np.array_equal(plan.epoch(0), plan.epoch(1))
    assert not np.array_equal(plan.epoch(0), Plan([50, 50], 2, 10, 2).epoch(0))


def test_permutations_are_the_same_for_ever() -> None:
    # Recorded; another order would make every resumed run see other images.
    assert permutation(10, 0, 1, "rows").tolist() == RECORDED


RECORDED = [6, 3, 1, 5, 0, 7, 4, 9, 2, 8]


@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 5))
def test_evaluation_weighs_every_image_once(images: int, batch: int, ranks: int) -> None:
    weight: Counter[int] = Counter()
    shapes = set()
    for rank in range(ranks):
        batches = evaluation_rows(images, batch, rank, ranks)
        shapes.add((len(batches), *(len(rows) for rows, _ in batches)))
        for rows, weights in batches:
            for row, value in zip(rows.tolist(), weights.tolist(), strict=True):
                weight[row] += int(value)
    assert weight == Counter(range(images))
    assert len(shapes) == 1

"""The plan: who reads what, when."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vae_scale.data.plan import Plan, evaluation_rows, permutation

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=8)
PLANS = st.builds(
    lambda sizes, seed, window, streams, part: Plan(sizes, seed, 12 * streams * part, window, streams),
    SIZES,
    st.integers(0, 5),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(1, 2),
)


def fresh(plan: Plan) -> Plan:
    return Plan(plan.sizes, plan.seed, plan.batch, plan.window, plan.streams)


@given(PLANS, st.sampled_from([1, 2, 3, 4, 12]))
def test_every_image_comes_exactly_once_per_epoch_for_any_number_of_ranks(plan: Plan, ranks: int) -> None:
    epochs = 3
    batches = -(-epochs * plan.images // plan.batch)
    seen = [
        row for batch in range(batches) for rank in range(ranks) for row in plan.rows(batch * plan.batch, rank, ranks).tolist()
    ]
    for epoch in range(epochs):
        assert Counter(seen[epoch * plan.images : (epoch + 1) * plan.images]) == Counter(range(plan.images))
        assert seen[epoch * plan.images : (epoch + 1) * plan.images] == plan.order(epoch).tolist()


@given(PLANS, st.integers(0, 40), st.sampled_from([1, 2, 3]))
def test_batches_do_not_depend_on_ranks_or_accumulation(plan: Plan, batch: int, pieces: int) -> None:
    whole = plan.rows(batch * plan.batch)
    for ranks in (2, 3, 4, 12):
        shares = [plan.rows(batch * plan.batch, rank, ranks) for rank in range(ranks)]
        assert np.array_equal(np.concatenate(shares), whole)
        assert {len(share) for share in shares} == {plan.batch // ranks}
        # A rank takes its share in pieces, one after the other.
        split = [piece for share in shares for piece in np.array_split(share, pieces)]
        assert np.array_equal(np.concatenate(split), whole)


@given(PLANS, st.integers(0, 40))
def test_any_place_is_reached_without_what_came_before(plan: Plan, batch: int) -> None:
    for place in range(batch):
        plan.rows(place * plan.batch)
    assert np.array_equal(plan.rows(batch * plan.batch), fresh(plan).rows(batch * plan.batch))


@given(PLANS, st.sampled_from([1, 2, 4]))
def test_a_rank_is_told_all_shards_that_it_needs(plan: Plan, ranks: int) -> None:
    starts = np.concatenate([[0], np.cumsum(plan.sizes)])
    for batch in range(3 * plan.images // plan.batch + 2):
        for rank in range(ranks):
            rows, needed = plan.share(batch * plan.batch, rank, ranks)
            assert set((np.searchsorted(starts, rows, side="right") - 1).tolist()) <= set(needed)


@given(st.lists(st.integers(12, 40), min_size=1, max_size=8), st.integers(1, 9), st.sampled_from([1, 2, 4]))
def test_a_shard_is_told_one_batch_before_it_is_needed(sizes: list[int], window: int, ranks: int) -> None:
    plan, starts = Plan(sizes, 1, 12, window), np.concatenate([[0], np.cumsum(sizes)])
    for rank in range(ranks):
        told = plan.share(0, rank, ranks)[1]
        for batch in range(1, 3 * plan.images // plan.batch):
            rows, needed = plan.share(batch * plan.batch, rank, ranks)
            assert set((np.searchsorted(starts, rows, side="right") - 1).tolist()) <= set(told)
            told = needed


def test_a_window_mixes_only_its_own_shards() -> None:
    order = Plan([10] * 9, seed=1, batch=10, window=3).order(0)
    shards = permutation(9, 1, 0, "shards")
    for begin in range(0, 9, 3):
        assert set(order[begin * 10 : begin * 10 + 30] // 10) == set(shards[begin : begin + 3])


def test_ranks_of_different_streams_read_different_shards() -> None:
    plan = Plan([10] * 40, seed=1, batch=16, window=4, streams=4)
    for epoch in range(2):
        begin, end = -(-epoch * 400 // 16), (epoch + 1) * 400 // 16
        read = [{int(row) // 10 for b in range(begin, end) for row in plan.rows(b * 16, rank, 8)} for rank in range(8)]
        for stream in range(4):
            # Two ranks share a stream's shards: a quarter of all, and perhaps one more that it shares with its neighbour.
            assert 10 <= len(read[2 * stream] | read[2 * stream + 1]) <= 12
        assert sum(len(read[2 * stream] | read[2 * stream + 1]) for stream in range(4)) <= 40 + 4


def test_epochs_and_seeds_differ() -> None:
    plan = Plan([50, 50], seed=1, batch=10, window=2)
    assert not np.array_equal(plan.order(0), plan.order(1))
    assert not np.array_equal(plan.order(0), Plan([50, 50], 2, 10, 2).order(0))


def test_a_batch_that_streams_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match="3 equal streams"):
        Plan([10], seed=1, batch=16, window=1, streams=3)


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

"""The order of training images."""

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


def copy_without_cache(plan: Plan) -> Plan:
    return Plan(plan.sizes, plan.seed, plan.batch, plan.window, plan.streams)


@given(PLANS, st.sampled_from([1, 2, 3, 4, 12]))
def test_every_image_occurs_once_per_epoch_for_any_world_size(plan: Plan, world_size: int) -> None:
    epochs = 3
    batches = -(-epochs * plan.images // plan.batch)
    rows = [
        row
        for batch in range(batches)
        for rank in range(world_size)
        for row in plan.rows(batch * plan.batch, rank, world_size).tolist()
    ]
    for epoch in range(epochs):
        order = rows[epoch * plan.images : (epoch + 1) * plan.images]
        assert Counter(order) == Counter(range(plan.images))
        assert order == plan.epoch_order(epoch).tolist()


@given(PLANS, st.integers(0, 40), st.sampled_from([1, 2, 3]))
def test_batches_do_not_depend_on_world_size_or_gradient_accumulation(plan: Plan, batch: int, steps: int) -> None:
    expected = plan.rows(batch * plan.batch)
    for world_size in (2, 3, 4, 12):
        local_rows = [plan.rows(batch * plan.batch, rank, world_size) for rank in range(world_size)]
        assert np.array_equal(np.concatenate(local_rows), expected)
        assert {len(rows) for rows in local_rows} == {plan.batch // world_size}
        micro_batches = [micro for rows in local_rows for micro in np.array_split(rows, steps)]
        assert np.array_equal(np.concatenate(micro_batches), expected)


@given(PLANS, st.integers(0, 40))
def test_batches_do_not_depend_on_previous_calls(plan: Plan, batch: int) -> None:
    for earlier in range(batch):
        plan.rows(earlier * plan.batch)
    assert np.array_equal(plan.rows(batch * plan.batch), copy_without_cache(plan).rows(batch * plan.batch))


@given(PLANS, st.sampled_from([1, 2, 4]))
def test_local_batch_lists_all_shards_of_its_rows(plan: Plan, world_size: int) -> None:
    starts = np.concatenate([[0], np.cumsum(plan.sizes)])
    for batch in range(3 * plan.images // plan.batch + 2):
        for rank in range(world_size):
            rows, shards = plan.local_batch(batch * plan.batch, rank, world_size)
            assert set((np.searchsorted(starts, rows, side="right") - 1).tolist()) <= set(shards)


@given(st.lists(st.integers(12, 40), min_size=1, max_size=8), st.integers(1, 9), st.sampled_from([1, 2, 4]))
def test_shards_are_listed_one_batch_in_advance(sizes: list[int], window: int, world_size: int) -> None:
    plan, starts = Plan(sizes, 1, 12, window), np.concatenate([[0], np.cumsum(sizes)])
    for rank in range(world_size):
        prefetched = plan.local_batch(0, rank, world_size)[1]
        for batch in range(1, 3 * plan.images // plan.batch):
            rows, shards = plan.local_batch(batch * plan.batch, rank, world_size)
            assert set((np.searchsorted(starts, rows, side="right") - 1).tolist()) <= set(prefetched)
            prefetched = shards


def test_a_window_shuffles_only_its_shards() -> None:
    order = Plan([10] * 9, seed=1, batch=10, window=3).epoch_order(0)
    shards = permutation(9, 1, 0, "shards")
    for begin in range(0, 9, 3):
        assert set(order[begin * 10 : begin * 10 + 30] // 10) == set(shards[begin : begin + 3])


def test_ranks_of_different_streams_read_different_shards() -> None:
    plan = Plan([10] * 40, seed=1, batch=16, window=4, streams=4)
    for epoch in range(2):
        begin, end = -(-epoch * 400 // 16), (epoch + 1) * 400 // 16
        read = [{int(row) // 10 for b in range(begin, end) for row in plan.rows(b * 16, rank, 8)} for rank in range(8)]
        for stream in range(4):
            # Two ranks read the shards of a stream: a quarter of all, and up to two that are divided between streams.
            assert 10 <= len(read[2 * stream] | read[2 * stream + 1]) <= 12
        assert sum(len(read[2 * stream] | read[2 * stream + 1]) for stream in range(4)) <= 40 + 4


def test_epochs_and_seeds_differ() -> None:
    plan = Plan([50, 50], seed=1, batch=10, window=2)
    assert not np.array_equal(plan.epoch_order(0), plan.epoch_order(1))
    assert not np.array_equal(plan.epoch_order(0), Plan([50, 50], 2, 10, 2).epoch_order(0))


def test_a_batch_size_not_divisible_by_streams_is_rejected() -> None:
    with pytest.raises(ValueError, match="3 streams"):
        Plan([10], seed=1, batch=16, window=1, streams=3)


def test_permutations_do_not_change_between_versions() -> None:
    # A resumed run would otherwise train on other images.
    assert permutation(10, 0, 1, "rows").tolist() == [6, 3, 1, 5, 0, 7, 4, 9, 2, 8]


@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 5))
def test_evaluation_weights_every_image_once(images: int, batch: int, world_size: int) -> None:
    weight: Counter[int] = Counter()
    shapes = set()
    for rank in range(world_size):
        batches = evaluation_rows(images, batch, rank, world_size)
        shapes.add((len(batches), *(len(rows) for rows, _ in batches)))
        for rows, weights in batches:
            for row, value in zip(rows.tolist(), weights.tolist(), strict=True):
                weight[row] += int(value)
    assert weight == Counter(range(images))
    assert len(shapes) == 1

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem.data.order import WINDOW_BYTES, Groups, permute, rows_at

ONE_BYTE_A_ROW = Groups.of([20_000] * 40, [20_000] * 40)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 17, 1000, 2**16, 2**16 + 1])
def test_permute_is_a_permutation(n):
    assert np.array_equal(np.sort(permute(np.arange(n), n, (7, n))), np.arange(n))


def test_permutation_depends_on_every_part_of_the_key():
    keys = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (12, 1), (1, 21)]
    images = {tuple(permute(np.arange(500), 500, key)) for key in keys}
    assert len(images) == len(keys)


def test_permutation_moves_rows_far():
    n = 100_000
    displacement = np.abs(permute(np.arange(n), n, (3,)) - np.arange(n)).mean()
    assert displacement == pytest.approx(n / 3, rel=0.02)  # as for uniformly random permutations


NUM_ROWS = sorted({size for k in range(1, 11) for size in (1, 2, 2**k - 1, 2**k, 2**k + 1)})
WINDOWS = {
    "1": 1,
    "3": 3,
    "all": 10**9,
}  # bytes per window, and also groups per window, because `orders` gives each group one byte


@st.composite
def orders(draw):
    """Draw groups of rows (some may be empty), a number of groups per window, and a seed."""
    num_rows = draw(st.sampled_from(NUM_ROWS))
    cuts = sorted(draw(st.lists(st.integers(0, num_rows), max_size=12)))
    bounds = [0, *cuts, num_rows]
    sizes = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
    window = WINDOWS[draw(st.sampled_from(sorted(WINDOWS)))]
    return Groups.of(sizes, [1] * len(sizes)), window, draw(st.integers(0, 2**63 - 1))


@given(orders(), st.integers(0, 3))
@settings(deadline=None, derandomize=True, max_examples=150)
def test_every_epoch_holds_each_row_once(order, epoch):
    groups, window, seed = order
    n = groups.num_rows
    rows = rows_at(epoch * n, (epoch + 1) * n, groups, seed=seed, window_bytes=window)
    assert np.array_equal(np.sort(rows), np.arange(n))


@given(orders(), st.lists(st.integers(0, 4000), max_size=8), st.integers(1, 4))
@settings(deadline=None, derandomize=True, max_examples=150)
def test_any_split_of_positions_over_any_number_of_ranks_gives_the_same_rows(order, cuts, world_size):
    groups, window, seed = order
    end = 2 * groups.num_rows + 5
    whole = rows_at(0, end, groups, seed=seed, window_bytes=window)
    cuts = sorted({0, end, groups.num_rows, *(cut % end for cut in cuts)})
    parts = []
    for start, stop in zip(cuts, cuts[1:], strict=False):
        bounds = [start + (stop - start) * rank // world_size for rank in range(world_size + 1)]
        for first, last in zip(bounds, bounds[1:], strict=False):
            parts.append(rows_at(first, last, groups, seed=seed, window_bytes=window))
    assert np.array_equal(np.concatenate(parts), whole)


def test_each_epoch_has_its_own_order():
    n = ONE_BYTE_A_ROW.num_rows
    assert not np.array_equal(rows_at(0, n, ONE_BYTE_A_ROW, seed=5), rows_at(n, 2 * n, ONE_BYTE_A_ROW, seed=5))


def test_consecutive_rows_mix_the_groups_of_one_window_evenly():
    groups = rows_at(0, 80_000, ONE_BYTE_A_ROW, seed=0, window_bytes=99_999) // 20_000
    assert len(set(groups)) == 4  # a fifth group of 20,000 bytes would exceed the window by one byte
    shares = np.bincount(groups[:4_000], minlength=40)
    assert sorted(shares)[-4:] == pytest.approx([1_000] * 4, rel=0.1)


def test_only_a_window_of_a_single_group_exceeds_the_limit():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 50, 300)
    groups = Groups.of(sizes, np.where(rng.random(300) < 0.05, 2 * WINDOW_BYTES, sizes * 50_000))
    of_row = np.repeat(np.arange(300), sizes)
    drawn = of_row[rows_at(0, groups.num_rows, groups, seed=3)]
    last_seen = {group: position for position, group in enumerate(drawn)}
    first_seen = {group: position for position, group in reversed(list(enumerate(drawn)))}
    for position in range(len(drawn)):  # a reader holds each group from its first to its last row
        held = [group for group in first_seen if first_seen[group] <= position <= last_seen[group]]
        assert len(held) == 1 or groups.bytes[held].sum() <= WINDOW_BYTES


def test_without_shuffle_rows_are_in_file_order():
    assert rows_at(8, 13, Groups.of([4, 6]), seed=0, shuffle=False).tolist() == [8, 9, 0, 1, 2]


def test_order_of_no_rows_is_refused():
    with pytest.raises(ValueError, match="at least one row"):
        rows_at(0, 1, Groups.of([0]), seed=0)


def test_the_order_is_that_of_existing_checkpoints():
    """A checkpoint stores a position, but not the order. If the order changed, old runs could not resume exactly."""
    assert permute(np.arange(5), 10, (1, 2)).tolist() == [1, 4, 3, 2, 5]
    assert permute(np.arange(4), 2**40, (3,)).tolist() == [255546647969, 435823828157, 92481491259, 41636616374]
    groups = Groups.of([3, 5, 0, 4, 7], [30, 50, 0, 40, 70])
    assert rows_at(19, 38, groups, seed=7, window_bytes=100).tolist() == [
        3,
        6,
        11,
        4,
        10,
        7,
        9,
        5,
        8,
        14,
        16,
        2,
        18,
        12,
        13,
        17,
        15,
        0,
        1,
    ]
    assert (groups.order_digest, Groups.of([3, 5, 0, 4, 7]).order_digest) == ("8d1aa4730ba921f1", "c615fa9dd77eaebf")


def test_a_group_that_just_fits_is_in_the_window():
    groups = Groups.of([10] * 9, [50] * 9)
    assert len(set(rows_at(0, 20, groups, seed=0, window_bytes=100) // 10)) == 2
    assert len(set(rows_at(0, 10, groups, seed=0, window_bytes=100) // 10)) == 2

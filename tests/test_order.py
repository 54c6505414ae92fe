import numpy as np
import pytest

from lowmem.data.order import WINDOW_ROWS, permute, rows_at


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
    assert displacement == pytest.approx(n / 3, rel=0.02)  # what a uniform permutation gives


@pytest.mark.parametrize("group_sizes", [(10,), (3, 1, 6), (0, 4, 0, 5), (30_000, 5, 20_000, 1)])
def test_every_epoch_holds_each_row_once(group_sizes):
    n = sum(group_sizes)
    for epoch in range(3):
        rows = rows_at(epoch * n, (epoch + 1) * n, group_sizes, seed=5)
        assert np.array_equal(np.sort(rows), np.arange(n))
    assert not np.array_equal(rows_at(0, n, group_sizes, seed=5), rows_at(n, 2 * n, group_sizes, seed=5))


def test_any_cut_of_positions_gives_the_same_rows():
    sizes = (7_000, 9_000, 3_000, 20_000)
    n = sum(sizes)
    whole = rows_at(0, 2 * n, sizes, seed=1)
    cuts = [0, 1, 900, n - 1, n, n + 17, 2 * n]
    parts = [rows_at(a, b, sizes, seed=1) for a, b in zip(cuts, cuts[1:], strict=False)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_consecutive_rows_come_from_few_groups():
    size = WINDOW_ROWS // 4
    sizes = (size,) * 40
    groups = rows_at(0, WINDOW_ROWS, sizes, seed=0) // size
    assert len(set(groups)) == 4
    mixed = groups[:64]
    assert len(set(mixed)) == 4  # and they are mixed, not read one after the other


def test_without_shuffle_rows_stand_in_file_order():
    assert rows_at(8, 13, (4, 6), seed=0, shuffle=False).tolist() == [8, 9, 0, 1, 2]


def test_order_of_no_rows_is_refused():
    with pytest.raises(ValueError, match="at least one row"):
        rows_at(0, 1, (0,), seed=0)

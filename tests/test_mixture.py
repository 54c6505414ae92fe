"""A mixture takes each source's share of the rows in every prefix, and each source has its own epochs."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem.data.mixture import PERIOD, Mixture, open_mixture, whole_weights
from lowmem.data.order import Groups
from lowmem.data.stream import open_stream
from lowmem.errors import UsageError

TEN_MILLION = 10_000_000


class Numbers:
    """Rows without content, in groups of at most `group` rows."""

    def __init__(self, num_rows, group=10**9):
        sizes = [min(group, num_rows - first) for first in range(0, num_rows, group)]
        self.groups = Groups.of(sizes, sizes)
        self.num_rows = num_rows

    def __len__(self):
        return self.num_rows


def source_of(mixture, rows):
    """Return each row's source, and its number there."""
    starts = np.cumsum([0, *map(len, mixture.sources)])
    source = np.searchsorted(starts, rows, side="right") - 1
    return source, rows - starts[source]


WEIGHTS = st.lists(st.floats(1e-3, 1), min_size=1, max_size=9)


@given(WEIGHTS, st.integers(0, 2**63 - 1))
@settings(deadline=None, derandomize=True, max_examples=15)
def test_each_prefix_of_ten_million_rows_has_each_sources_share_within_one_row(weights, seed):
    mixture = Mixture([Numbers(TEN_MILLION)] * len(weights), weights)
    sources, _ = source_of(mixture, mixture.rows_at(0, 2 * PERIOD, seed=seed))
    assert sum(mixture.weights) == PERIOD
    for source, weight in enumerate(mixture.weights):
        taken = np.concatenate([[0], np.cumsum(sources == source)])
        exact = np.arange(2 * PERIOD + 1) * (weight / PERIOD)
        assert np.abs(taken - exact).max() < 1 - 0.9 / PERIOD
        assert taken[PERIOD] == weight  # so all later prefixes are off by as much as those of the first period
    for position in (1, PERIOD - 1, PERIOD + 7, 2 * PERIOD):
        counts = np.bincount(sources[:position], minlength=len(weights)).tolist()
        assert mixture.rows_before(position, seed=seed) == counts
    late = mixture.rows_before(TEN_MILLION - 1, seed=seed)
    assert sum(late) == TEN_MILLION - 1
    assert all(abs(x - w / PERIOD * (TEN_MILLION - 1)) < 1 for x, w in zip(late, mixture.weights, strict=True))


def test_each_prefix_of_ten_million_positions_counted_one_by_one():
    mixture = Mixture([Numbers(3_000_001), Numbers(50_000), Numbers(999)], [0.62, 0.3799, 0.0001])

    def sources_at(start, stop):
        return source_of(mixture, mixture.rows_at(start, stop, seed=3))[0]

    period = sources_at(0, PERIOD)
    for start in (PERIOD, 123 * PERIOD + 4_321, TEN_MILLION - PERIOD):
        assert np.array_equal(sources_at(start, start + PERIOD), np.roll(period, -start))
    whole, positions = np.tile(period, TEN_MILLION // PERIOD), np.arange(1, TEN_MILLION + 1)
    for source, (weight, count) in enumerate(zip(mixture.weights, [6_200_000, 3_799_000, 1_000], strict=True)):
        taken = np.cumsum(whole == source)
        assert np.abs(taken - positions * (weight / PERIOD)).max() < 1 and taken[-1] == count


@st.composite
def mixtures(draw):
    sizes = draw(st.lists(st.integers(2, 60), min_size=1, max_size=4))
    weights = [draw(st.floats(0.01, 1)) for _ in sizes]
    return Mixture([Numbers(size, draw(st.integers(1, 20))) for size in sizes], weights)


@given(mixtures(), st.integers(0, 2**63 - 1))
@settings(deadline=None, derandomize=True, max_examples=12)
def test_each_epoch_of_each_source_holds_each_of_its_rows_once(mixture, seed):
    start = PERIOD - 300
    sources, numbers = source_of(mixture, mixture.rows_at(start, start + 700, seed=seed))
    for source, rows in enumerate(mixture.sources):
        drawn = numbers[sources == source][-mixture.rows_before(start, seed=seed)[source] % len(rows) :]
        whole = drawn[: len(drawn) // len(rows) * len(rows)].reshape(-1, len(rows))
        assert (np.sort(whole, axis=1) == np.arange(len(rows))).all()


@given(mixtures(), st.integers(0, 2**40), st.lists(st.integers(0, 300), max_size=4), st.integers(1, 4))
@settings(deadline=None, derandomize=True, max_examples=12)
def test_any_split_of_positions_over_ranks_and_resumes_gives_the_same_rows(mixture, start, cuts, world_size):
    whole = mixture.rows_at(start, start + 300, seed=7)
    bounds = sorted({0, 300, *cuts})
    parts = []
    for first, stop in itertools.pairwise(bounds):
        pieces = [start + first + (stop - first) * rank // world_size for rank in range(world_size + 1)]
        parts += [mixture.rows_at(*piece, seed=7) for piece in itertools.pairwise(pieces)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_the_order_is_that_of_existing_checkpoints():
    mixture = Mixture([Numbers(7), Numbers(3), Numbers(2)], [0.5, 0.3, 0.2])
    assert mixture.rows_at(0, 20, seed=1).tolist() == [3, 7, 6, 10, 1, 9, 0, 11, 8, 2, 4, 7, 5, 11, 0, 9, 5, 8, 3, 10]
    assert mixture.rows_at(10**12, 10**12 + 8, seed=1).tolist() == [4, 9, 3, 11, 5, 7, 5, 10]
    assert mixture.order_digest == "4ab30279c2a65c8b"


def test_sources_of_one_size_have_different_permutations():
    mixture = Mixture([Numbers(50), Numbers(50)], [1, 1])
    sources, numbers = source_of(mixture, mixture.rows_at(0, 100, seed=0))
    assert numbers[sources == 0].tolist() != numbers[sources == 1].tolist()


def test_without_shuffle_each_source_is_in_its_own_order():
    mixture = Mixture([Numbers(3), Numbers(2)], [3, 1])
    sources, numbers = source_of(mixture, mixture.rows_at(0, 12, seed=0, shuffle=False))
    assert numbers[sources == 0].tolist() == [0, 1, 2] * 3
    assert numbers[sources == 1].tolist() == [0, 1, 0]


def test_weights_are_rounded_to_a_ten_thousandth_of_their_sum():
    assert whole_weights([0.7, 0.2, 0.1]) == (7000, 2000, 1000)
    assert whole_weights([1, 1, 1]) == (3334, 3333, 3333)
    assert whole_weights([8, 2]) == (8000, 2000)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 0.00001], r"weight 1e-05 \(of --train_weights\) is less than 1/10,000 of their sum: raise it"),
        ([1, 0], "weights 1, 0 cannot be used: 0 is not a positive number: correct it, or remove the source"),
        ([1, float("nan")], "nan is not a positive number"),
        ([1e308, 1e308], r"their sum is more than 1.8e308: divide all"),
        ([1], "1 weight for 2 sources: give one weight for each source"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(weights, message):
    with pytest.raises(UsageError, match=message):
        Mixture([Numbers(1), Numbers(1)], weights)


def encode(row):
    return {"input_ids": [row["id"] + 1], "labels": [1]}


@pytest.fixture
def files(tmp_path):
    for name, first, count in (("a", 0, 30), ("b", 100, 7), ("c", 200, 3)):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"id": {first + i}}}\n' for i in range(count)))
    return tmp_path


def drawn(stream, steps):
    ids = []
    for batches in itertools.islice(stream, steps):
        ids.append(sorted(int(x) - 1 for batch in batches for x in batch.inputs["input_ids"].flatten()))
        stream.advance()
    stream.close()
    return ids


def test_a_stream_of_files_or_of_rows_resumes_on_any_number_of_ranks(files):
    named = f"{files}/a.jsonl,{files}/[bc].jsonl"
    open_it = {"weights": [3, 1], "seed": 5, "global_batch_size": 12}
    whole = drawn(open_stream(named, encode, batch_size=4, **open_it), 9)
    assert sum(x < 100 for step in whole for x in step) == 81
    files_of_one_group = [f"{files}/a.jsonl", f"{files}/b.jsonl"]
    lists = [[{"id": i} for i in range(30)], [{"id": i} for i in range(100, 107)]]
    streams = (open_stream(sources, encode, batch_size=12, **open_it) for sources in (files_of_one_group, lists))
    assert drawn(next(streams), 9) == drawn(next(streams), 9)
    first = open_stream(named, encode, batch_size=4, **open_it)
    assert drawn(first, 4) == whole[:4]
    state = json.loads(json.dumps(first.state_dict()))
    parts = []
    for rank in range(3):
        stream = open_stream(named, encode, batch_size=2, **open_it, rank=rank, world_size=3)
        stream.load_state_dict(state)
        parts.append(drawn(stream, 5))
    assert [sorted(itertools.chain(*step)) for step in zip(*parts, strict=True)] == whole[4:]
    assert stream.rows_of_sources == [81, 27] and stream.rows_per_epoch == 40


def test_a_changed_weight_or_source_is_refused_on_resume(files):
    def stream(names, weights):
        sources = [f"{files}/{name}.jsonl" for name in names]
        return open_stream(sources, encode, weights=weights, batch_size=4)

    state = stream("abc", [5, 3, 2]).state_dict()
    with pytest.raises(UsageError, match=r"weights was \[5000, 3000, 2000\] and is \[5000, 2000, 3000\]"):
        stream("abc", [5, 2, 3]).load_state_dict(state)
    with pytest.raises(UsageError, match=r"the data files have changed since the checkpoint \(2 changed"):
        stream("acb", [5, 3, 2]).load_state_dict(state)
    unmixed = open_stream([f"{files}/{name}.jsonl" for name in "abc"], encode, batch_size=4)
    with pytest.raises(UsageError, match="this stream differs from the one in the checkpoint"):
        unmixed.load_state_dict(state)


def test_a_file_in_two_sources_is_refused(files):
    with pytest.raises(UsageError, match=rf"^{files}/a.jsonl, {files}/\*.jsonl names .*/a.jsonl twice: name it"):
        open_mixture(f"{files}/a.jsonl,{files}/*.jsonl", [1, 1])


def test_a_row_of_a_mixture_is_located_in_its_source(files):
    mixture = open_mixture(f"{files}/a.jsonl,{files}/b.jsonl", [1, 1])
    assert mixture[31] == {"id": 101} and mixture.where(31) == f"{files}/b.jsonl, line 2 (byte 12)"
    assert open_mixture([[{}] * 2, [{}] * 3], [1, 1]).where(4) == "source 2, row 2"
    with pytest.raises(IndexError, match="row 37 of 37"):
        mixture[37]

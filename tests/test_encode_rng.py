"""Random changes of rows are a function of the seed and the position: the same in any split and after any resume."""

import itertools
from functools import partial

import pytest

from lowmem import Quarantine, collate, open_stream, with_weights

ROWS = [{"number": number, "weight": float(number)} for number in range(1, 10)]
STEPS = 3  # of 6 rows of 9: a step crosses the end of the first epoch


def encode(row, rng):
    """Return the row's own number, and a random number of random ids."""
    ids = [row["number"], *rng.integers(100, 10_000, size=rng.integers(2, 6)).tolist()]
    return {"input_ids": ids, "labels": [-100, *ids[1:]]}


class InBatches:
    """Draws all random numbers in `batch`, and then fails there because of row 9, which a second look finds good."""

    def __call__(self, row, rng):
        return encode(row, rng)

    def batch(self, rows, rngs):
        encoded = list(map(encode, rows, rngs))
        if any(row["number"] == 9 for row in rows):
            raise ValueError("row 9")
        return encoded


def drawn(world_size=1, *, start=0, rows=ROWS, encode=encode, halve=False, **options):
    """Return each step's encoded rows over all ranks, sorted, from the step `start` on."""
    steps = [[] for _ in range(start, STEPS)]
    for rank in range(world_size):
        options = {"batch_size": 2, "global_batch_size": 6, "takes_rng": True} | options
        stream = open_stream(rows, encode, rank=rank, world_size=world_size, collate=CAUSAL, **options)
        stream.load_state_dict(stream.state_dict() | {"position": start * 6})
        if halve:
            assert stream.halve()
        for step, batches in zip(steps, stream, strict=False):
            ids = itertools.chain.from_iterable(batch.inputs["input_ids"].flatten().tolist() for batch in batches)
            for token in filter(None, ids):  # 0 is padding
                if token < 100:
                    step.append([])
                step[-1].append(token)
            stream.advance()
        stream.close()
    return [sorted(step) for step in steps]


CAUSAL = partial(collate, causal=True)


def test_random_changes_are_the_same_in_any_split_after_any_resume_and_differ_by_epoch_and_seed():
    whole = drawn()
    for steps in (whole, drawn(shuffle=False)):
        by_row = {}
        for ids in itertools.chain.from_iterable(steps):
            by_row.setdefault(ids[0], []).append(ids)
        assert all(len(versions) == 2 and versions[0] != versions[1] for versions in by_row.values())  # of each epoch
    assert drawn(2) == drawn(3) == drawn(prefetch=0) == drawn(batch_size=6) == drawn(halve=True) == whole
    assert drawn(packed_seq_len=16) == drawn(2, packed_seq_len=32) == whole
    assert drawn(start=1) == drawn(3, start=1) == whole[1:]
    weighted = with_weights(encode, "weight")  # passes the generator to the encoder
    assert drawn(encode=weighted) == whole
    assert drawn(seed=1, shuffle=False) != drawn(shuffle=False)
    mixed = drawn(rows=[ROWS[:4], ROWS[4:]], weights=[0.5, 0.5])
    assert drawn(3, rows=[ROWS[:4], ROWS[4:]], weights=[0.5, 0.5], start=1) == mixed[1:] != whole[1:]


@pytest.mark.parametrize("world_size", [1, 3])
def test_an_encoder_of_several_rows_gets_each_rows_generator_and_a_second_try_draws_the_same(world_size):
    together = type("Together", (InBatches,), {"batch": lambda self, rows, rngs: list(map(encode, rows, rngs))})
    assert drawn(world_size, encode=together()) == drawn()
    with pytest.raises(ValueError, match="row 9"):  # no row is bad, so the method is
        drawn(world_size, encode=InBatches())


def test_after_a_bad_row_the_others_draw_the_same(tmp_path):
    class WithoutNine(InBatches):
        def __call__(self, row, rng):
            if row["number"] == 9:
                raise ValueError("row 9")
            return encode(row, rng)

    rest = [[ids for ids in step if ids[0] != 9] for step in drawn()]
    for number, each in enumerate((WithoutNine(), with_weights(WithoutNine(), "weight"))):
        assert drawn(encode=each, quarantine=Quarantine(10, tmp_path / f"bad-{number}.jsonl")) == rest

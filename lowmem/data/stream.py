"""Rows -> the micro-batches of one optimizer step, for ever. The whole state of a stream is one integer."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from lowmem.data.batch import Batch, Collate, UnreadableStep, collate
from lowmem.data.encode import Encode
from lowmem.data.quarantine import Quarantine
from lowmem.data.rows import Rows, as_rows
from lowmem.data.steps import Step, Steps
from lowmem.errors import UsageError

_MOST_FILES_TOLD = 5


class Stream:
    """Endless iterator of `list[Batch]`: the micro-batches of one optimizer step on this rank.

    `position` counts the rows that all ranks together have trained on. Only `advance`, called by the optimizer step,
    moves it; the rows that one background thread encodes up to `prefetch` steps ahead do not. `iter(stream)` starts at
    `position`.
    """

    def __init__(self, steps: Steps, *, prefetch: int, quarantine: Quarantine | None, accept_changed_data: bool):
        self.num_rows = len(steps.rows)
        self.global_batch_size = steps.global_batch_size
        self.position = 0
        self.wait_seconds = 0.0
        """What `next` has waited for rows, in all."""
        self.counts = {"cut_rows": 0, "cut_tokens": 0, "bad_rows": 0}
        """Of the rows that this rank was given: those cut, the tokens left out of them, and those left out."""
        self.changes: list[str] = []
        """What `load_state_dict` accepted that was not as it had been saved."""
        self._quarantine, self._accept_changed_data = quarantine, accept_changed_data
        self._steps, self._prefetch = steps, prefetch
        # Name and fingerprint of each file: now, so that one that cannot be read ends no run that has begun.
        self._files: list[tuple[str, str]] = getattr(steps.rows, "fingerprints", list)()
        self._cursor = 0
        self._given: dict[str, int] = {}  # what the step that was given last added to `counts`
        self._ahead: deque[Future[Step]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lowmem-stream")

    def __iter__(self) -> Iterator[Sequence[Batch]]:
        if self._cursor != self.position:
            self._restart()
        self._read_ahead()
        return self

    def __next__(self) -> Sequence[Batch]:
        started = time.perf_counter()
        try:
            step = self._next_step()
            for bad in step.bad_rows:
                self._quarantine.add(bad)
        except Exception as error:  # of any kind: the other ranks must not wait for this one
            return UnreadableStep(error)
        finally:
            self._cursor += self.global_batch_size
            self.wait_seconds += time.perf_counter() - started
        self._given = step.counts
        for name, count in step.counts.items():
            self.counts[name] += count
        return step.batches

    @property
    def micro_batches(self) -> int:
        """Of a step on each rank."""
        return self._steps.micro_batches

    @property
    def batch_size(self) -> int:
        """Rows of the largest micro-batch."""
        return self._steps.batch_size

    def advance(self) -> None:
        """Count one optimizer step's rows as trained on."""
        self.position += self.global_batch_size

    def halve(self) -> bool:
        """Give the step at `position` again, and all later ones, in micro-batches of half as many rows.

        The rows of a step, their order and the position stay. False, with nothing changed, if some would be empty.
        """
        halved = self._steps.halved()
        if halved is None:
            return False
        if self._cursor != self.position:  # that step is counted once, when it is given again
            for name, count in self._given.items():
                self.counts[name] -= count
        self._steps = halved
        self._restart()
        return True

    def state_dict(self) -> dict[str, object]:
        """What a checkpoint keeps: the position, and what decides which rows stand there, for `load_state_dict`."""
        return {
            "position": self.position,
            "num_rows": self.num_rows,
            "row_groups": self._steps.groups.digest,
            "shuffle": self._steps.shuffle,
            "seed": self._steps.seed,
            "global_batch_size": self.global_batch_size,
            "files": [fingerprint for _, fingerprint in self._files],
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on from a saved position. Raises UsageError if rows, their order or rows per step are others than then.

        With `accept_changed_data` only the last of these counts: the position goes on over the rows as they are now,
        so that those of the epoch that it lies in may come again or not at all.
        """
        here = self.state_dict()
        differing = {name for name in here if name != "position" and state.get(name) != here[name]}
        other_files = self._changed(state.get("files", [])) if "files" in differing else ""
        told = [other_files] if other_files else []
        told += [f"{name} was {state.get(name)} and is {here[name]}" for name in sorted(differing - {"files"})]
        if self._accept_changed_data and "global_batch_size" not in differing:
            self.changes = told
        elif other_files:
            raise UsageError(
                f"the rows are not those that were saved ({other_files}): put the files back, or set "
                "--accept_changed_data=True to go on over them as they are"
            )
        elif told:
            raise UsageError(
                f"this stream is not the one that was saved ({', '.join(told)}): open it over the same rows"
            )
        self.position = state["position"]
        self._restart()

    def _changed(self, saved: Sequence[str]) -> str:
        if len(saved) != len(self._files):
            return f"{len(saved)} files then, {len(self._files)} now"
        changed = [name for (name, now), then in zip(self._files, saved, strict=True) if now != then]
        return f"{len(changed)} changed: {', '.join(changed[:_MOST_FILES_TOLD])}"

    def close(self) -> None:
        """Encode no further steps; without it, a process ends only when those ahead are encoded."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _restart(self) -> None:
        self._cursor = self.position
        while self._ahead:
            self._ahead.popleft().cancel()

    def _next_step(self) -> Step:
        if not self._prefetch:
            return self._steps.at(self._cursor)
        self._read_ahead()
        step = self._ahead.popleft()
        self._ahead.append(self._thread.submit(self._steps.at, self._cursor + self._prefetch * self.global_batch_size))
        return step.result()

    def _read_ahead(self) -> None:
        while len(self._ahead) < self._prefetch:
            position = self._cursor + len(self._ahead) * self.global_batch_size
            self._ahead.append(self._thread.submit(self._steps.at, position))


def open_stream(
    files: str | Path | Sequence[str | Path] | Rows,
    encode: Encode,
    *,
    batch_size: int,
    gradient_accumulation_steps: int = 1,
    global_batch_size: int | None = None,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    shuffle: bool = True,
    collate: Collate = collate,
    packed_seq_len: int | None = None,
    prefetch: int = 2,
    quarantine: Quarantine | None = None,
    accept_changed_data: bool = False,
    pin_memory: bool | None = None,
) -> Stream:
    """Open a Stream over files (as `open_rows` takes them) or over rows that are open already.

    An optimizer step takes `batch_size * gradient_accumulation_steps * world_size` rows; with `global_batch_size` it
    takes that many, in as few equally large micro-batches of at most `batch_size` rows as do. `rank` and `world_size`
    are data-parallel coordinates. `packed_seq_len` packs causal rows, each at most that long, into sequences of at most
    that many tokens (`check_packing` tells whether a model keeps them apart). `prefetch` steps are encoded ahead of the
    one that is asked for (0: each when it is asked for). With a `quarantine`, rows that cannot be read or encoded are
    left out. `accept_changed_data` lets `load_state_dict` go on over other rows than were saved. `pin_memory` (default:
    where there is a GPU) gives batches in page-locked memory. Raises UsageError if a micro-batch would be empty.
    """
    rows = as_rows(files)
    if global_batch_size is None:
        global_batch_size = batch_size * gradient_accumulation_steps * world_size
    elif gradient_accumulation_steps != 1:
        raise UsageError("gradient_accumulation_steps and global_batch_size say the same thing: give one")
    micro_batches = -(-global_batch_size // (batch_size * world_size))
    if global_batch_size < micro_batches * world_size:
        raise UsageError(
            f"{global_batch_size} rows a step leave one of {micro_batches} x {world_size} micro-batches (per process x "
            f"processes) empty: set global_batch_size to a multiple of {world_size}"
        )
    steps = Steps(
        rows=rows,
        encode=encode,
        collate=collate,
        global_batch_size=global_batch_size,
        micro_batches=micro_batches,
        seed=seed,
        rank=rank,
        world_size=world_size,
        shuffle=shuffle,
        packed_seq_len=packed_seq_len,
        may_skip=quarantine is not None,
        pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
    )
    return Stream(steps, prefetch=prefetch, quarantine=quarantine, accept_changed_data=accept_changed_data)

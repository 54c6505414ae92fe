"""An endless stream of optimizer steps, each a list of micro-batches. The position in a stream is one integer."""

import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from lowmem.data.batch import Batch, Collate, UnreadableStep, collate
from lowmem.data.encoder import Encode
from lowmem.data.files.source import Files
from lowmem.data.mixture import Mixture, open_mixture
from lowmem.data.quarantine import Quarantine
from lowmem.data.rows import Rows, as_rows
from lowmem.data.steps import Step, Steps
from lowmem.distributed.placement import given_or_only_rank
from lowmem.errors import UsageError

_MOST_ROWS_HASHED = 64


class Stream:
    """Endless iterator of `list[Batch]`: the micro-batches of one optimizer step on this rank.

    `position` counts the rows of the steps done, over all ranks. Each optimizer step calls `advance` to increase it.
    `iter(stream)` starts at `position`. A background thread encodes up to `prefetch` steps ahead.
    """

    def __init__(self, steps: Steps, *, prefetch: int, quarantine: Quarantine | None, accept_changed_data: bool):
        self.position = 0
        self.num_rows = len(steps.rows)
        self.mixture: Mixture | None = steps.rows if isinstance(steps.rows, Mixture) else None
        self.rows_per_epoch: float = steps.order.rows_per_epoch
        self.global_batch_size = steps.global_batch_size
        self.wait_seconds = 0.0  # total time that `next` has waited for rows
        self.counts = Counter(cut_rows=0, cut_tokens=0, bad_rows=0)  # this rank's truncated rows, cut tokens, bad rows
        self.changes: list[str] = []  # differences from the saved stream, accepted by `load_state_dict`
        self._steps, self._prefetch = steps, prefetch
        self._quarantine, self._accept_changed_data = quarantine, accept_changed_data
        # read now: a file that became unreadable later would end the run at a save
        self.files: list[tuple[str, str]] = getattr(steps.rows, "fingerprints", list)()
        """Name and fingerprint of each file."""
        self._cursor = 0  # the position of the step that `next` will return
        self._ahead: deque[Future[Step]] = deque()  # prefetched steps, from the cursor on
        self._last_counts: dict[str, int] = {}  # the counts of the step that `next` returned last
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lowmem-stream")

    @property
    def micro_batches(self) -> int:
        return self._steps.micro_batches

    @property
    def batch_size(self) -> int:
        return self._steps.batch_size

    @property
    def rows_of_sources(self) -> list[int]:
        """The rows of the steps done, of each source of a mixture; empty for other rows."""
        return self.mixture.rows_before(self.position, seed=self._steps.seed) if self.mixture is not None else []

    def __iter__(self) -> Iterator[Sequence[Batch]]:
        if self._cursor != self.position:
            self._restart()
        self._read_ahead(self._prefetch)
        return self

    def __next__(self) -> Sequence[Batch]:
        started = time.perf_counter()
        try:
            if self._prefetch:
                self._read_ahead(1 + self._prefetch)
                step = self._ahead.popleft().result()
            else:
                step = self._steps.at(self._cursor)
            for bad in step.bad_rows:
                self._quarantine.add(bad)
        except Exception as error:  # return any error as a step, so that the other ranks do not wait for this rank
            return UnreadableStep(error)
        finally:
            self._cursor += self.global_batch_size
            self.wait_seconds += time.perf_counter() - started
        self._last_counts = step.counts
        self.counts.update(step.counts)
        return step.batches

    def advance(self) -> None:
        """Add the rows of one optimizer step to `position`."""
        self.position += self.global_batch_size

    def halve(self) -> bool:
        """Halve the rows per micro-batch, and go back to the step at `position`. Returns False if impossible."""
        halved = self._steps.halved()
        if halved is None:
            return False
        if self._cursor != self.position:  # `next` has returned this step, and will now return and count it again
            self.counts.subtract(self._last_counts)
        self._steps = halved
        self._restart()
        return True

    def state_dict(self) -> dict[str, object]:
        """Return the position, everything that determines which rows it refers to, and a hash of the next rows."""
        return {"position": self.position, "next_rows": self._hash_rows(self.position)} | self._rows_and_order()

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue from a saved position. Raises UsageError if the rows, their order or the rows per step differ.

        With `accept_changed_data`, raises only if the rows per step differ. The epoch may then repeat or miss rows.
        """
        here, files = self._rows_and_order(), []
        if state.get("files") != here["files"]:
            files = [self._changed_files(state.get("files", []))]
        others = sorted(name for name in here.keys() - {"files"} if state.get(name) != here[name])
        # The fingerprint of a large file is of samples, so compare the next rows too, if the checkpoint has their hash.
        # If they cannot be read now, the first step reports why.
        if not (files or others) and (then := state.get("next_rows")):
            files = ["the next rows are not the same"] if self._hash_rows(state["position"]) not in (None, then) else []
        changes = files + [f"{name} was {state.get(name)} and is {here[name]}" for name in others]
        if self._accept_changed_data and "global_batch_size" not in others:
            self.changes = changes
        elif files:
            what = f"the data files have changed since the checkpoint ({files[0]})"
            raise UsageError(f"{what}: restore the files, or set --accept_changed_data=True to continue with them")
        elif changes:
            what = f"this stream differs from the one in the checkpoint ({', '.join(changes)})"
            raise UsageError(f"{what}: open it with the same rows and settings")
        self.position = state["position"]
        self._restart()

    def close(self) -> None:
        """Stop prefetching. If this is not called, the process exits only after the prefetched steps are encoded."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _rows_and_order(self) -> dict[str, object]:
        steps, files = self._steps, [fingerprint for _, fingerprint in self.files]
        rows = {"num_rows": self.num_rows, "row_groups": steps.order.order_digest, "files": files}
        if self.mixture is not None:
            rows["weights"] = list(self.mixture.weights)
        return rows | {"shuffle": steps.shuffle, "seed": steps.seed, "global_batch_size": self.global_batch_size}

    def _hash_rows(self, position: int) -> str | None:
        """Hash the content of the first rows of the step at `position`. Returns None if the rows are not from files."""
        steps, stop = self._steps, position + min(self.global_batch_size, _MOST_ROWS_HASHED)
        if not hasattr(steps.rows, "digest"):
            return None
        return steps.rows.digest(steps.row_ids(position, stop))

    def _changed_files(self, saved: Sequence[str]) -> str:
        if len(saved) != len(self.files):
            return f"{len(saved)} files then, {len(self.files)} now"
        changed = [name for (name, now), then in zip(self.files, saved, strict=True) if now != then]
        return f"{len(changed)} changed: {', '.join(changed[:5])}"

    def _restart(self) -> None:
        self._cursor = self.position
        while self._ahead:
            self._ahead.popleft().cancel()

    def _read_ahead(self, num_steps: int) -> None:
        while len(self._ahead) < num_steps:
            position = self._cursor + len(self._ahead) * self.global_batch_size
            self._ahead.append(self._thread.submit(self._steps.at, position))


def open_stream(
    files: Files | Rows | Sequence[Rows],
    encode: Encode,
    *,
    batch_size: int,
    weights: Sequence[float] | None = None,
    gradient_accumulation_steps: int = 1,
    global_batch_size: int | None = None,
    seed: int = 0,
    rank: int | None = None,
    world_size: int | None = None,
    shuffle: bool = True,
    collate: Collate = collate,
    packed_seq_len: int | None = None,
    is_encoder_decoder: bool = False,
    prefetch: int = 2,
    quarantine: Quarantine | None = None,
    accept_changed_data: bool = False,
    pin_memory: bool | None = None,
    takes_rng: bool = False,
) -> Stream:
    """Open a Stream over files (see `open_rows`) or over rows that are already open.

    With `weights`, `files` names several sources, or is a list of rows, and each source has its share of the rows (see
    `Mixture`).
    A step takes `batch_size * gradient_accumulation_steps * world_size` rows or, if set, `global_batch_size` rows. They
    are split evenly into the fewest micro-batches of at most `batch_size`. `rank` and `world_size` count data-parallel
    ranks (see `data_place`); None is for one process. With `packed_seq_len`, rows are packed into sequences of at most
    that many tokens (see `check_packing`), for an encoder-decoder as prompts and responses. A thread encodes `prefetch`
    steps ahead (0: no thread). With a `quarantine`, skips rows that cannot be read or encoded. `accept_changed_data`:
    see `load_state_dict`. `pin_memory` pins batches for copies to a GPU (None: if CUDA is available).
    With `takes_rng`, calls `encode(row, rng)` for random changes of a row: `rng` is a numpy Generator with a seed made
    of `seed` and the row's position, so a row gets the same numbers on any world size and after any resume, and others
    in each epoch. Draw all random numbers from it.
    """
    rows = as_rows(files) if weights is None else open_mixture(files, weights)
    rank, world_size = given_or_only_rank(rank, world_size)
    if global_batch_size is None:
        global_batch_size = batch_size * gradient_accumulation_steps * world_size
    elif gradient_accumulation_steps != 1:
        raise UsageError("gradient_accumulation_steps and global_batch_size exclude each other: set one")
    micro_batches = -(-global_batch_size // (batch_size * world_size))
    if global_batch_size < micro_batches * world_size:
        raise UsageError(f"{global_batch_size=} leaves a micro-batch empty: set a multiple of {world_size}")
    if pin_memory is None:
        pin_memory = torch.cuda.is_available()
    how = {"may_skip": quarantine is not None, "pin_memory": pin_memory, "takes_rng": takes_rng}
    which = {"global_batch_size": global_batch_size, "seed": seed, "shuffle": shuffle}
    split = {"micro_batches": micro_batches, "rank": rank, "world_size": world_size, "packed_seq_len": packed_seq_len}
    split["is_encoder_decoder"] = is_encoder_decoder
    steps = Steps(rows, encode, collate, **how, **which, **split)
    return Stream(steps, prefetch=prefetch, quarantine=quarantine, accept_changed_data=accept_changed_data)

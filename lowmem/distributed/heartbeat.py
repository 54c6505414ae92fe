"""Each rank tells the others every second that it lives and what it does; one that falls silent ends the run by name.

In a collective a rank waits for peers that were killed, stopped or cut off, where no exception can reach it. So threads
beside it keep watch, over a store on rank 0. All of it is on the host, and imports no torch.
"""

import atexit
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import TYPE_CHECKING, NamedTuple

from lowmem.distributed.signals import say_and_exit

if TYPE_CHECKING:
    from torch.distributed import Store

_SECONDS_TO_TELL = 5.0  # the others how this rank ended
_SECONDS_TO_FOLLOW = 5.0  # that a rank has to end by itself once it knows that another one failed
_BEATS_MISSED = 3  # that make a rank suspect once a collective broke

_step: int | None = None
_phases: tuple[str, ...] = ()
_heartbeat: "Heartbeat | None" = None


def at_step(step: int) -> None:
    """What this rank does from now on belongs to this optimizer step."""
    global _step
    _step = step


def current_step() -> int | None:
    """The optimizer step that this rank is at, counted from 0. None before the first."""
    return _step


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Within it this rank is at the phase `name`, which its beats tell: "evaluating", "summing gradients"."""
    global _phases
    outer = _phases
    _phases = (*outer, name)
    try:
        yield
    finally:
        _phases = outer


def place() -> str:
    """Step and phases that this rank is at."""
    return ", ".join([*([] if _step is None else [f"step {_step}"]), *_phases]) or "the start"


def ended() -> None:
    """This rank has ended well: the others wait for it no more."""
    if _heartbeat is not None:
        _heartbeat.end()


def failed(message: str) -> None:
    """This rank ends, as `message` tells: let the others know. Takes seconds if one of them does not answer."""
    if _heartbeat is not None:
        _heartbeat.end(message)


def suspects() -> str:
    """Who is silent or has failed, after a few beats in which that shows. Empty if nobody, or without a heartbeat."""
    return "" if _heartbeat is None else _heartbeat.suspects()


def places() -> str:
    """Where each rank is. Empty without a heartbeat."""
    return "" if _heartbeat is None else _heartbeat.places()


class Beat(NamedTuple):
    """What a rank tells of itself, as JSON in the store."""

    number: int = 0
    place: str = "the start"
    end: str | None = None
    """None while it runs, "" once it ended well, else what it failed with."""
    knows_end: bool = False
    """It has heard that rank 0 ended, and needs its store no more."""


FIRST = json.dumps(Beat())


class Heartbeat:
    """This rank's two threads: one exchanges beats through the store, which may block for ever, one judges them."""

    def __init__(
        self,
        store: "Store",
        *,
        address: str,
        rank: int,
        world_size: int,
        limit_seconds: float,
        is_over: Callable[[], bool],
        on_abort: Callable[[str], None] | None,
    ):
        self._address, self._rank, self._limit = address, rank, limit_seconds
        self._interval = min(1.0, limit_seconds / 10)
        self._is_over, self._on_abort = is_over, on_abort
        self._beats = [Beat()] * world_size
        # Seconds in which we listened, not seconds of a clock: if this process was stopped, nobody else was silent.
        self._silence = [0.0] * world_size
        self._unanswered = 0.0
        self._known_failure = 0.0
        self._end: str | None = None
        self._wake = Event()
        self._process = os.getpid()
        self._exchange = Thread(target=self._exchange_beats, args=(store,), daemon=True, name="lowmem-beat")
        self._exchange.start()
        Thread(target=self._watch, daemon=True, name="lowmem-watch").start()

    def end(self, cause: str = "") -> None:
        """Tell the others that this rank has ended: well, or with a cause. What was told first stands."""
        if os.getpid() != self._process:
            return  # a fork has the connection but no right to speak
        if self._end is None:
            self._end = cause
        self._wake.set()
        self._exchange.join(_SECONDS_TO_TELL)

    def suspects(self) -> str:
        rounds = 10 * (_BEATS_MISSED + 2)
        while not (told := self._silent(_BEATS_MISSED * self._interval) + self._failed()) and rounds:
            time.sleep(self._interval / 10)
            rounds -= 1
        return "; ".join(told)

    def places(self) -> str:
        at: dict[str, list[str]] = {}
        for rank, beat in enumerate(self._beats):
            where = place() if rank == self._rank else beat.place if beat.end is None else "its end"
            at.setdefault(where, []).append(str(rank))
        told = (f"rank {', '.join(ranks)} is at {where}" for where, ranks in at.items())
        return f"no rank is silent: {'; '.join(told)}"

    def _exchange_beats(self, store: "Store") -> None:
        """Tell and hear, until this rank, or rank 0 with the store, has ended and those who listen know it."""
        keys = [str(rank) for rank in range(len(self._beats))]
        number, last = 0, time.monotonic()
        try:
            while True:
                if self._end is None and self._is_over():
                    self._end = ""
                number += 1
                mine = Beat(number, place(), self._end, self._beats[0].end is not None)
                store.set(keys[self._rank], json.dumps(mine))
                if self._rank != 0 and (mine.end is not None or mine.knows_end):
                    return
                beats = [Beat(*json.loads(beat)) for beat in store.multi_get(keys)]
                now = time.monotonic()
                self._hear(beats, min(now - last, 2 * self._interval))
                last = now
                if self._rank == 0 and mine.end is not None and self._store_may_go():
                    return
                self._wake.wait(self._interval if mine.end is None else self._interval / 10)
                self._wake.clear()
        except RuntimeError:
            return  # the connection is lost, so nothing will be heard: _watch draws the conclusion

    def _hear(self, beats: list[Beat], seconds: float) -> None:
        for rank, (before, beat) in enumerate(zip(self._beats, beats, strict=True)):
            self._silence[rank] = self._silence[rank] + seconds if beat.number == before.number else 0.0
        self._beats, self._unanswered = beats, 0.0

    def _store_may_go(self) -> bool:
        silent = _BEATS_MISSED * self._interval
        others = zip(self._beats[1:], self._silence[1:], strict=True)
        return all(beat.end is not None or beat.knows_end or silence >= silent for beat, silence in others)

    def _watch(self) -> None:
        last = time.monotonic()
        # Once rank 0 has ended well nobody keeps a store, and nobody is watched.
        while self._end is None and self._beats[0].end != "":
            time.sleep(self._interval)
            now = time.monotonic()
            seconds, last = min(now - last, 2 * self._interval), now
            self._unanswered += seconds
            self._known_failure += seconds if self._failed() else 0.0
            told = self._silent(self._limit)
            if self._known_failure >= min(_SECONDS_TO_FOLLOW, self._limit):
                told += self._failed()
            if told and self._end is None:
                self._end_process(
                    f"error: {'; '.join(told)}. Rank {self._rank}, at {place()}, ends with it: look at the other's log "
                    "and machine, then go on from the last checkpoint"
                )

    def _silent(self, seconds: float) -> list[str]:
        """A clause for each rank that runs but was not heard of for so long; rank 0 alone if its store is silent."""
        silence, name = dict(enumerate(self._silence)), "rank {}"
        if self._unanswered >= seconds:
            silence, name = {0: self._unanswered}, f"rank {{}}, which keeps the store at {self._address},"
        return [
            f"{name.format(rank)} has been silent for {waited:.1f} s, last at {self._beats[rank].place}"
            for rank, waited in silence.items()
            if rank != self._rank and self._beats[rank].end is None and waited >= seconds
        ]

    def _failed(self) -> list[str]:
        ends = ((rank, beat.end) for rank, beat in enumerate(self._beats))
        return [f"rank {rank} failed with {end}" for rank, end in ends if end and rank != self._rank]

    def _end_process(self, message: str) -> None:
        def tell_others() -> None:
            self.end(message)
            if self._on_abort is not None:
                self._on_abort(message)

        say_and_exit(message, 1, tell_others)


def start(store: "Store", **options) -> None:
    """Begin to beat, in place of an earlier group's heartbeat. `options` are those of Heartbeat."""
    global _heartbeat
    if _heartbeat is None:
        _tell_how_the_process_ends()
    ended()
    _heartbeat = Heartbeat(store, **options)


def _tell_how_the_process_ends() -> None:
    show = sys.excepthook

    def show_and_tell(kind, error, traceback) -> None:
        show(kind, error, traceback)
        failed(f"{kind.__name__}: {error}")

    sys.excepthook = show_and_tell
    atexit.register(ended)

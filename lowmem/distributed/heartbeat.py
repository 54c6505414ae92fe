"""Heartbeats: at least every second, each rank reports its phase to the others. If a rank stays silent, all ranks exit.

A collective waits forever for a peer that was killed, stopped or disconnected, and no exception can interrupt it. So
two threads on each rank watch the other ranks through a store on rank 0. Importing this module does not import torch.
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

from lowmem.distributed.signals import print_and_exit

if TYPE_CHECKING:
    from torch.distributed import Store

OnAbort = Callable[[str], None] | None

_SECONDS_TO_REPORT = 5.0  # the limit for reporting to other ranks how this one ended
_SECONDS_TO_FOLLOW = 5.0  # after another rank failed, this rank has this long to exit by itself
_BEATS_MISSED = 3  # a rank that missed this many beats is suspected of breaking a collective

_step: int | None = None
_phases: tuple[str, ...] = ()
_heartbeat: "Heartbeat | None" = None


def at_step(step: int) -> None:
    """Set the optimizer step that this rank reports."""
    global _step
    _step = step


def current_step() -> int | None:
    """The optimizer step of this rank, counted from 1; None before the first step."""
    return _step


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Report `name` as this rank's phase within this block, for example "evaluating" or "summing gradients"."""
    global _phases
    outer = _phases
    _phases = (*outer, name)
    try:
        yield
    finally:
        _phases = outer


def status() -> str:
    """The step and phases of this rank, as text."""
    return ", ".join([*([] if _step is None else [f"step {_step}"]), *_phases]) or "startup"


def report_end(error: str = "") -> None:
    """Report that this rank ends, normally or with `error`. Takes up to 5 s if another rank does not respond."""
    if _heartbeat is not None:
        _heartbeat.end(error)


def suspects() -> str:
    """Name the ranks that are silent or failed, after up to 5 beats. Returns "" if there are none, or no heartbeat."""
    return "" if _heartbeat is None else _heartbeat.suspects()


def all_statuses() -> str:
    """The status of every rank, as text; "" without a heartbeat."""
    return "" if _heartbeat is None else _heartbeat.all_statuses()


class Beat(NamedTuple):
    """One report of a rank. The store holds it as JSON."""

    number: int = 0
    status: str = "startup"
    end: str | None = None
    """None while the rank runs, "" after a normal end, else the rank's error."""
    knows_end: bool = False
    """Whether the rank knows that rank 0 ended, and so no longer needs rank 0's store."""


FIRST = json.dumps(Beat())


class Heartbeat:
    """This rank's two threads. One exchanges beats through the store and may block forever; the other checks beats."""

    def __init__(self, store: "Store", address: str, rank: int, world_size: int, limit: float, on_abort: OnAbort):
        self._address, self._rank, self._limit, self._on_abort = address, rank, limit, on_abort
        self._interval = min(1.0, limit / 10)
        self._beats = [Beat()] * world_size
        # Seconds that each rank was silent, except those in which this process was stopped and could not hear others.
        self._silence = [0.0] * world_size
        self._unanswered = self._known_failure = 0.0
        self._end: str | None = None
        self._wake = Event()
        self._process = os.getpid()
        self._exchange = Thread(target=self._exchange_beats, args=(store,), daemon=True, name="lowmem-beat")
        self._exchange.start()
        Thread(target=self._watch, daemon=True, name="lowmem-watch").start()

    def end(self, error: str) -> None:
        """See `report_end`. Only the error of the first call is reported."""
        if os.getpid() != self._process:
            return  # this is a forked process: it shares the connection but is not a rank
        if self._end is None:
            self._end = error
        self._wake.set()
        self._exchange.join(_SECONDS_TO_REPORT)

    def suspects(self) -> str:
        rounds = 10 * (_BEATS_MISSED + 2)
        while not (found := self._silent(_BEATS_MISSED * self._interval) + self._failed()) and rounds:
            time.sleep(self._interval / 10)
            rounds -= 1
        return "; ".join(found)

    def all_statuses(self) -> str:
        at: dict[str, list[str]] = {}
        for rank, beat in enumerate(self._beats):
            where = status() if rank == self._rank else beat.status if beat.end is None else "exit"
            at.setdefault(where, []).append(str(rank))
        clauses = (f"rank {', '.join(ranks)} is at {where}" for where, ranks in at.items())
        return f"no rank is silent: {'; '.join(clauses)}"

    def _exchange_beats(self, store: "Store") -> None:
        """Exchange beats until this rank or rank 0 ends. Rank 0 waits for all others to know it, end or fall silent."""
        from torch import distributed

        keys = [str(rank) for rank in range(len(self._beats))]
        number, last = 0, time.monotonic()
        try:
            while True:
                if self._end is None and not distributed.is_initialized():
                    self._end = ""
                number += 1
                mine = Beat(number, status(), self._end, self._beats[0].end is not None)
                store.set(keys[self._rank], json.dumps(mine))
                if self._rank != 0 and (mine.end is not None or mine.knows_end):
                    return
                beats = [Beat(*json.loads(beat)) for beat in store.multi_get(keys)]
                now = time.monotonic()
                seconds, last = min(now - last, 2 * self._interval), now
                for rank, (before, beat) in enumerate(zip(self._beats, beats, strict=True)):
                    self._silence[rank] = self._silence[rank] + seconds if beat.number == before.number else 0.0
                self._beats, self._unanswered = beats, 0.0
                if self._rank == 0 and mine.end is not None and self._store_may_go():
                    return
                self._wake.wait(self._interval if mine.end is None else self._interval / 10)
                self._wake.clear()
        except RuntimeError:
            return  # the connection is lost; _watch sees that no beats arrive

    def _store_may_go(self) -> bool:
        silent = _BEATS_MISSED * self._interval
        others = zip(self._beats[1:], self._silence[1:], strict=True)
        return all(beat.end is not None or beat.knows_end or silence >= silent for beat, silence in others)

    def _watch(self) -> None:
        last = time.monotonic()
        # Once rank 0 has ended normally, its store is gone, so there is nothing to watch.
        while self._end is None and self._beats[0].end != "":
            time.sleep(self._interval)
            now = time.monotonic()
            seconds, last = min(now - last, 2 * self._interval), now
            self._unanswered += seconds
            self._known_failure += seconds if self._failed() else 0.0
            found = self._silent(self._limit)
            if self._known_failure >= min(_SECONDS_TO_FOLLOW, self._limit):
                found += self._failed()
            if found and self._end is None:
                here = f"Rank {self._rank}, at {status()}, exits too"
                self._end_process(f"error: {'; '.join(found)}. {here}: see the other rank's log, then resume")

    def _silent(self, seconds: float) -> list[str]:
        """Return a clause per running rank that sent no beat for `seconds`; if the store is silent, only for rank 0."""
        silence, name = dict(enumerate(self._silence)), "rank {}"
        if self._unanswered >= seconds:
            silence, name = {0: self._unanswered}, f"rank {{}}, which hosts the store at {self._address},"
        return [
            f"{name.format(rank)} has been silent for {waited:.1f} s, last at {self._beats[rank].status}"
            for rank, waited in silence.items()
            if rank != self._rank and self._beats[rank].end is None and waited >= seconds
        ]

    def _failed(self) -> list[str]:
        ends = ((rank, beat.end) for rank, beat in enumerate(self._beats))
        return [f"rank {rank} failed with {end}" for rank, end in ends if end and rank != self._rank]

    def _end_process(self, message: str) -> None:
        def report() -> None:
            self.end(message)
            if self._on_abort is not None:
                self._on_abort(message)

        print_and_exit(message, 1, report)


def start(store: "Store", address: str, rank: int, world_size: int, *, limit_seconds: float, on_abort: OnAbort) -> None:
    """Start this rank's heartbeat. It replaces the heartbeat of an earlier process group."""
    global _heartbeat
    if _heartbeat is None:
        _report_process_end()
    report_end()
    _heartbeat = Heartbeat(store, address, rank, world_size, limit_seconds, on_abort)


def _report_process_end() -> None:
    show = sys.excepthook

    def show_and_report(kind, error, traceback) -> None:
        show(kind, error, traceback)
        report_end(f"{kind.__name__}: {error}")

    sys.excepthook = show_and_report
    atexit.register(report_end)

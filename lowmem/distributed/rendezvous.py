"""The processes of a run find one another, or each tells within a limit whom it asked, from where, and what to set."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Event, Thread
from typing import NamedTuple
from uuid import uuid4

import psutil
import torch
import torch.distributed as dist

from lowmem.distributed.collectives import sum_over_ranks
from lowmem.distributed.signals import say_and_exit
from lowmem.errors import RankError, StartError

_TORCHS_PATIENCE = timedelta(minutes=30)  # of its stores, once all is well
_SECONDS_BETWEEN_TRIES = 0.1
_SECONDS_BETWEEN_LOOKS = 0.02
_SECONDS_UNTIL_TOLD = 10.0
_LOOPBACK = ("127.", "::1", "fe80:")


class Place(NamedTuple):
    """What a launcher tells a process: who it is, and where rank 0 keeps the store in which all meet."""

    rank: int
    world_size: int
    address: str
    port: int

    def __str__(self) -> str:
        return f"rank {self.rank} on {socket.gethostname()}"


def start_group(backend: str, *, limit_seconds: float) -> None:
    """Start the process group of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, which accelerate then takes as it is.

    Raises StartError where these are wrong, and RankError if a rank does not come, both within about `limit_seconds`;
    what no exception can end is ended with a line on stderr, exit code 1.
    """
    place, deadline = place_of_this_rank(), time.monotonic() + limit_seconds
    _check_collectives_in_debug_mode(place)
    store = open_store(place, deadline, limit_seconds)
    try:
        meeting = meet(store, place, deadline, limit_seconds)
    except dist.DistNetworkError as error:
        raise RankError(
            f"{place} lost the store at {place.address}:{place.port} before all had come ({_first_line(error)}): rank "
            "0, or the launcher that keeps it, has ended; look at its log"
        ) from error
    unconnected = f"{place} met all others, but {backend} does not connect them"
    with _ending_after(limit_seconds, f"{unconnected}: {_network()}"):
        try:
            dist.init_process_group(
                backend, store=dist.PrefixStore(meeting, store), rank=place.rank, world_size=place.world_size
            )
        except RuntimeError as error:
            raise StartError(f"{unconnected} ({_first_line(error)}): {_network()}") from error
    store.set_timeout(_TORCHS_PATIENCE)  # from here on a rank may wait for another one that works


def first_sum(device: torch.device, *, limit_seconds: float, on_abort: Callable[[str], None] | None = None) -> None:
    """One all-reduce on the host and one on `device`: afterwards each rank is known to hear all others.

    Backends connect only then, and NCCL knows no limit in doing so: after `limit_seconds` the process ends with a line
    on stderr that tells what to set, given to `on_abort` too.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    what = f"rank {rank} on {socket.gethostname()} got no answer to its first sum over {world_size} ranks"
    with _ending_after(limit_seconds, f"{what}: {_network()}", on_abort):
        sums = sum_over_ranks(1)
        if device.type != "cpu":
            ones = torch.ones(1, device=device)
            dist.all_reduce(ones)
            sums.append(int(ones.item()))  # waits for the device
    if set(sums) != {world_size}:
        raise StartError(f"rank {rank} summed 1 over {world_size} ranks and got {sums}: {_network()}")


def place_of_this_rank() -> Place:
    """As RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT tell it. Raises StartError where these are wrong."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    told = {name: os.environ.get(name, "") for name in names}
    wrong = [name for name in names if not (told[name] if name == "MASTER_ADDR" else told[name].isdecimal())]
    if wrong:
        found = ", ".join(f"{name}={told[name]!r}" for name in wrong)
        raise StartError(f"several processes were started with {found}: launchers set {', '.join(names)}, so must you")
    rank, world_size, port = (int(told[name]) for name in names if name != "MASTER_ADDR")
    if rank >= world_size or not 0 < port < 2**16:
        raise StartError(
            f"RANK={rank}, WORLD_SIZE={world_size} and MASTER_PORT={port} were set: ranks count from 0 to WORLD_SIZE - "
            "1, ports from 1 to 65535"
        )
    return Place(rank, world_size, told["MASTER_ADDR"], port)


def _check_collectives_in_debug_mode(place: Place) -> None:
    """`accelerate launch --debug` means that collectives are checked: accelerate's own by it, so ours by torch."""
    if os.environ.get("ACCELERATE_DEBUG_MODE", "false").lower() != "true":
        return
    os.environ.setdefault("TORCH_DISTRIBUTED_DEBUG", "DETAIL")
    dist.set_debug_level_from_env()
    if place.rank == 0:
        print("debug mode: torch compares every collective over the ranks before it runs, which takes time", flush=True)


def open_store(place: Place, deadline: float, limit_seconds: float) -> dist.Store:
    """A connection to the store, which rank 0 keeps, unless a launcher does."""
    patience = timedelta(seconds=limit_seconds)
    is_keeper = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"

    def open_at(address: str, is_keeper: bool) -> dist.TCPStore:
        return dist.TCPStore(
            address, place.port, is_master=is_keeper, timeout=patience, wait_for_workers=False, multi_tenant=True
        )

    where = f"{place.address}:{place.port} (MASTER_ADDR, MASTER_PORT)"
    silent = (
        f"{place} reached something at {where} that is not this run's store: set MASTER_ADDR to the host of rank 0 "
        "and MASTER_PORT to one that is free there, the same for all"
    )
    with _ending_after(limit_seconds + 1.0, silent):  # torch waits for a first answer for ever
        try:
            # under its own name, whatever MASTER_ADDR is, so that a wrong one shows when we ask there
            kept = open_at("localhost", True) if is_keeper else None
            _reach(place, where, deadline)
            store = open_at(place.address, is_keeper)  # the same: in one process a port has one store
            del kept
        except dist.DistNetworkError as error:
            if "EADDRINUSE" in str(error):
                raise StartError(
                    f"{place} was to keep the store at {where}, but that port is taken on this host: set MASTER_PORT "
                    "to a free one, the same for all (torchrun: --master_port, accelerate: --main_process_port)"
                ) from error
            raise StartError(f"{silent} ({_first_line(error)})") from error
    return store


def _reach(place: Place, where: str, deadline: float) -> None:
    """Return as soon as someone listens where the store is. (torch would log stacks, and pause for seconds.)"""
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((place.address, place.port), timeout=max(1.0, left)).close()
            return
        except OSError as error:
            keeper_is_up = place.rank == 0  # on this host, so who refuses is another one
            if left > _SECONDS_BETWEEN_TRIES and not (keeper_is_up and isinstance(error, ConnectionRefusedError)):
                time.sleep(_SECONDS_BETWEEN_TRIES)
                continue
            raise StartError(
                f"{place} reaches nobody at {where}: {error.strerror or error}. Set both to the host of rank 0 and a "
                f"port that is free there and open to this host. {_interfaces()}"
            ) from error


def meet(store: dist.Store, place: Place, deadline: float, limit_seconds: float) -> str:
    """Return a name for this meeting, the same on every rank and never used before in this store.

    A launcher's store still holds what the predecessors of restarted processes wrote, and those on several hosts do not
    count restarts alike. So rank 0 asks with a new word, each other rank answers with it and a word of its own, and who
    finds that in rank 0's list is in: no word of a dead process can stand in for one that lives.
    """
    mine, others = uuid4().hex, range(1, place.world_size)
    answered, told_at = "", time.monotonic() + _SECONDS_UNTIL_TOLD
    if place.rank == 0:
        store.set("lowmem/asked", mine)
    while True:
        asked = _read(store, "lowmem/asked")
        if place.rank == 0:
            if asked != mine:
                raise StartError(f"{place} is not the only rank 0 of this run: give each process a RANK of its own")
            answers = _answers(store, others, asked)
            if all(answers):
                store.set("lowmem/met", " ".join([asked, *answers]))
                store.set("lowmem/asked", "")  # not deleted: who has just seen it there would wait for it in reading
                return mine
        elif asked and asked != answered:
            store.set(f"lowmem/{place.rank}", f"{asked} {mine}")
            answered = asked
        elif answered and (met := _read(store, "lowmem/met").split()) and met[0] == answered:
            if mine in met:
                return answered
            raise StartError(
                f"{place} of {place.world_size} is none of the {len(met)} that rank 0 met: give each process a RANK of "
                "its own, and all one WORLD_SIZE (torchrun: --node_rank, --nnodes)"
            )
        now = time.monotonic()
        if now > deadline or (now > told_at and place.rank == 0):
            came = _answers(store, others, asked)
            missing = [str(rank) for rank, has_come in enumerate(came, 1) if not has_come] if asked else ["0"]
            told = f"{place} waits at {place.address}:{place.port} for rank {', '.join(missing)} of {place.world_size}"
            if now > deadline:
                raise RankError(
                    f"{told}, in vain for {limit_seconds:g} s: look whether it runs, with the same MASTER_ADDR, "
                    "MASTER_PORT and WORLD_SIZE, and a RANK of its own"
                )
            print(told, flush=True)
            told_at = deadline
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _read(store: dist.Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _answers(store: dist.Store, ranks: range, asked: str) -> list[str]:
    """The word of each rank that has answered `asked`, "" for the others."""
    keys = [f"lowmem/{rank}" for rank in ranks]
    are_all_there = store.check(keys)
    answers = [(store.get(key).decode() if are_all_there else _read(store, key)).split() for key in keys]
    return [answer[1] if answer and answer[0] == asked else "" for answer in answers]


@contextmanager
def _ending_after(limit_seconds: float, message: str, on_abort: Callable[[str], None] | None = None) -> Iterator[None]:
    """End the process with `message` if what is within takes longer: it may be in C++, where no exception comes."""
    is_done = Event()

    def watch() -> None:
        if not is_done.wait(limit_seconds):
            told = f"error: given up after {limit_seconds:g} s: {message}"
            say_and_exit(told, 1, (lambda: on_abort(told)) if on_abort else lambda: None)

    Thread(target=watch, daemon=True, name="lowmem-start").start()
    try:
        yield
    finally:
        is_done.set()


def _network() -> str:
    """What decides over which network backends connect, as it is set here."""
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE")
    told = ", ".join(f"{name}={os.environ.get(name, 'unset')}" for name in names)
    return (
        f"{told}. {_interfaces()}; set the first two to one that all hosts reach on any port, NCCL_IB_DISABLE=1 "
        "without InfiniBand, NCCL_DEBUG=INFO to see more"
    )


def _interfaces() -> str:
    families = (socket.AF_INET, socket.AF_INET6)
    found = {
        name: [address.address for address in addresses if address.family in families]
        for name, addresses in psutil.net_if_addrs().items()
    }
    # those that lead out of this host first
    told = sorted(
        ((all(each.startswith(_LOOPBACK) for each in every), name, every[0]) for name, every in found.items() if every)
    )
    return f"Interfaces here: {', '.join(f'{name} {address}' for _, name, address in told)}"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].removesuffix(".")

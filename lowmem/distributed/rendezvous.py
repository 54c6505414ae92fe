"""Rendezvous: the processes of a run find each other and start their group, or report in limited time what is wrong."""

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
from lowmem.distributed.signals import print_and_exit
from lowmem.errors import RankError, StartError

_STORE_TIMEOUT = timedelta(minutes=30)  # once the group has started; torch's default, except for NCCL
_SECONDS_BETWEEN_TRIES = 0.1
_SECONDS_BETWEEN_LOOKS = 0.02
_SECONDS_UNTIL_REPORT = 10.0
_LOOPBACK = ("127.", "::1", "fe80:")


class Launch(NamedTuple):
    """Launcher settings: this process's rank, and the address of the store. Rank 0 or the launcher hosts the store."""

    rank: int
    world_size: int
    address: str
    port: int

    def __str__(self) -> str:
        return f"rank {self.rank} on {socket.gethostname()}"


def launch_from_environment() -> Launch:
    """Read RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Raises StartError if any is invalid."""
    found = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    rank, world_size, address, port = found.values()
    if address and rank.isdecimal() and world_size.isdecimal() and port.isdecimal():
        if int(rank) < int(world_size) and 0 < int(port) < 2**16:
            return Launch(int(rank), int(world_size), address, int(port))
    values = ", ".join(f"{name}={value!r}" for name, value in found.items())
    raise StartError(f"the environment has {values}: set all four, RANK below WORLD_SIZE, MASTER_PORT below 65536")


def start_group(backend: str, *, limit_seconds: float) -> None:
    """Start the process group that the environment describes. No wait takes much longer than `limit_seconds`.

    Raises RankError for a missing rank or a lost store, StartError for other failures. If C++ hangs, exits with code 1.
    """
    launch = launch_from_environment()
    if os.environ.get("ACCELERATE_DEBUG_MODE", "false").lower() == "true":  # set by accelerate launch --debug
        os.environ.setdefault("TORCH_DISTRIBUTED_DEBUG", "DETAIL")
        dist.set_debug_level_from_env()
        if launch.rank == 0:
            print("debug mode: torch compares every collective across ranks, which is slow", flush=True)
    start = time.monotonic()
    store = open_store(launch, limit_seconds)
    try:
        name = rendezvous(store, launch, limit_seconds, since=start)
    except dist.DistNetworkError as error:
        lost = f"lost the store at {launch.address}:{launch.port} before all ranks arrived ({_first_line(error)})"
        raise RankError(f"{launch} {lost}: see the log of rank 0 or of the launcher") from error
    options = {"rank": launch.rank, "world_size": launch.world_size, "store": dist.PrefixStore(name, store)}
    unconnected = f"{launch} found all other ranks, but {backend} cannot connect to them"
    with _exit_after(limit_seconds, f"{unconnected}: {_network()}"):
        try:
            dist.init_process_group(backend, **options)
        except RuntimeError as error:
            raise StartError(f"{unconnected} ({_first_line(error)}): {_network()}") from error
    store.set_timeout(_STORE_TIMEOUT)  # from here on, a rank may have to wait long while another one works


def connect_ranks(device: torch.device, *, limit_seconds: float, on_abort: Callable[[str], None] | None = None) -> None:
    """All-reduce on the host, then on a non-CPU `device`: NCCL connects only in a collective, with no time limit.

    If this takes longer than `limit_seconds`, print a message to stderr, pass it to `on_abort` and exit.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    what = f"rank {rank} on {socket.gethostname()} got no result from its first all-reduce over {world_size} ranks"
    with _exit_after(limit_seconds, f"{what}: {_network()}", on_abort):
        sums = sum_over_ranks(1)
        if device.type != "cpu":
            ones = torch.ones(1, device=device)
            dist.all_reduce(ones)
            sums.append(int(ones.item()))  # synchronizes with the device
    if set(sums) != {world_size}:
        raise StartError(f"rank {rank} all-reduced 1 over {world_size} ranks and got {sums}: {_network()}")


def open_store(launch: Launch, limit_seconds: float) -> dist.Store:
    """Connect to the store, or raise StartError within `limit_seconds`. Rank 0 hosts it unless a launcher does."""
    is_host = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    where = f"{launch.address}:{launch.port} (MASTER_ADDR, MASTER_PORT)"
    advice = "on every rank, set both to the host of rank 0 and a free port there"
    unknown = f"{launch} reached a server at {where} that is not this run's store: {advice}"
    options = {"timeout": timedelta(seconds=limit_seconds), "wait_for_workers": False, "multi_tenant": True}
    with _exit_after(limit_seconds + 1.0, unknown):  # torch waits for a first response without a time limit
        try:
            # host the store under "localhost", so that a wrong MASTER_ADDR fails below, when this process connects
            hosted = dist.TCPStore("localhost", launch.port, is_master=True, **options) if is_host else None
            _reach(launch, where, limit_seconds)
            # on rank 0, this is the hosted store, because with multi_tenant a process has one store per port
            store = dist.TCPStore(launch.address, launch.port, is_master=is_host, **options)
            del hosted
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise StartError(f"{unknown} ({_first_line(error)})") from error
            raise StartError(f"{launch} must host the store at {where}, but that port is taken: {advice}") from error
    return store


def _reach(launch: Launch, where: str, limit_seconds: float) -> None:
    """Wait until a server listens at the store's address. torch alone would log stack traces and retry more slowly."""
    deadline = time.monotonic() + limit_seconds
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((launch.address, launch.port), timeout=max(1.0, left)).close()
            return
        except (OSError, UnicodeError) as error:  # UnicodeError: the address cannot be the name of a host
            # rank 0 or its launcher has started the store already, so a host that refuses rank 0 is the wrong host
            is_final = launch.rank == 0 and isinstance(error, ConnectionRefusedError)
            if is_final or left <= _SECONDS_BETWEEN_TRIES or isinstance(error, UnicodeError):
                reason = getattr(error, "strerror", None) or error
                found = f"{launch} cannot connect to {where}: {reason}. {_interfaces()}"
                raise StartError(f"{found}: set both to the host of rank 0 and a port open to this host") from error
            time.sleep(_SECONDS_BETWEEN_TRIES)


def rendezvous(store: dist.Store, launch: Launch, limit_seconds: float, since: float | None = None) -> str:
    """Wait for all ranks, up to `limit_seconds` from `since` (None: now). Returns a unique name for this rendezvous.

    After a restart, a launcher's store still has the keys of dead processes. So rank 0 writes a new token, and every
    other rank answers with it and its own new token, then waits until rank 0 lists the answer. Old tokens never match.
    """
    mine, others, start = uuid4().hex, range(1, launch.world_size), since or time.monotonic()
    answered, has_reported = "", False
    if launch.rank == 0:
        store.set("lowmem/token", mine)
    while True:
        token = _read(store, "lowmem/token")
        if launch.rank == 0:
            if token != mine:
                raise StartError(f"{launch} is not the only rank 0 of this run: set a different RANK on every process")
            answers = _answers(store, others, token)
            if all(answers):
                store.set("lowmem/members", " ".join([token, *answers]))
                store.set("lowmem/token", "")  # if it were deleted, a rank between `check` and `get` would block
                return mine
        elif token and token != answered:
            store.set(f"lowmem/{launch.rank}", f"{token} {mine}")
            answered = token
        elif answered and (members := _read(store, "lowmem/members").split()) and members[0] == answered:
            if mine in members:
                return answered
            found = f"{launch} of {launch.world_size} is not among the {len(members)} ranks that rank 0 found"
            raise StartError(f"{found}: set a unique RANK and the same WORLD_SIZE (torchrun: --node_rank, --nnodes)")
        waited = time.monotonic() - start
        is_late = waited > limit_seconds
        if is_late or (waited > _SECONDS_UNTIL_REPORT and launch.rank == 0 and not has_reported):
            arrived = _answers(store, others, token)
            missing = [str(rank) for rank, has_arrived in enumerate(arrived, 1) if not has_arrived] if token else ["0"]
            awaited = f"for rank {', '.join(missing)} of {launch.world_size} at {launch.address}:{launch.port}"
            if is_late:
                found = f"{launch} timed out after {limit_seconds:g} s waiting {awaited}"
                raise RankError(f"{found}: check that it runs, with a unique RANK and the same WORLD_SIZE and address")
            print(f"{launch} is waiting {awaited}", flush=True)
            has_reported = True
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _read(store: dist.Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _answers(store: dist.Store, ranks: range, token: str) -> list[str]:
    """Return for each rank its own token if it has answered `token`, else ""."""
    answers = [_read(store, f"lowmem/{rank}").split() for rank in ranks]
    return [answer[1] if answer and answer[0] == token else "" for answer in answers]


@contextmanager
def _exit_after(limit_seconds: float, message: str, on_abort: Callable[[str], None] | None = None) -> Iterator[None]:
    """Exit with `message` if the block exceeds the limit. It may hang in C++ code, which no exception can interrupt."""
    is_done = Event()

    def watch() -> None:
        if not is_done.wait(limit_seconds):
            error = f"error: timed out after {limit_seconds:g} s: {message}"
            print_and_exit(error, 1, lambda: on_abort and on_abort(error))

    Thread(target=watch, daemon=True, name="lowmem-start").start()
    try:
        yield
    finally:
        is_done.set()


def _network() -> str:
    """Return this process's network settings for gloo and NCCL, and advice on what to set."""
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE")
    found = ", ".join(f"{name}={os.environ.get(name, 'unset')}" for name in names)
    advice = "set the first two to an interface that all hosts reach; set NCCL_IB_DISABLE=1 if there is no InfiniBand"
    return f"{found}. {_interfaces()}; {advice}"


def _interfaces() -> str:
    """List the network interfaces of this host, external ones first."""
    families = (socket.AF_INET, socket.AF_INET6)
    found = []
    for name, addresses in psutil.net_if_addrs().items():
        if own := [address.address for address in addresses if address.family in families]:
            found.append((all(each.startswith(_LOOPBACK) for each in own), name, own[0]))
    return f"Interfaces here: {', '.join(f'{name} {address}' for _, name, address in sorted(found))}"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].removesuffix(".")

"""A run of several processes starts as one, or each tells within a limit why not, and what differs between them."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lowmem.cli import main
from lowmem.distributed.collectives import sum_over_ranks
from lowmem.distributed.setup import init_distributed
from lowmem.job.supervise import tell_failure
from tests.forked import fork_ranks
from tests.models import T5, qa_rows
from tests.processes import ROOT, finish, free_port, module_command, started
from tests.runs import flags, losses, settings, write_files

LIMIT = 2.0


def join_as_told(folder, changes, work=lambda: None):
    """Join as the command line would: what is told is in a file for each process, the exit code is that of main."""
    rank = os.environ["RANK"]
    with open(Path(folder, rank), "w") as told:
        os.dup2(told.fileno(), 2)
    for name, value in changes.get(rank, {}).items():
        os.environ.pop(name, None)
        os.environ |= {name: value} if value else {}
    try:
        init_distributed(heartbeat_timeout=LIMIT)
        work()
        dist.destroy_process_group()
    except Exception as error:
        sys.exit(tell_failure(error))


def told_by(folder, rank):
    """What a process told, without what torch logs."""
    lines = (folder / str(rank)).read_text().splitlines()
    return [line for line in lines if line.startswith("error")]


def test_a_wrong_address_is_told_by_who_has_it_and_a_missing_rank_by_the_other(tmp_path):
    port = free_port()
    changes = {"1": {"MASTER_ADDR": "127.0.0.2", "MASTER_PORT": str(port)}}
    started_at = time.monotonic()
    assert fork_ranks(2, join_as_told, tmp_path, changes) == [1, 2]
    assert time.monotonic() - started_at < 20
    (told,) = told_by(tmp_path, 1)
    assert f"rank 1 on {socket.gethostname()} reaches nobody at 127.0.0.2:{port} (MASTER_ADDR, MASTER_PORT)" in told
    assert "Connection refused" in told and "Interfaces here: " in told and "lo 127.0.0.1" in told
    (told,) = told_by(tmp_path, 0)
    assert re.search(r"rank 0 on \S+ timed out after 2 s waiting for rank 1 of 2 at localhost:\d+", told)


def test_a_name_that_nobody_knows_is_told_on_every_rank(tmp_path):
    changes = {rank: {"MASTER_ADDR": "no-such-host.invalid"} for rank in "01"}
    assert fork_ranks(2, join_as_told, tmp_path, changes) == [2, 2]
    assert "rank 0" in told_by(tmp_path, 0)[0] and "no-such-host.invalid:" in told_by(tmp_path, 0)[0]


def test_a_taken_port_is_told_at_once_and_a_silent_stranger_within_the_limit(tmp_path):
    with socket.socket() as stranger:
        stranger.bind(("", 0))
        stranger.listen()
        port = str(stranger.getsockname()[1])
        assert fork_ranks(2, join_as_told, tmp_path, {rank: {"MASTER_PORT": port} for rank in "01"}) == [2, 1]
    assert f"localhost:{port} (MASTER_ADDR, MASTER_PORT), but that port is taken" in told_by(tmp_path, 0)[0]
    assert "rank 1" in told_by(tmp_path, 1)[0] and "that is not this run's store" in told_by(tmp_path, 1)[0]


def test_a_rank_that_never_comes_is_named(tmp_path):
    changes = {rank: {"WORLD_SIZE": "4"} for rank in "01"}
    assert fork_ranks(2, join_as_told, tmp_path, changes) == [1, 1]
    assert "timed out after 2 s waiting for rank 2, 3 of 4" in told_by(tmp_path, 0)[0]
    assert re.search("for rank 2, 3 of 4|lost the store", told_by(tmp_path, 1)[0])


def test_two_processes_cannot_be_one_rank(tmp_path):
    codes = fork_ranks(
        3,
        join_as_told,
        tmp_path,
        {rank: {"WORLD_SIZE": "2"} for rank in "01"} | {"2": {"RANK": "1", "WORLD_SIZE": "2"}},
    )
    assert codes[0] == 0 and sorted(codes)[:2] == [0, 0] and sorted(codes)[2] in (1, 2), codes


def test_a_network_interface_that_is_not_there_is_told_with_those_that_are(tmp_path):
    assert fork_ranks(2, join_as_told, tmp_path, {"1": {"GLOO_SOCKET_IFNAME": "nosuch0"}}) == [1, 2]
    (told,) = told_by(tmp_path, 1)
    assert "gloo does not connect them" in told and "GLOO_SOCKET_IFNAME=nosuch0" in told and "lo 127.0.0.1" in told
    assert "rank 0" in told_by(tmp_path, 0)[0] and "GLOO_SOCKET_IFNAME=unset" in told_by(tmp_path, 0)[0]


@pytest.mark.parametrize(("name", "value"), [("MASTER_ADDR", None), ("MASTER_PORT", "http"), ("RANK", "7")])
def test_an_environment_that_makes_no_sense_is_told(name, value, tmp_path):
    codes = fork_ranks(2, join_as_told, tmp_path, {rank: {name: value} for rank in "01"})
    assert codes == [2, 2]
    assert name in told_by(tmp_path, 0)[0]


def wait_longer_than_the_limit():
    if dist.get_rank() == 1:
        time.sleep(LIMIT + 0.5)
    assert sum_over_ranks(1) == [2]
    store = dist.distributed_c10d._get_default_store()  # in which NCCL's ranks tell one another what to connect to
    if dist.get_rank() == 0:
        time.sleep(LIMIT + 0.5)
        store.set("late", "but here")
    assert store.get("late") == b"but here"
    dist.all_reduce(torch.ones(1), group=dist.new_group())


def test_once_started_ranks_may_wait_for_one_another_as_long_as_they_live(tmp_path):
    assert fork_ranks(2, join_as_told, tmp_path, {}, wait_longer_than_the_limit) == [0, 0]


def sum_unequal_tensors():
    dist.all_reduce(torch.ones(1 + dist.get_rank()))


def test_accelerates_debug_flag_lets_torch_compare_collectives(tmp_path):
    changes = {rank: {"ACCELERATE_DEBUG_MODE": "true"} for rank in "01"}
    assert fork_ranks(2, join_as_told, tmp_path, changes, sum_unequal_tensors) == [1, 1]
    assert "Detected mismatch between collectives on ranks" in (tmp_path / "0").read_text()


def test_a_launchers_store_may_hold_what_the_dead_wrote_and_restarts_counted_in_two_ways(tmp_path):
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    agents = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    changes = {rank: agents | {"TORCHELASTIC_RESTART_COUNT": "0"} for rank in "01"}
    assert fork_ranks(2, join_as_told, tmp_path, changes) == [0, 0]
    changes["0"]["TORCHELASTIC_RESTART_COUNT"] = "1"
    assert fork_ranks(2, join_as_told, tmp_path, changes) == [0, 0]
    assert fork_ranks(1, join_as_told, tmp_path, {"0": agents | {"WORLD_SIZE": "2"}}) == [1]
    assert fork_ranks(2, join_as_told, tmp_path, changes) == [0, 0]


def train_as_told(folder, commands, command="train"):
    rank = int(os.environ["RANK"])
    with open(Path(folder, str(rank)), "w") as told:
        os.dup2(told.fileno(), 2)
    sys.exit(main([command, *commands[rank]]))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("work"), num_rows=40)


def start(folder, work, **changes):
    """The exit codes of two ranks of which the second has changed flags, and what each told."""
    usual = settings(work, "out", max_steps=1, global_batch_size=4, output_dir=folder / "out") | changes.pop(
        "usual", {}
    )
    commands = [
        [f"--{name}={value}" for name, value in each.items() if value is not None] for each in (usual, usual | changes)
    ]
    codes = fork_ranks(2, train_as_told, folder, commands)
    return codes, [" ".join(told_by(folder, rank)) for rank in range(2)]


def test_other_rows_on_a_rank_are_told_on_all(work, tmp_path):
    rows = qa_rows(40)
    rows[17]["response"] += "!"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    codes, told = start(tmp_path, work, train_file=tmp_path / "rows.jsonl")
    assert codes == [2, 2]
    for each in told:
        difference = r"rank 1 on \S+ has training rows 40, fingerprint (\w+) \(rank 0: 40, fingerprint (\w+)\)"
        mine, theirs = re.search(difference, each).groups()
        assert mine != theirs
    assert not list((tmp_path / "out").glob(".seen-*"))


def test_other_flags_on_a_rank_are_told_on_all_together(work, tmp_path):
    codes, told = start(tmp_path, work, learning_rate=0.5, seed=7)
    assert codes == [2, 2]
    for each in told:
        assert "--learning_rate 0.5 (rank 0: 0.01); --seed 7 (rank 0: 0). Rank 0 is on" in each
    assert not (tmp_path / "out").exists()


def test_paths_of_their_own_to_the_same_files_are_no_difference(work, tmp_path):
    shutil.copy(work / "rows.jsonl", tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    (tmp_path / "out").mkdir()
    codes, told = start(tmp_path, work, train_file=tmp_path / "rows.jsonl", output_dir=tmp_path / "link")
    assert codes == [0, 0], told


def test_other_weights_or_another_tokenizer_on_a_rank_are_told_on_all(work, tmp_path):
    from lowmem.model import load_model

    torch.manual_seed(0)
    model, tokenizer = load_model(model_config=T5 | {"vocab_size": 400})
    for name in ("model", "other"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        with torch.no_grad():
            model.shared.weight[7, 3] += 1e-3
            tokenizer.add_tokens(["other"])
    folder = {"usual": {"model_name_or_path": tmp_path / "model", "model_config": None}}
    codes, told = start(tmp_path, work, **folder, model_name_or_path=tmp_path / "other")
    assert codes == [2, 2]
    for each in told:
        assert re.search(r"has the model (\w+) \(rank 0: (?!\1)\w+\); the tokenizer (\w+) \(rank 0: (?!\2)\w+\)", each)


def test_evaluate_too_compares_the_rows_of_its_ranks(work, tmp_path):
    from lowmem.model import load_model

    for part in load_model(model_config=T5):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text((work / "rows.jsonl").read_text().partition("\n")[2])
    commands = [
        [f"--model_name_or_path={tmp_path}/model", f"--test_file={folder}/rows.jsonl"] for folder in (work, tmp_path)
    ]
    assert fork_ranks(2, train_as_told, tmp_path, commands, "evaluate") == [2, 2]
    for rank in (0, 1):
        assert re.search(r"has test rows 39, .*\(rank 0: 40, ", told_by(tmp_path, rank)[0])


def ranks_on_hosts(stack, commands):
    """Processes of one group, started one by one as on hosts of their own; returns their ends."""
    port = str(free_port())
    ranks = [
        stack.enter_context(
            started(
                *command,
                RANK=str(rank),
                WORLD_SIZE=str(len(commands)),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
                PYTHONPATH="",
            )
        )
        for rank, command in enumerate(commands)
    ]
    return [finish(process, 60) for process in ranks]


def can_unshare():
    return shutil.which("unshare") and not subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode


@pytest.mark.skipif(not can_unshare(), reason="needs the right to mount a file system")
def test_other_code_and_a_folder_that_is_not_shared_are_told(work, tmp_path):
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "lowmem", checkout / "lowmem", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train_low_mem.py", checkout)
    with open(checkout / "lowmem" / "step.py", "a") as file:
        file.write("# one line more\n")
    output = tmp_path / "shared" / "out"
    output.parent.mkdir()
    words = ["train", *flags(work, "out", max_steps=1, output_dir=output)]
    mount = f"mount -t tmpfs none {output.parent} && exec {sys.executable} {checkout / 'train_low_mem.py'} $0 $@"
    with ExitStack() as stack:
        ends = ranks_on_hosts(
            stack, [[sys.executable, "train_low_mem.py", *words], ["unshare", "-m", "sh", "-c", mount, *words]]
        )
    for end in ends:
        assert end.returncode == 2, end.stderr
        assert re.search(
            r"rank 1 on \S+ has lowmem's code (\w+) \(rank 0: (?!\1)\w+\); output_dir another one, at", end.stderr
        )
    assert not output.exists()


@pytest.fixture(scope="module")
def alone(work):
    command = flags(work, "alone", max_steps=3, global_batch_size=8)
    assert fork_ranks(1, train_as_told, work, [command]) == [0]
    return losses(work, "alone")


TWO_HOSTS = {
    "torchrun": ("torch.distributed.run", "--nnodes=2", "--node_rank=HOST", "--nproc_per_node=1")
    + ("--master_addr=127.0.0.1", "--master_port=PORT"),
    "accelerate": ("accelerate.commands.launch", "--multi_gpu", "--num_machines=2", "--num_processes=2")
    + ("--machine_rank=HOST", "--main_process_ip=127.0.0.1", "--main_process_port=PORT", "--debug"),
}


@pytest.mark.parametrize("launcher", TWO_HOSTS)
def test_two_launchers_as_on_two_hosts_are_one_training(launcher, work, alone):
    words, port = TWO_HOSTS[launcher], str(free_port())
    with ExitStack() as stack:
        hosts = []
        for host in ("0", "1"):
            command = module_command(*(word.replace("HOST", host).replace("PORT", port) for word in words))
            training = flags(work, launcher, max_steps=3, global_batch_size=8, batch_size=2)
            hosts.append(stack.enter_context(started(*command, "train_low_mem.py", "train", *training)))
        ends = [finish(process, 90) for process in hosts]
    assert [end.returncode for end in ends] == [0, 0], ends
    assert "each of 8 rows: 2 processes x 2 micro-batches of at most 2" in ends[0].stdout and ends[1].stdout == ""
    assert losses(work, launcher) == pytest.approx(alone, rel=1e-6)

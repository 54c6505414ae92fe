"""Several processes start as one run, or each reports within a time limit why they cannot do so."""

import ctypes
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
from lowmem.distributed.signals import Signals
from lowmem.job.exit_file import write_exit
from lowmem.job.processes import start_processes
from lowmem.job.supervise import report_error
from tests.forked import fork_ranks
from tests.models import T5, qa_rows
from tests.processes import ROOT, finish, free_port, module_command, started, started_function
from tests.runs import flags, losses, settings, write_files

LIMIT = 2.0


def init_and_report(folder, changes, work=lambda: None):
    """Initialize, call `work`, and exit with the CLI's exit codes; write stderr to a file named after the rank."""
    rank = os.environ["RANK"]
    with open(Path(folder, rank), "w") as output:
        os.dup2(output.fileno(), 2)
    for name, value in changes.get(rank, {}).items():
        os.environ.pop(name, None)
        os.environ |= {name: value} if value else {}
    try:
        init_distributed(heartbeat_timeout=LIMIT)
        work()
        dist.destroy_process_group()
    except Exception as error:
        sys.exit(report_error(error))


def errors_of(folder, rank):
    """Return the error lines of a rank, without the lines that torch logs."""
    lines = (folder / str(rank)).read_text().splitlines()
    return [line for line in lines if line.startswith("error")]


def test_a_rank_reports_its_wrong_address_and_the_other_reports_a_missing_rank(tmp_path):
    port = free_port()
    changes = {"1": {"MASTER_ADDR": "127.0.0.2", "MASTER_PORT": str(port)}}
    started_at = time.monotonic()
    assert fork_ranks(2, init_and_report, tmp_path, changes) == [1, 2]
    assert time.monotonic() - started_at < 20
    (error,) = errors_of(tmp_path, 1)
    assert f"rank 1 on {socket.gethostname()} cannot connect to 127.0.0.2:{port} (MASTER_ADDR, MASTER_PORT)" in error
    assert "Connection refused" in error and "Interfaces here: " in error and "lo 127.0.0.1" in error
    (error,) = errors_of(tmp_path, 0)
    assert re.search(r"rank 0 on \S+ timed out after 2 s waiting for rank 1 of 2 at localhost:\d+", error)


def test_an_unknown_host_name_is_a_usage_error_on_every_rank(tmp_path):
    changes = {rank: {"MASTER_ADDR": "no-such-host.invalid"} for rank in "01"}
    assert fork_ranks(2, init_and_report, tmp_path, changes) == [2, 2]
    assert "rank 0" in errors_of(tmp_path, 0)[0] and "no-such-host.invalid:" in errors_of(tmp_path, 0)[0]


@pytest.mark.parametrize("address", ["x" * 70, "a..b", "\udcff"])
def test_an_address_that_is_not_a_host_name_is_reported_in_one_line(address, tmp_path):
    assert fork_ranks(1, init_and_report, tmp_path, {"0": {"MASTER_ADDR": address, "WORLD_SIZE": "2"}}) == [2]
    (error,) = errors_of(tmp_path, 0)
    assert "rank 0 on " in error and "(MASTER_ADDR, MASTER_PORT)" in error


NEW_UTS_NAMESPACE = 0x04000000  # CLONE_NEWUTS: the fork then has its own host name


def start_on_host(name, folder):
    if ctypes.CDLL(None).unshare(NEW_UTS_NAMESPACE) != 0:
        os._exit(77)
    socket.sethostname(name)
    code = "import os, sys; open(sys.argv[1] + os.environ['RANK'], 'w').write(os.environ['MASTER_ADDR'])"
    assert start_processes(2, ["-c", code, f"{folder}/"], Signals()) == 0
    write_exit(Path(folder), "done", step=1, rank=0)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
@pytest.mark.parametrize("name", ["no such host", "a/b%s{}"])
def test_processes_on_one_machine_need_no_valid_host_name(name, tmp_path):
    with started_function(start_on_host, name, str(tmp_path)) as process:
        result = finish(process, timeout=300)
    if result.returncode == 77:
        pytest.skip("needs the right to change the host name")
    assert result.returncode == 0, result.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["localhost"] * 2
    assert json.loads((tmp_path / "exit.json").read_text())["host"] == name


def test_a_taken_port_and_a_silent_listener_are_reported(tmp_path):
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        assert fork_ranks(2, init_and_report, tmp_path, {rank: {"MASTER_PORT": port} for rank in "01"}) == [2, 1]
    assert f"localhost:{port} (MASTER_ADDR, MASTER_PORT), but that port is taken" in errors_of(tmp_path, 0)[0]
    assert "rank 1" in errors_of(tmp_path, 1)[0] and "that is not this run's store" in errors_of(tmp_path, 1)[0]


def test_ranks_that_never_start_are_named(tmp_path):
    changes = {rank: {"WORLD_SIZE": "4"} for rank in "01"}
    assert fork_ranks(2, init_and_report, tmp_path, changes) == [1, 1]
    assert "timed out after 2 s waiting for rank 2, 3 of 4" in errors_of(tmp_path, 0)[0]
    assert re.search("for rank 2, 3 of 4|lost the store", errors_of(tmp_path, 1)[0])


def test_two_processes_cannot_have_the_same_rank(tmp_path):
    codes = fork_ranks(
        3,
        init_and_report,
        tmp_path,
        {rank: {"WORLD_SIZE": "2"} for rank in "01"} | {"2": {"RANK": "1", "WORLD_SIZE": "2"}},
    )
    assert codes[0] == 0 and sorted(codes)[:2] == [0, 0] and sorted(codes)[2] in (1, 2), codes


def test_a_missing_network_interface_is_reported_with_the_existing_ones(tmp_path):
    assert fork_ranks(2, init_and_report, tmp_path, {"1": {"GLOO_SOCKET_IFNAME": "nosuch0"}}) == [1, 2]
    (error,) = errors_of(tmp_path, 1)
    assert "gloo cannot connect to them" in error and "GLOO_SOCKET_IFNAME=nosuch0" in error and "lo 127.0.0.1" in error
    assert "rank 0" in errors_of(tmp_path, 0)[0] and "GLOO_SOCKET_IFNAME=unset" in errors_of(tmp_path, 0)[0]


@pytest.mark.parametrize(("name", "value"), [("MASTER_ADDR", None), ("MASTER_PORT", "http"), ("RANK", "7")])
def test_unset_and_invalid_environment_variables_are_reported(name, value, tmp_path):
    codes = fork_ranks(2, init_and_report, tmp_path, {rank: {name: value} for rank in "01"})
    assert codes == [2, 2]
    assert name in errors_of(tmp_path, 0)[0]


def wait_longer_than_the_limit():
    if dist.get_rank() == 1:
        time.sleep(LIMIT + 0.5)
    assert sum_over_ranks(1) == [2]
    # in this store, ranks that use NCCL exchange their addresses
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 0:
        time.sleep(LIMIT + 0.5)
        store.set("late", "but here")
    assert store.get("late") == b"but here"
    dist.all_reduce(torch.ones(1), group=dist.new_group())


def test_ranks_that_have_started_may_wait_longer_than_the_limit(tmp_path):
    assert fork_ranks(2, init_and_report, tmp_path, {}, wait_longer_than_the_limit) == [0, 0]


def sum_unequal_tensors():
    dist.all_reduce(torch.ones(1 + dist.get_rank()))


def test_accelerates_debug_flag_lets_torch_compare_collectives(tmp_path):
    changes = {rank: {"ACCELERATE_DEBUG_MODE": "true"} for rank in "01"}
    assert fork_ranks(2, init_and_report, tmp_path, changes, sum_unequal_tensors) == [1, 1]
    assert "Detected mismatch between collectives on ranks" in (tmp_path / "0").read_text()


def test_a_launchers_store_may_hold_keys_of_dead_processes_and_restart_counts_may_differ(tmp_path):
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    agents = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    changes = {rank: agents | {"TORCHELASTIC_RESTART_COUNT": "0"} for rank in "01"}
    assert fork_ranks(2, init_and_report, tmp_path, changes) == [0, 0]
    changes["0"]["TORCHELASTIC_RESTART_COUNT"] = "1"
    assert fork_ranks(2, init_and_report, tmp_path, changes) == [0, 0]
    assert fork_ranks(1, init_and_report, tmp_path, {"0": agents | {"WORLD_SIZE": "2"}}) == [1]
    assert fork_ranks(2, init_and_report, tmp_path, changes) == [0, 0]


def run_cli(folder, commands, command="train"):
    rank = int(os.environ["RANK"])
    with open(Path(folder, str(rank)), "w") as output:
        os.dup2(output.fileno(), 2)
    sys.exit(main(arguments=[command, *commands[rank]]))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("work"), num_rows=40)


def start(folder, work, **changes):
    """Start two ranks; return exit codes and errors. `common` changes flags of both, `changes` only those of rank 1."""
    common = settings(work, "out", max_steps=1, global_batch_size=4, output_dir=folder / "out") | changes.pop(
        "common", {}
    )
    commands = [
        [f"--{name}={value}" for name, value in fields.items() if value is not None]
        for fields in (common, common | changes)
    ]
    codes = fork_ranks(2, run_cli, folder, commands)
    return codes, [" ".join(errors_of(folder, rank)) for rank in range(2)]


def test_different_rows_on_a_rank_are_reported_on_all_ranks(work, tmp_path):
    rows = qa_rows(40)
    rows[17]["response"] += "!"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    codes, errors = start(tmp_path, work, train_file=tmp_path / "rows.jsonl")
    assert codes == [2, 2]
    for error in errors:
        difference = r"rank 1 on \S+ has training rows 40, fingerprint (\w+) \(rank 0: 40, fingerprint (\w+)\)"
        mine, theirs = re.search(difference, error).groups()
        assert mine != theirs
    assert not list((tmp_path / "out").glob(".seen-*"))


def test_all_different_flags_of_a_rank_are_reported_on_all_ranks(work, tmp_path):
    codes, errors = start(tmp_path, work, learning_rate=0.5, seed=7)
    assert codes == [2, 2]
    for error in errors:
        assert "--learning_rate 0.5 (rank 0: 0.01); --seed 7 (rank 0: 0). Rank 0 is on" in error
    assert not (tmp_path / "out").exists()


def test_different_paths_to_equal_rows_and_to_one_output_dir_are_accepted(work, tmp_path):
    shutil.copy(work / "rows.jsonl", tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    (tmp_path / "out").mkdir()
    codes, errors = start(tmp_path, work, train_file=tmp_path / "rows.jsonl", output_dir=tmp_path / "link")
    assert codes == [0, 0], errors


def test_different_weights_or_tokenizers_on_a_rank_are_reported_on_all_ranks(work, tmp_path):
    from lowmem.model.load import load_model

    torch.manual_seed(0)
    model, tokenizer = load_model(model_config=T5 | {"vocab_size": 400})
    for name in ("model", "other"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        with torch.no_grad():
            model.shared.weight[7, 3] += 1e-3
            tokenizer.add_tokens(["other"])
    folder = {"common": {"model_name_or_path": tmp_path / "model", "model_config": None}}
    codes, errors = start(tmp_path, work, **folder, model_name_or_path=tmp_path / "other")
    assert codes == [2, 2]
    for error in errors:
        assert re.search(r"has the model (\w+) \(rank 0: (?!\1)\w+\); the tokenizer (\w+) \(rank 0: (?!\2)\w+\)", error)


def test_evaluate_also_compares_the_rows_of_all_ranks(work, tmp_path):
    from lowmem.model.load import load_model

    for part in load_model(model_config=T5):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text((work / "rows.jsonl").read_text().partition("\n")[2])
    commands = [
        [f"--model_name_or_path={tmp_path}/model", f"--test_file={folder}/rows.jsonl"] for folder in (work, tmp_path)
    ]
    assert fork_ranks(2, run_cli, tmp_path, commands, "evaluate") == [2, 2]
    for rank in (0, 1):
        assert re.search(r"has test rows 39, .*\(rank 0: 40, ", errors_of(tmp_path, rank)[0])


def ranks_on_hosts(stack, commands):
    """Start one rank for each command, as if each were on its own host; return their results."""
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
def test_different_code_and_a_folder_that_is_not_shared_are_reported(work, tmp_path):
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
        results = ranks_on_hosts(
            stack, [[sys.executable, "train_low_mem.py", *words], ["unshare", "-m", "sh", "-c", mount, *words]]
        )
    for result in results:
        assert result.returncode == 2, result.stderr
        assert re.search(
            r"rank 1 on \S+ has lowmem's code (\w+) \(rank 0: (?!\1)\w+\); output_dir \S+, which is another folder",
            result.stderr,
        )
    assert not output.exists()


@pytest.fixture(scope="module")
def alone(work):
    command = flags(work, "alone", max_steps=3, global_batch_size=8)
    assert fork_ranks(1, run_cli, work, [command]) == [0]
    return losses(work, "alone")


TWO_HOSTS = {
    "torchrun": ("torch.distributed.run", "--nnodes=2", "--node_rank=HOST", "--nproc_per_node=1")
    + ("--master_addr=127.0.0.1", "--master_port=PORT"),
    "accelerate": ("accelerate.commands.launch", "--multi_gpu", "--num_machines=2", "--num_processes=2")
    + ("--machine_rank=HOST", "--main_process_ip=127.0.0.1", "--main_process_port=PORT", "--debug"),
}


def test_launchers_on_two_hosts_train_one_run(work, alone):
    for launcher in TWO_HOSTS:
        check_two_hosts(launcher, work, alone)


def check_two_hosts(launcher, work, alone):
    words, port = TWO_HOSTS[launcher], str(free_port())
    with ExitStack() as stack:
        hosts = []
        for host in ("0", "1"):
            command = module_command(*(word.replace("HOST", host).replace("PORT", port) for word in words))
            training = flags(work, launcher, max_steps=3, global_batch_size=8, batch_size=2)
            hosts.append(stack.enter_context(started(*command, "train_low_mem.py", "train", *training)))
        results = [finish(process, 90) for process in hosts]
    assert [result.returncode for result in results] == [0, 0], results
    assert "each of 8 rows: 2 processes x 2 micro-batches of at most 2" in results[0].stdout and results[1].stdout == ""
    assert losses(work, launcher) == pytest.approx(alone, rel=1e-6)

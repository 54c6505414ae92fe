"""Every launcher starts one process group of the requested size, and the losses are the same under all of them."""

import json
import sys

import pytest

from lowmem.distributed.launcher import launched_processes, launched_settings
from lowmem.distributed.setup import check_launch
from lowmem.errors import UsageError
from tests.models import LLAMA, T5, qa_rows
from tests.processes import ROOT, free_port, module_command, run, train

LAUNCHERS = {
    "python": [sys.executable],
    "torchrun": module_command("torch.distributed.run", "--nproc_per_node=2", "--master_port=PORT"),
    "accelerate --multi_gpu": module_command(
        "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=PORT"
    ),
}


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
SHARDS = {
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
}


@pytest.mark.parametrize(
    ("environment", "settings"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "no"}, {}),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"mixed_precision": "bf16"}),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {"compile": True}),
        (FSDP2 | {"FSDP_RESHARD_AFTER_FORWARD": "true"}, {"sharding_strategy": "FULL_SHARD"}),
        (FSDP2 | {"FSDP_RESHARD_AFTER_FORWARD": "false"}, {"sharding_strategy": "SHARD_GRAD_OP"}),
        (FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"}, {"sharding_strategy": "FULL_SHARD", "cpu_offload": True}),
        (
            FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true", "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "true"},
            {"sharding_strategy": "FULL_SHARD", "recompute": "full", "offload_activations": True},
        ),
        (FSDP2 | SHARDS, {"sharding_strategy": "HYBRID_SHARD", "shard_size": 2}),
        (FSDP2 | SHARDS | {"WORLD_SIZE": "4"}, {"sharding_strategy": "HYBRID_SHARD", "shard_size": 2}),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "4"}, {"tp_size": 4}),
    ],
)
def test_accelerate_settings_become_flags(environment, settings, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched_settings() == settings


DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (FSDP2 | {"FSDP_RESHARD_AFTER_FORWARD": "hybrid_shard"}, "set fsdp_reshard_after_forward: true or false"),
        (FSDP2 | {"FSDP_IGNORED_MODULES": "head"}, "set no fsdp_ignored_modules"),
        (FSDP2 | SHARDS | {"WORLD_SIZE": "8"}, "2 replicas x 2 shards x tp_size 1, but started 8 processes"),
        (SHARDS | {"WORLD_SIZE": "4"}, "2 shards in 2 replicas: also set distributed_type: FSDP"),
        (FSDP2 | SHARDS | {"FSDP_RESHARD_AFTER_FORWARD": "false"}, "set distributed_type: FSDP with"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM, which lowmem does not support"),
        ({"ACCELERATE_DYNAMO_BACKEND": "CUDAGRAPHS"}, "dynamo_backend=cudagraphs, but lowmem has only inductor"),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, "offload_param_device: nvme, but does not"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not a positive integer"),
    ],
)
def test_unsupported_launcher_settings_are_refused(environment, message, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError) as refused:
        launched_settings()
        launched_processes()
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("environment", "leftovers"),
    [
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK"),
        ({"LOCAL_RANK": "", "PMI_SIZE": "1", "PMI_RANK": "0"}, "LOCAL_RANK"),
        ({"RANK": "1"}, "RANK"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "PMI_RANK, PMI_SIZE"),
        ({"MV2_COMM_WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "no"}, "MV2_COMM_WORLD_SIZE"),
        ({"LOCAL_RANK": "-1", "RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "PMI_SIZE": "2"}, None),
    ],
)
def test_a_launchers_variables_without_world_size_are_refused_unless_harmless(environment, leftovers, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if leftovers is None:
        return check_launch(None)
    with pytest.raises(UsageError, match=f"are set without WORLD_SIZE: unset {leftovers}, or set each of RANK"):
        check_launch(None)


@pytest.mark.parametrize(
    ("environment", "field"),
    [
        (FSDP2, "sharding_strategy"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}, "tp_size"),
    ],
)
def test_evaluate_refuses_accelerate_settings_that_shard_the_model(environment, field):
    result = train("evaluate", "--model_name_or_path=m", "--test_file=rows.jsonl", **environment)
    assert result.returncode == 2 and f"to shard the model ({field})" in result.stderr, result.stderr


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in qa_rows(40)))
    (folder / "t5.json").write_text(json.dumps(T5 | {"dropout_rate": 0.0}))
    return [f"--train_file={folder}/rows.jsonl", f"--model_config={folder}/t5.json"]


def losses(output):
    records = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


@pytest.fixture(scope="module")
def alone(files, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone")
    flags = ["--max_steps=3", "--logging_steps=1", "--global_batch_size=8", "--learning_rate=1e-2"]
    result = train("train", *files, *flags, f"--output_dir={output}")
    assert result.returncode == 0, result.stderr
    return losses(output)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_train_like_one(launcher, files, alone, tmp_path):
    command = [word.replace("PORT", str(free_port())) for word in LAUNCHERS[launcher]]
    flags = ["--max_steps=3", "--logging_steps=1", "--global_batch_size=8", "--learning_rate=1e-2", "--batch_size=2"]
    flags += ["--num_processes=2"] if launcher == "python" else []
    result = run(*command, "train_low_mem.py", "train", *files, *flags, f"--output_dir={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("each of 8 rows: 2 processes x 2 micro-batches of at most 2") == 1
    assert ("starting 2 processes on this machine" in result.stdout) == (launcher == "python")
    assert launcher != "python" or result.stderr == ""
    assert losses(tmp_path) == pytest.approx(alone, rel=1e-6)


def test_two_processes_train_the_large_preset(tmp_path):
    """Train T5-base at its real size, with batches smaller and rows shorter than the preset's."""
    command = module_command(
        "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", f"--main_process_port={free_port()}"
    )
    flags = ["--use_large_config=True", "--max_steps=2", "--batch_size=1", "--gradient_accumulation_steps=1"]
    others = ["--max_seq_len=32", "--validation_rows=0", "--save_steps=0", "--save_model=False", "--logging_steps=1"]
    result = run(*command, "train_low_mem.py", "train", *flags, *others, f"--output_dir={tmp_path}", timeout=300)
    assert result.returncode == 0, result.stderr
    assert "222,903,552 weights (torch.bfloat16, memory=exact) on 2 x cpu" in result.stdout
    assert len(losses(tmp_path)) == 2


@pytest.mark.parametrize(
    ("environment", "flag", "message"),
    [
        ({"WORLD_SIZE": "3", "RANK": "0"}, "--num_processes=2", "the launcher started 3"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"},
            "--seed=0",
            "FSDP settings that lowmem does not support: set fsdp_version: 2",
        ),
        (FSDP2 | {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}, "--seed=0", "set fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP"),
        (
            FSDP2,
            "--sharding_strategy=NO_SHARD",
            "sharding_strategy=NO_SHARD was set, but accelerate has sharding_strategy=FULL_SHARD",
        ),
        (
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2"},
            "--seed=0",
            "cp_size or sp_size, which lowmem does not support",
        ),
        (SHARDS, "--seed=0", "2 shards in 2 replicas: also set distributed_type: FSDP"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "--seed=0", "accelerate has gradient_accumulation_steps=4"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "--mixed_precision=no", "accelerate has mixed_precision=bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "--seed=0", "--mixed_precision=fp8 must be one of no, bf16, fp16"),
        ({"LOCAL_RANK": "1"}, "--seed=0", "a launcher's variables are set without WORLD_SIZE: unset LOCAL_RANK, or"),
        ({"LOCAL_RANK": "1"}, "--sed=0", "unknown flag --sed"),
    ],
)
def test_an_environment_that_is_unsupported_or_contradicts_a_flag_is_reported(environment, flag, message, tmp_path):
    result = train("train", flag, f"--output_dir={tmp_path}/out", **environment)
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()


def test_accelerates_precision_is_used(files, tmp_path):
    flags = ["--max_steps=1", f"--output_dir={tmp_path}"]
    result = train("train", *files, *flags, ACCELERATE_MIXED_PRECISION="bf16")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "config.json").read_text())["mixed_precision"] == "bf16"


def test_a_failing_rank_ends_the_run_with_its_exit_code(files, tmp_path):
    """Without a launcher, `train` starts ranks and exits with their exit code: 2 for an error that only they detect."""
    flags = ["--num_processes=2", "--text_column=prompt", f"--output_dir={tmp_path}/out"]
    result = train("train", *files, *flags)
    assert result.returncode == 2, (result.returncode, result.stderr)
    assert "needs a causal model" in result.stderr


# For each config file, the value of --num_processes (None if the file sets it), and text that the log must contain.
CONFIGS = {
    "cpu": (None, "on 2 x cpu, 40 rows"),
    "single_gpu": (None, "on 1 x cpu, 40 rows"),
    "multi_gpu": (2, "on 2 x cpu, 40 rows"),
    "fsdp2": (2, "on 2 x cpu, FULL_SHARD, 40 rows"),
    "fsdp2_offload": (2, "on 2 x cpu, FULL_SHARD, 40 rows"),
    "hsdp": (None, "on 4 x cpu, HYBRID_SHARD, 40 rows"),
    "tensor_parallel": (None, "on 2 x cpu, tp_size=2, 40 rows"),
}
WHOLE, SHARDED = ("cpu", "single_gpu", "multi_gpu"), ("fsdp2", "fsdp2_offload", "hsdp")


@pytest.fixture(scope="module")
def causal(files, tmp_path_factory):
    """Return the flags of a Llama run, and its losses on one process."""
    folder = tmp_path_factory.mktemp("causal")
    (folder / "llama.json").write_text(json.dumps(LLAMA))
    flags = ["--max_steps=3", "--logging_steps=1", "--global_batch_size=8", "--learning_rate=1e-2", "--batch_size=2"]
    flags += [files[0], f"--model_config={folder}/llama.json"]
    result = train("train", *flags, f"--output_dir={folder}/out")
    assert result.returncode == 0, result.stderr
    return flags, losses(folder / "out")


@pytest.mark.parametrize(
    "names", [WHOLE, SHARDED, CONFIGS.keys() - {*WHOLE, *SHARDED}], ids=["whole", "sharded", "rest"]
)
def test_every_config_without_deepspeed_trains_like_one_process(names, causal, tmp_path):
    for name in names:
        check_config(name, *causal, tmp_path / name)


def check_config(name, flags, expected, folder):
    path = ROOT / "accelerate_configs" / f"{name}.yaml"
    assert path.read_text().startswith("# ")  # the first line says when to use the config
    processes, line = CONFIGS[name]
    command = module_command(
        "accelerate.commands.launch",
        f"--config_file={path}",
        "--mixed_precision=no",
        f"--main_process_port={free_port()}",
    )
    command += [f"--num_processes={processes}"] if processes else []
    result = run(*command, "train_low_mem.py", "train", *flags, f"--output_dir={folder}")
    assert result.returncode == 0, result.stderr
    assert line in result.stdout, result.stdout
    assert json.loads((folder / "config.json").read_text())["cpu_offload"] == (name == "fsdp2_offload")
    assert losses(folder) == pytest.approx(expected, rel=1e-6)


def test_some_of_a_launchers_variables_are_refused_also_with_a_world_size_of_one(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UsageError, match="WORLD_SIZE=1 and LOCAL_RANK are set without RANK, MASTER_ADDR, MASTER_PORT"):
        check_launch(None)

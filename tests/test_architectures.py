"""Every architecture of transformers' auto mappings is trained, or refused in one line before the first step."""

import json
from pathlib import Path

import pytest
from accelerate import Accelerator

from lowmem import init_distributed
from tests.architectures import NAMES, outcomes
from tests.forked import fork_ranks
from tests.processes import finish, started_function

FAMILIES = "bart bloom cohere falcon gemma2 gpt2 granite llama mamba marian mbart mistral mixtral mt5 m2m_100 olmo opt"
FAMILIES = f"{FAMILIES} pegasus phi qwen2 qwen3 t5".split()
SHARDED = "bart bloom cohere falcon gemma gemma2 gpt2 gpt_neox granite llama mamba marian mistral mixtral opt pegasus"
SHARDED = f"{SHARDED} phi qwen2 qwen3 t5 t5gemma".split()


def sweep(folder: Path, names: list[str]) -> None:
    with open(folder / "records.jsonl", "w") as file:
        for record in outcomes(names, folder, Accelerator(cpu=True)):
            file.write(json.dumps(record) + "\n")


@pytest.mark.parametrize("half", [0, 1])
def test_every_architecture_is_trained_or_refused_in_one_line(half, tmp_path):
    names = NAMES[half::2]
    with started_function(sweep, tmp_path, names) as process:
        result = finish(process, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [record["failed"] for record in records if "failed" in record] == []
    assert sorted({record["name"] for record in records}) == names
    trained = set(names) - {record["name"] for record in records if "refused" in record}  # in both tiers
    assert trained >= set(FAMILIES) & set(names)
    assert len(trained) >= 0.75 * len(names)
    for record in records:
        assert "refused" in record or record["losses"][-1] < record["losses"][0], record
        assert "\n" not in record.get("refused", ""), record
    print(*(f"{record['name']}: {record['refused']}" for record in records if "refused" in record), sep="\n")


def sweep_sharded(folder: Path) -> None:
    accelerator = init_distributed()
    folder = folder / str(accelerator.process_index)
    folder.mkdir()
    records = list(outcomes(SHARDED, folder, accelerator, saved=folder.parent, sharding_strategy="FULL_SHARD"))
    (folder / "records.json").write_text(json.dumps(records))
    accelerator.end_training()


def test_twenty_architectures_train_on_two_shards(tmp_path):
    assert fork_ranks(2, sweep_sharded, tmp_path, timeout=600) == [0, 0]
    for rank in range(2):
        for record in json.loads((tmp_path / str(rank) / "records.json").read_text()):
            assert record.get("losses") and record["losses"][-1] < record["losses"][0], record

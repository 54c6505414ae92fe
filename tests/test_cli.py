"""Test the command line as users see it: real processes, exit codes, one-line errors; a refusal makes no folder."""

import json
import os
import re
import subprocess
import sys
import time

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file
from transformers import ByT5Tokenizer

from lowmem.cli import main
from lowmem.config.train_config import FIELDS
from tests.forked import started_ranks
from tests.models import LLAMA, build, qa_rows
from tests.processes import PROGRAM, ROOT, environment, run, started, train

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
SHORT = ["--max_steps=2", "--eval_on_start=False", "--max_predict_samples=2", "--batch_size=4", "--logging_steps=1"]


def assert_refused(result, message, output_dir, seconds):
    assert result.returncode == 2, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], result.stderr
    assert result.stdout == ""
    assert not output_dir.exists()
    assert result.seconds < seconds


def timed(*flags):
    started = time.perf_counter()
    result = run(sys.executable, PROGRAM, *flags)
    result.seconds = time.perf_counter() - started
    return result


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--batchsize=3"], "unknown flag --batchsize: did you mean --batch_size?"),
        (["train", "--batch_size=0", "--max_seq_len=-3"], "--max_seq_len=-3 must be at least 1"),
        (["train", "--seed=a\nb"], r"--seed=a\nb is not an int"),
        (["train", "--seed=" + "9" * 5000], f"{'9' * 100} is not an int"),
        (["train", "stray"], "flags are --name=value"),
        (["train", "config"], "unexpected argument"),
        (["train", "-", "config"], "unexpected argument"),
        (["trian"], "unknown command: trian; commands are train, plan, evaluate, test"),
        (["evaluate", "--test_file=", "--model_name_or_path=x"], "needs --test_file"),
        (["evaluate", "--learning_rate=1"], "`evaluate` has no such flag"),
        (
            ["evaluate", "--model_name_or_path=x", "--test_file=y", "--max_length=9"],
            "--max_length: use --max_seq_len=9",
        ),
        (["evaluate", "--test_file=a.jsonl"], "needs --model_name_or_path"),
    ],
)
def test_wrong_flags_are_refused_in_seconds(arguments, message, tmp_path):
    output = tmp_path / "out"
    flags = [f"--output_dir={output}"] if arguments == ["train"] else []
    # the command takes about one second, or up to five on a busy test machine
    assert_refused(timed(*arguments, *flags), message, output, seconds=5)


def test_wrong_files_are_refused_in_seconds_and_nothing_is_written(tmp_path):
    output = tmp_path / "out"
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "other.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (tmp_path / "file").touch()
    for flags, message in [
        ([f"--train_file={tmp_path}/missing.parquet"], "missing.parquet does not exist"),
        ([f"--train_file={tmp_path}/*.parquet"], "matches no file"),
        ([f"--train_file={tmp_path}/empty.jsonl"], "empty.jsonl contains no rows"),
        (
            [f"--train_file={tmp_path}/other.jsonl"],
            "has no column 'prompt' and no column 'response', it has 'question', 'answer'",
        ),
        ([f"--test_file={tmp_path}/missing.jsonl"], "missing.jsonl does not exist"),
        (["--validation_rows=12000"], "cannot be held out"),
        ([f"--resume={tmp_path}/step-1"], "is not a checkpoint"),
    ]:
        assert_refused(timed("train", *flags, f"--output_dir={output}"), message, output, seconds=10)
    (tmp_path / "project" / "model").mkdir(parents=True)
    (tmp_path / "project" / "model" / "mine.py").touch()
    result = train("train", f"--output_dir={tmp_path}/project")
    assert result.returncode == 2 and "would be replaced at the end" in result.stderr
    result = timed("train", f"--output_dir={tmp_path}/file")
    assert "is a file: set a folder" in result.stderr and result.returncode == 2


def test_help_and_refusals_of_flags_and_files_import_no_torch(tmp_path):
    code = (
        "import sys, lowmem, lowmem.cli as cli\n"
        "lines = ('--help', 'train --x=1', 'train --train_file=/nowhere.parquet')\n"
        "codes = [cli.main(arguments=line.split()) for line in lines]\n"
        "assert codes == [0, 2, 2], codes\n"
        "loaded = {'torch', 'transformers', 'accelerate'} & sys.modules.keys()\n"
        "assert not loaded, loaded\n"
    )
    result = run(sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr


def test_help_explains_every_flag():
    result = train("--help")
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert [name for line in lines for name in re.findall(r"^  --(\w+)=\S+ +\w", line) if name in FIELDS] == [*FIELDS]
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("words", [["--help"], ["plan", "--model_config=llama.json", "--max_seq_len=16"]])
def test_a_command_exits_quietly_when_its_pipe_is_closed(words, tmp_path):
    """For example, `--help | head -1` closes the pipe early."""
    (tmp_path / "llama.json").write_text(json.dumps(LLAMA))
    with started(sys.executable, ROOT / "train_low_mem.py", *words, cwd=tmp_path) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=300) == 0


def test_a_command_that_fails_keeps_its_exit_code_when_its_pipe_is_closed():
    """For example, `2>&1 | true` closes the pipe of both stdout and stderr."""
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, ROOT / "train_low_mem.py", "train", "--x=1"]
    with subprocess.Popen(words, stdout=writing, stderr=writing, env=environment()) as process:
        os.close(writing)
        assert process.wait(timeout=300) == 2


def test_a_run_writes_the_documented_files_and_another_refuses_to_overwrite_them(tmp_path):
    output = tmp_path / "out"
    result = train("train", *SHORT, f"--output_dir={output}", "--report_to=tensorboard", "--run_name=qa")
    assert result.returncode == 0, result.stderr
    assert "no --train_file: training on the 11,760 bundled rows" in result.stdout
    names = "checkpoints config.json exit.json metrics.jsonl model predictions.jsonl qa"
    assert sorted(os.listdir(output)) == names.split()
    assert "# qa\n" in (output / "model" / "README.md").read_text()
    assert os.listdir(output / "checkpoints") == ["step-00000002"]
    assert not [path for path in output.rglob("*") if path.suffix in (".pkl", ".bin", ".pt")]
    assert any("tfevents" in path.name for path in (output / "qa").rglob("*"))
    assert re.search(r"step 1/2: .*, \d\d:\d\d left$", result.stdout, re.MULTILINE)

    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [record.get("step") for record in records] == [1, 2, 2, None]
    assert list(records[0]) == (
        "step epoch loss grad_norm learning_rate num_tokens samples_per_second tokens_per_second data_wait_seconds "
        "cut_rows cut_tokens bad_rows peak_device_bytes peak_active_bytes peak_reserved_bytes peak_host_bytes"
    ).split(" ")
    assert {"eval_loss", "eval_perplexity", "eval_exact_match"} < records[2].keys()
    assert records[3]["event"] == "end" and records[3]["steps"] == 2
    assert records[3]["best"] == {"step": 2, "eval_loss": records[2]["eval_loss"]}
    assert records[0]["peak_host_bytes"] > 10**8 and records[1]["epoch"] == 8 / 11_760
    assert json.loads((output / "config.json").read_text())["max_steps"] == 2

    again = train("train", *SHORT, f"--output_dir={output}")
    assert again.returncode == 2
    assert "already contains checkpoints (step-00000002): set another --output_dir, or --resume=auto" in again.stderr
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_evaluate_takes_columns_lengths_and_precision_from_the_model_folder(precision, tmp_path):
    rows = [{"question": row["prompt"], "answer": row["response"]} for row in qa_rows(40)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    columns = ["--prompt_column=question", "--response_column=answer", "--max_seq_len=24"]
    columns.append(f"--mixed_precision={precision}")
    output = f"--output_dir={tmp_path}/out"
    files = [f"--train_file={tmp_path}/rows.parquet", f"--test_file={tmp_path}/rows.parquet"]
    trained = train("train", *SHORT, *files, *columns, output)
    assert trained.returncode == 0, trained.stderr
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    (measured,) = [record for record in records if "test_loss" in record]
    for command in ("evaluate", "test"):
        flags = [f"--model_name_or_path={tmp_path}/out/model", f"--test_file={tmp_path}/rows.parquet"]
        result = train(command, *flags, "--max_predict_samples=2")
        assert result.returncode == 0, result.stderr
        printed = json.loads(result.stdout.splitlines()[-1])
        # `evaluate` uses another batch size than the run, so in bf16 its results differ slightly
        expected = {name: value for name, value in measured.items() if name != "step"}
        assert printed == pytest.approx(expected, rel=1e-6 if precision == "no" else 1e-4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is not an object: delete it, and set the flags instead"),
        ("{", "is not JSON"),
        ("[" * 10**5, "is not JSON"),
        ('{"max_seq_len": "x"}', "lowmem.json: --max_seq_len=x is not an int"),
        ('{"prompt_column": [1]}', "lowmem.json: --prompt_column must be a single value, not a list"),
    ],
)
def test_evaluate_names_a_damaged_file_of_training_settings(content, message, tmp_path, capsys):
    (tmp_path / "lowmem.json").write_text(content)
    assert main(arguments=["evaluate", f"--model_name_or_path={tmp_path}", "--test_file=rows.jsonl"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/lowmem.json" in line and message in line


def run_without_output(kind, *flags):
    """Train with stdout and stderr closed, without a reader, or on a full disk."""
    if kind == "closed":
        os.close(1)
        os.close(2)
        sys.stdout = sys.stderr = None  # as Python sets them if it starts with closed descriptors
    else:
        reading, writing = os.pipe() if kind == "no reader" else (None, os.open("/dev/full", os.O_WRONLY))
        if reading:
            os.close(reading)
        os.dup2(writing, 1)
        os.dup2(writing, 2)
    code = main(arguments=["train", *flags])
    sys.stdout.flush()  # as the interpreter does at exit
    assert kind == "full disk" or os.path.samestat(os.fstat(1), os.stat(os.devnull))
    sys.exit(code)


@pytest.mark.parametrize(
    ("kind", "world_size"), [("closed", 2), ("no reader", 1), pytest.param("full disk", 1, marks=ON_LINUX)]
)
def test_training_continues_if_neither_output_can_be_written(kind, world_size, tmp_path):
    flags = ["--max_steps=2", "--logging_steps=1", "--validation_rows=0", f"--output_dir={tmp_path}"]
    with started_ranks(world_size, run_without_output, kind, *flags) as ranks:
        assert {rank.wait(60) for rank in ranks} == {0}
    assert json.loads((tmp_path / "exit.json").read_text())["cause"] == "done"
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2]
    assert (tmp_path / "model" / "config.json").is_file()


def test_evaluate_reads_the_model_folder_below_the_home_folder(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "lowmem.json").write_text('{"prompt_column": "question", "response_column": "answer"}')
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    result = train("evaluate", "--model_name_or_path=~/m", "--test_file=~/rows.jsonl", HOME=str(tmp_path))
    assert result.returncode == 2 and "has no column 'question' and no column 'answer'" in result.stderr, result.stderr


def test_finetuning_trains_only_the_decoder(tmp_path):
    build("t5").save_pretrained(tmp_path / "t5")
    ByT5Tokenizer().save_pretrained(tmp_path / "t5")
    flags = ["--is_finetune=True", f"--model_name_or_path={tmp_path}/t5", "--max_steps=4", "--warmup_steps=0"]
    bf16 = ["--mixed_precision=bf16", "--recompute=full", "--max_predict_samples=0"]
    result = train("train", *flags, *bf16, f"--output_dir={tmp_path}/out")
    assert result.returncode == 0, result.stderr
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("t5", "out/model"))
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    changed = {name.split(".")[0] for name in after if not torch.equal(before[name].bfloat16(), after[name])}
    assert before.keys() == after.keys() and changed == {"decoder"}


def test_a_causal_model_learns_plain_text(tmp_path):
    (tmp_path / "rows.txt").write_text("".join(f"line {i} of a text\n" for i in range(60)))
    (tmp_path / "llama.json").write_text(json.dumps(LLAMA))
    files = [f"--train_file={tmp_path}/rows.txt", f"--model_config={tmp_path}/llama.json", "--text_column=text"]
    flags = ["--max_steps=30", "--learning_rate=1e-2", "--validation_rows=8", f"--output_dir={tmp_path}/out"]
    result = train("train", *files, *flags)
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[-1] < 0.7 * losses[0]
    assert "eval_loss" in records[-2] and "eval_exact_match" not in records[-2]
    refused = train("train", f"--train_file={tmp_path}/rows.txt", "--text_column=text", f"--output_dir={tmp_path}/no")
    assert refused.returncode == 2 and "needs a causal model" in refused.stderr


def test_a_model_that_the_loss_does_not_support_is_refused_before_the_run_starts(tmp_path):
    fields = {"model_type": "fsmt", "langs": ["en", "de"], "src_vocab_size": 384, "tgt_vocab_size": 384, "d_model": 16}
    fields |= {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    (tmp_path / "fsmt.json").write_text(json.dumps(fields))
    flags = [f"--model_config={tmp_path}/fsmt.json", "--max_steps=1", "--max_predict_samples=2"]
    output = tmp_path / "out"
    result = train("train", *flags, f"--output_dir={output}")
    assert result.returncode == 2 and "has Embedding: set --loss=plain" in result.stderr
    assert not output.exists()
    result = train("train", *flags, "--loss=plain", f"--output_dir={output}")
    assert result.returncode == 0, result.stderr
    (tmp_path / "rows.jsonl").write_text(json.dumps(qa_rows(1)[0]))
    # `evaluate` needs no --loss, because model/lowmem.json sets loss=plain
    flags = [f"--model_name_or_path={output}/model", f"--test_file={tmp_path}/rows.jsonl"]
    assert train("evaluate", *flags).returncode == 0


def test_a_bad_row_is_reported_with_its_location(tmp_path):
    rows = [json.dumps(row) for row in qa_rows(30)]
    rows[17] = '{"prompt": "a", "response": null}'
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    result = train("train", f"--train_file={tmp_path}/rows.jsonl", "--max_steps=9", f"--output_dir={tmp_path}/out")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert "rows.jsonl, line 18 (byte 1,106) cannot be encoded: column 'response' must hold text" in line


def test_a_run_says_that_one_process_shards_nothing_and_that_it_offloads_much(tmp_path):
    flags = [
        "train",
        "--max_steps=1",
        "--max_predict_samples=0",
        "--eval_on_start=False",
        f"--output_dir={tmp_path}/out",
    ]
    result = train(*flags, "--sharding_strategy=FULL_SHARD", "--offload_activations=True")
    assert result.returncode == 0 and "on one process, FULL_SHARD shards nothing" in result.stdout
    assert "without --recompute=full, offload_activations copies many times as much" in result.stdout

"""Research without rows or TrainConfig: another kind of model, batches of one's own without a stream, and a Report."""

import json
import math
import time
from functools import partial
from itertools import pairwise

import peft
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    ByT5Tokenizer,
    GPT2Config,
    LlamaForSequenceClassification,
)

from lowmem import (
    Batch,
    Report,
    TrainState,
    UsageError,
    add_lora,
    check_model,
    data_place,
    init_distributed,
    latest_checkpoint,
    load_checkpoint,
    load_model,
    make_optimizer,
    parallelize,
    save_checkpoint,
    save_model,
    train_step,
)
from lowmem.checkpoint.resume import checkpoint_to_resume
from lowmem.distributed.consistency import model_digest
from tests.forked import fork_ranks
from tests.models import LLAMA, build

THREE = {"auto_class": AutoModelForSequenceClassification, "config_changes": {"num_labels": 3}}


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    build("llama").save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return folder


def loss_fn(model, batch, *, reduction="sum"):
    """Return the cross-entropy of one class for each row."""
    logits = model(input_ids=batch.inputs["input_ids"]).logits
    return F.cross_entropy(logits.float(), batch.inputs["classes"], reduction=reduction)


def contrastive_loss(vectors):
    """Each row's positive is itself, its negatives are the others."""
    return F.cross_entropy(vectors @ vectors.T, torch.arange(len(vectors)), reduction="sum")


def batches_at(step, rank=0, world_size=1):
    """Make this rank's two micro-batches of a step of 12 rows, a function of the step."""
    tokens = torch.randint(3, 200, (12, 6), generator=torch.Generator().manual_seed(step))
    inputs = {"input_ids": tokens, "classes": tokens[:, 0] % 3}
    for piece in torch.arange(12).chunk(2 * world_size)[2 * rank : 2 * rank + 2]:
        yield Batch({name: x[piece] for name, x in inputs.items()}, num_targets=len(piece), row_ids=piece.tolist())


def classify(folder, out, steps, strategy="NO_SHARD"):
    """Train up to `steps` steps, from the newest checkpoint in `out`, on 12 rows of each step; save every 2 steps."""
    torch.set_num_threads(1)
    accelerator = init_distributed()
    torch.manual_seed(1)
    model, tokenizer = load_model(folder, on_meta=True, **THREE)
    model = parallelize(model, accelerator, sharding_strategy=strategy)
    rank = data_place(model)
    state = TrainState(model, make_optimizer(model, name="sgd", memory="off"))
    check_model(model, loss_fn, batch=next(batches_at(0)))
    if checkpoint := checkpoint_to_resume("auto", out, has_stream=False):
        load_checkpoint(state, checkpoint, accelerator)
    report = Report(out, {}, accelerator, step=state.step, total_steps=steps)
    for step in range(state.step, steps):
        result = train_step(state, list(batches_at(step, **rank.coordinates)), loss_fn, accelerator, learning_rate=0.1)
        report.count(result)
        report.training(result, learning_rate=0.1)
        report.record({"test_squared": step**2})
        if state.step % 2 == 0:
            save_checkpoint(state, out / "checkpoints", accelerator)
    save_model(model, out / "model", tokenizer=tokenizer)
    report.done()


def trained(folder, out, steps, world_size=1, **options):
    assert fork_ranks(world_size, partial_named(folder, out, steps, **options)) == [0] * world_size
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return load_file(out / "model" / "model.safetensors"), [x["loss"] for x in records if "loss" in x], records


def partial_named(*arguments, **options):
    function = partial(classify, *arguments, **options)
    function.__name__ = "classify"
    return function


def test_a_classifier_trains_on_batches_of_its_own_in_any_split_and_continues_exactly(language_model, tmp_path):
    whole, losses, records = trained(language_model, tmp_path / "whole", 4)
    assert [x["step"] for x in records if "loss" in x] == [1, 2, 3, 4]
    assert [x["test_squared"] for x in records if "test_squared" in x] == [0, 1, 4, 9]
    assert "epoch" not in records[0] and "samples_per_second" not in records[0] and records[0]["num_tokens"] == 12
    assert not (tmp_path / "whole" / "config.json").exists()
    for name, options in {"two": {"world_size": 2}, "three": {"world_size": 3, "strategy": "FULL_SHARD"}}.items():
        weights, other_losses, _ = trained(language_model, tmp_path / name, 4, **options)
        assert other_losses == pytest.approx(losses, abs=1e-5)
        torch.testing.assert_close(weights, whole, atol=1e-5, rtol=0)
    trained(language_model, tmp_path / "parts", 2)
    weights, all_losses, records = trained(language_model, tmp_path / "parts", 4)
    assert [x["test_squared"] for x in records if "test_squared" in x] == [0, 1, 4, 9]
    assert all_losses == losses and [x.get("event") for x in records].count("end") == 1
    assert all(torch.equal(weights[name], whole[name]) for name in whole)

    again, _ = load_model(tmp_path / "whole" / "model", auto_class=LlamaForSequenceClassification)
    assert type(again) is LlamaForSequenceClassification and again.config.num_labels == 3
    assert torch.equal(again.state_dict()["score.weight"], whole["score.weight"])
    latest = latest_checkpoint(tmp_path / "whole" / "checkpoints")
    assert checkpoint_to_resume(str(latest), tmp_path, has_stream=False) == latest
    with pytest.raises(UsageError, match="saved without a stream"):
        checkpoint_to_resume(str(latest), tmp_path)


def test_a_report_measures_the_time_since_the_last_record(tmp_path):
    state = TrainState(build("llama"), None)
    state.optimizer = make_optimizer(state.model, memory="off")
    batches = [Batch(batch.inputs, batch.num_targets, batch.row_ids) for batch in batches_at(0)]
    accelerator = Accelerator(cpu=True)

    def mean_loss(model, batch):
        return model(input_ids=batch.inputs["input_ids"], labels=batch.inputs["input_ids"]).loss

    result, ends = train_step(state, batches, mean_loss, accelerator, learning_rate=0.0), [time.perf_counter()]
    report = Report(tmp_path, {}, accelerator, total_steps=6)
    for _ in range(2):
        for _ in range(3):
            time.sleep(0.05)
            report.count(result)
        ends.append(time.perf_counter())
        report.training(result, learning_rate=0.0)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for record, (start, end) in zip(records, pairwise(ends), strict=True):
        assert 0.8 * 3 * 12 / (end - start) < record["tokens_per_second"] < 3 * 12 / 0.15


@pytest.mark.parametrize("on_meta", [False, True])
def test_a_new_head_is_drawn_and_the_rest_is_that_of_the_files(on_meta, language_model, capfd):
    torch.manual_seed(1)
    model, _ = load_model(language_model, on_meta=on_meta, **THREE)
    assert capfd.readouterr().out == f"{language_model} has no score.weight: drawn at random\n"
    assert model.model.norm.weight.is_meta == on_meta and not model.score.weight.is_meta
    other, _ = load_model(language_model, on_meta=on_meta, **THREE)
    assert model_digest(model, weights=True) != model_digest(other, weights=True)  # what ranks compare
    model = parallelize(model, Accelerator(cpu=True))
    expected = build("llama").state_dict()
    torch.manual_seed(1)
    head = torch.empty(3, 32).normal_(0, model.config.initializer_range)
    assert torch.equal(model.score.weight, head)
    assert all(torch.equal(x, expected[name]) for name, x in model.state_dict().items() if name != "score.weight")


def test_what_cannot_be_loaded_as_another_kind_of_model_is_refused(language_model, tmp_path):
    load = partial(load_model, **THREE)
    for name in ("num_label", "revision"):
        with pytest.raises(UsageError, match=f"config_changes sets {name}, but LlamaConfig has no such field"):
            load_model(language_model, config_changes={name: "main"})
    with pytest.raises(UsageError, match="quantization=nf4 was set with auto_class=AutoModelForSequenceClassification"):
        load(language_model, quantization="nf4")
    with pytest.raises(UsageError, match="change model_config itself"):
        load(model_config="t5-tiny")
    model = build("llama")
    weights = {name: x for name, x in model.state_dict().items() if "layers.1.mlp" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(UsageError, match="lacks 3 weights .*model.layers.1.mlp"):  # these are not of the head
        load(tmp_path, tokenizer_name_or_path=language_model)


def test_files_of_a_base_model_fill_it_under_a_head_and_may_lack_a_pooler(tmp_path, capfd):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    base = BertModel(BertConfig(vocab_size=20, **shape), add_pooling_layer=False)
    base.save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    capfd.readouterr()
    model, _ = load_model(tmp_path, on_meta=True, **THREE)
    new = "bert.pooler.dense.bias, bert.pooler.dense.weight, classifier.bias, classifier.weight"
    assert capfd.readouterr().out == f"{tmp_path} has no {new}: drawn at random\n"
    assert model.bert.embeddings.word_embeddings.weight.is_meta and not model.bert.pooler.dense.weight.is_meta
    model = parallelize(model, Accelerator(cpu=True))
    assert all(torch.equal(model.bert.get_parameter(name), weight) for name, weight in base.named_parameters())
    weights = {name: weight for name, weight in base.state_dict().items() if "attention" not in name}
    base.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(UsageError, match="lacks 10 weights .*encoder.layer.0.attention"):
        load_model(tmp_path, auto_class=AutoModel)


def test_a_model_from_a_config_with_its_own_vocabulary_keeps_its_special_tokens(tmp_path):
    config = GPT2Config(vocab_size=5000, n_embd=16, n_layer=1, n_head=2, bos_token_id=7, eos_token_id=8)
    config.save_pretrained(tmp_path)
    for source in (config, tmp_path / "config.json"):
        model, _ = load_model(model_config=source, auto_class=AutoModelForCausalLM)
        assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (7, 8, 0)
        assert model.generation_config.eos_token_id == 8
    with pytest.raises(UsageError, match="has a vocabulary of 5,000 tokens"):  # a language model reads text
        load_model(model_config=tmp_path / "config.json")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_of_a_classifier_train_and_save_its_new_head(language_model, tmp_path):
    accelerator, batches = Accelerator(cpu=True), list(batches_at(0))
    torch.manual_seed(1)
    model, _ = load_model(language_model, on_meta=True, **THREE)
    with pytest.raises(UsageError, match=r"files have no score.weight, .*: add \['score'\] to modules_to_save"):
        add_lora(model, rank=2)
    model = parallelize(add_lora(model, rank=2, modules_to_save=["score"]), accelerator)
    state = TrainState(model, make_optimizer(model, memory="off"))
    losses = [train_step(state, batches, loss_fn, accelerator, learning_rate=0.05).loss.item() for _ in range(3)]
    assert losses[2] < losses[0]
    save_model(model, tmp_path)
    again, _ = load_model(tmp_path, **THREE)
    base = LlamaForSequenceClassification.from_pretrained(language_model, num_labels=3)
    for loaded in (again, peft.PeftModel.from_pretrained(base, tmp_path)):
        torch.testing.assert_close(loss_fn(loaded.eval(), batches[0]), loss_fn(model.eval(), batches[0]))


def test_the_check_of_a_batch_refuses_a_mean_and_ignored_weights_but_no_pairs():
    model, _ = load_model(model_config=LLAMA | {"num_labels": 3}, auto_class=AutoModelForSequenceClassification)
    batch = next(batches_at(0))
    assert check_model(model, loss_fn, batch=batch) is None
    with pytest.raises(UsageError, match="must be a sum over the batch's targets"):
        check_model(model, partial(loss_fn, reduction="mean"), batch=batch)
    with pytest.raises(UsageError, match="depends on the others in its batch, as with in-batch negatives .it is"):
        check_model(model, lambda m, b: contrastive_loss(m(input_ids=b.inputs["input_ids"]).logits), batch=batch)
    with pytest.raises(UsageError, match="return a finite scalar"):
        check_model(model, partial(loss_fn, reduction="none"), batch=batch)
    with pytest.raises(UsageError, match="the loss of the batch is nan: return a finite scalar"):
        check_model(model, lambda m, b: loss_fn(m, b) * math.nan, batch=batch)
    weighted = Batch(batch.inputs, 6, batch.row_ids, weights=torch.ones(6), weight_sum=6.0)
    with pytest.raises(UsageError, match="ignores weights: .* multiply each target's loss by batch.weights"):
        check_model(model, loss_fn, batch=weighted)
    check_model(model, lambda m, b: (loss_fn(m, b, reduction="none") * b.weights).sum(), batch=weighted)
    scaled = Batch(batch.inputs | {"scale": torch.tensor(2.0)}, 6, batch.row_ids)  # of no row
    check_model(model, lambda m, b: b.inputs["scale"] * loss_fn(m, b), batch=scaled)
    for pairs in (lambda x: x.chunk(2), lambda x: (x[::2], x[1::2])):  # halves, neighbours

        def preference(model, batch, pairs=pairs):
            chosen, rejected = pairs(model(input_ids=batch.inputs["input_ids"]).logits[:, 0])
            assert len(batch.row_ids) == len(batch.inputs["input_ids"])
            return -F.logsigmoid(chosen - rejected).sum()

        check_model(model, preference, batch=batch)
    for options in ({}, {"batch": batch, "max_seq_len": 8}, {"batch": batch, "packing": True}):
        with pytest.raises(UsageError, match="or a batch without other options"):
            check_model(model, loss_fn, **options)


@pytest.mark.parametrize("strategy", ["NO_SHARD", "FULL_SHARD"])
def test_what_only_one_rank_does_wrong_is_refused_on_both(strategy):
    assert fork_ranks(2, refused_on_a_rank, strategy) == [0, 0]


def refused_on_a_rank(strategy):
    accelerator = init_distributed()
    rank = accelerator.process_index
    model = parallelize(build("llama"), accelerator, sharding_strategy=strategy)
    state = TrainState(model, make_optimizer(model, name="sgd", memory="off"))
    batches = [Batch(batch.inputs, 1, batch.row_ids) for batch in batches_at(0, rank, 2)]

    def square(model, batch):
        return model(input_ids=batch.inputs["input_ids"]).logits.square().mean() * (0.5 if rank else len(batch.row_ids))

    def take_step(batches):
        return train_step(state, batches, square, accelerator, learning_rate=0.1)

    if strategy == "FULL_SHARD":  # each forward and backward has collectives
        with pytest.raises(UsageError, match="but the ranks have 2, 1 micro-batches: make equally many"):
            take_step(batches[rank:])
        assert take_step(batches).updated
    else:
        assert take_step(batches[rank:]).updated
        with pytest.raises(UsageError, match="must be a sum over the batch's targets"):
            check_model(model, square, batch=batches[0])
    accelerator.end_training()

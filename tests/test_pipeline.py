"""A model that is split into stages trains, evaluates, answers and saves as it does on one process."""

import gc
import json
import os
import re
import signal
from contextlib import suppress
from dataclasses import dataclass, field, replace
from weakref import ref

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    ByT5Tokenizer,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
)

from lowmem.adapters.lora import add_lora
from lowmem.checkpoint.load import latest_checkpoint, load_checkpoint
from lowmem.checkpoint.manifest import verify_checkpoint
from lowmem.checkpoint.save import save_checkpoint, save_model
from lowmem.data.encode import encode_causal, encode_seq2seq
from lowmem.data.eval_batches import open_eval
from lowmem.data.stream import open_stream
from lowmem.distributed.collectives import gather_json
from lowmem.distributed.dtensor import local_of
from lowmem.distributed.offloaded import offload_weights
from lowmem.distributed.partition import users_of_weights
from lowmem.distributed.pipeline import stages_of
from lowmem.distributed.placement import data_place
from lowmem.distributed.setup import init_distributed
from lowmem.distributed.sharding import parallelize
from lowmem.distributed.trace import trace
from lowmem.errors import RankError, SaveError, UsageError
from lowmem.evaluation import evaluate, generate
from lowmem.loss import chunked_loss, plain_loss
from lowmem.memory.pipeline import pipeline_of
from lowmem.memory.savers import offload_activations, recompute
from lowmem.model.build import freeze, model_from
from lowmem.model.checks import check_loss, check_model
from lowmem.model.metrics import loss_and_metrics
from lowmem.optim.make import make_optimizer
from lowmem.optim.master import master_weights
from lowmem.step import TrainState, train_step
from tests.architectures import tiny_fields
from tests.forked import fork_ranks, started_ranks
from tests.models import build, qa_rows
from tests.test_files import fail_at
from tests.test_layered import batches_of, packed_batches, trained
from tests.test_loss import bert

STEPS, RATE = 2, 0.1


@dataclass(frozen=True)
class Run:
    """Two steps of a model, in stages or, with the layout {}, on one process."""

    layout: dict[str, object] = field(default_factory=lambda: {"pp_size": 2})
    family: str = "llama"
    changes: dict[str, object] = field(default_factory=dict)
    counts: tuple[int, ...] = (4,)
    """The number of micro-batches of each data-parallel rank."""
    memory: str = "off"
    precision: str = "no"
    savers: tuple = ()
    lora: bool = False
    packed: bool = False
    frozen: tuple[str, ...] = ()
    cut: int | None = None
    """The index of the first layer of the last stage."""
    same_as: str | None = None
    """The name of the run on two processes to compare with; None: one process."""
    tolerance: float = 1e-6
    """0.0: the same bits."""

    @property
    def has_dropout(self):
        return any("dropout" in name for name in self.changes)

    def model(self):
        sizes = {"num_layers": 3, "num_decoder_layers": 2} if self.family == "t5" else {"num_hidden_layers": 5}
        model = build(self.family, **sizes | self.changes)
        if self.lora:
            torch.manual_seed(1)
            add_lora(model, rank=4)
        freeze(model, parts=self.frozen)
        return model

    def batches(self, rank):
        """Return the micro-batches of a data-parallel rank."""
        if self.packed:
            return packed_batches(self.family == "t5")
        return batches_of(self.family == "t5", self.counts[rank], first=sum(self.counts[:rank]))

    def train(self, model, batches, accelerator):
        rate = RATE if self.memory == "off" else 1e-3
        options = {"memory": self.memory, "learning_rate": rate, "max_grad_norm": 1.0, "accelerator": accelerator}
        return trained(model, self.savers, batches, steps=STEPS, **options)


PP4, DATA, TENSOR = {"pp_size": 4}, (4, 4), {"pp_size": 2, "tp_size": 2}
DROPOUT = {"attention_dropout": 0.2}
UNTIED = {"tie_word_embeddings": False}
FULL = {"pp_size": 2, "sharding_strategy": "FULL_SHARD"}
ROUNDED = {"savers": (), "tolerance": 2e-2}

# by the number of processes
RUNS = {
    2: {
        "llama": Run(),
        "tied": Run(family="qwen2"),
        "in the encoder": Run(family="t5", changes={"num_layers": 4, "num_decoder_layers": 1}, cut=3),
        "between the stacks": Run(family="t5", changes={"num_layers": 3, "num_decoder_layers": 2}, cut=3),
        "in the decoder": Run(family="t5", changes={"num_layers": 1, "num_decoder_layers": 4, **UNTIED}, cut=3),
        "frozen encoder": Run(family="t5", changes={"num_layers": 4, "num_decoder_layers": 1}, frozen=("encoder",)),
        "lora": Run(lora=True),
        "packed": Run(packed=True),
        "exact": Run(memory="exact", **ROUNDED),
        "lean": Run(memory="lean", **ROUNDED),
        "bf16": Run(precision="bf16", **ROUNDED),
        "fp16": Run(precision="fp16", **ROUNDED),
        "dropout": Run(changes=DROPOUT),
        "recomputed": Run(changes=DROPOUT, savers=(recompute, offload_activations), same_as="dropout", tolerance=0.0),
        "t5 dropout": Run(family="t5", changes={"dropout_rate": 0.1}),
    },
    4: {
        "llama 4": Run(PP4),
        "t5 4": Run(PP4, family="t5"),
        "dropout 4": Run(PP4, changes=DROPOUT, same_as="dropout", tolerance=0.0),
        "t5 dropout 4": Run(PP4, family="t5", changes={"dropout_rate": 0.1}, same_as="t5 dropout"),
        "data": Run(counts=DATA),
        "t5 data": Run(family="t5", counts=DATA),
        "sharded": Run(FULL, counts=DATA, family="qwen2"),
        "t5 sharded": Run(FULL, counts=DATA, family="t5", changes={"num_layers": 4, "num_decoder_layers": 1}, cut=3),
        "sharded gradients": Run(FULL | {"sharding_strategy": "SHARD_GRAD_OP"}, counts=DATA),
        "sharded on the host": Run(FULL | {"cpu_offload": True}, counts=DATA),
        "tensor": Run(TENSOR, family="qwen2"),
    },
    8: {"three dimensions": Run(TENSOR, counts=DATA)},
}


def train_on_a_rank(folder, world_size):
    """Do all runs of `RUNS`, save their models, and write down what each rank has."""
    precision = "no"
    accelerator = init_distributed()
    for name, run in RUNS[world_size].items():
        if run.precision != precision:
            AcceleratorState._reset_state()
            accelerator, precision = Accelerator(cpu=True, mixed_precision=run.precision), run.precision
        model = parallelize(run.model(), accelerator, **run.layout)
        if "tp_size" in run.layout:  # whose linear layers run on placeholders here
            assert check_model(model, chunked_loss, max_seq_len=48) == 48
        rank, stages = data_place(model).rank, stages_of(model)
        sent_in_checks = stages.links.sent_bytes
        losses, norms, weights = run.train(model, run.batches(rank), accelerator)
        whole = {name: (x.full_tensor() if isinstance(x, DTensor) else x).detach() for name, x in weights.items()}
        save_file(whole, folder / f"{name} {accelerator.process_index}.safetensors")
        if run.lora:
            save_model(model, folder / "adapters")
        found = {"losses": [x.item() for x in losses], "norms": [x.item() for x in norms], "data_rank": rank}
        found |= {"stage": stages.index, "own": [*stages.own], "most_alive": pipeline_of(model).most_alive}
        found |= {"sent_bytes": stages.links.sent_bytes - sent_in_checks}
        found |= {"bytes": sum(local_of(x).nbytes for x in model.parameters())}
        (folder / f"{name} {accelerator.process_index}.json").write_text(json.dumps(found))
    accelerator.end_training()


def found_on(folder, world_size, name):
    """Return what each rank has written down, with its weights."""
    ranks = [(folder / f"{name} {rank}.json", folder / f"{name} {rank}.safetensors") for rank in range(world_size)]
    return [json.loads(text.read_text()) | {"weights": load_file(weights)} for text, weights in ranks]


def on_one_process(run):
    """Return the losses, the norms and the weights of a run without stages."""
    batches = [batch for rank in range(len(run.counts)) for batch in run.batches(rank)]
    AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(cpu=True, mixed_precision=run.precision)
        losses, norms, weights = run.train(run.model(), batches, accelerator)
    finally:
        AcceleratorState._reset_state()
    return {"losses": torch.stack(losses).tolist(), "norms": torch.stack(norms).tolist(), "weights": weights}


def assert_same_results(found, expected, tolerance):
    """Assert that a rank has the losses, the norms and, of its stage, the weights of another run."""
    for name in ("losses", "norms"):
        assert found[name] == pytest.approx(expected[name], rel=tolerance), name
    for name, weight in found["weights"].items():
        torch.testing.assert_close(
            weight, expected["weights"][name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_divided(run, ranks):
    """Assert that each layer is on one stage, and all weights on any; that shared copies are equal; and the costs."""
    num_stages, width = run.layout["pp_size"], run.layout.get("tp_size", 1)
    model = run.model()
    config, names = model.config, {name for name, _ in model.named_parameters()}
    assert set().union(*(rank["weights"].keys() for rank in ranks)) == names
    layers = [rank["own"] for rank in ranks if rank["data_rank"] == 0][::width]
    assert sum(layers, []) == list(range(5)) and len(layers) == num_stages
    assert run.cut in (None, layers[-1][0])
    first_rank_with = {}
    for rank in ranks:
        for name, weight in rank["weights"].items():
            assert torch.equal(first_rank_with.setdefault(name, weight), weight), name
        assert rank["most_alive"] == min(num_stages - rank["stage"], run.counts[rank["data_rank"]])
        assert rank["sent_bytes"] == STEPS * bytes_on_the_wire(run, rank, config, [own[0] for own in layers])


def bytes_on_the_wire(run, rank, config, starts):
    """Return the bytes that a rank sends in a step: an output to the next stage, a gradient to the one before."""
    sent = 0
    for batch in run.batches(rank["data_rank"]):
        inputs, hidden_bytes = batch.inputs, 4 * config.hidden_size
        for stage in (rank["stage"], rank["stage"] + 1):  # at the beginning and at the end of this rank's stage
            if not 0 < stage < len(starts):
                continue
            num_tokens = inputs["input_ids"].numel()
            if config.is_encoder_decoder and starts[stage] > config.num_layers:  # and the output of the encoder
                num_tokens += inputs["labels"].numel()
            sent += num_tokens * hidden_bytes
    return sent


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory):
    """Return the folder of the runs on two processes, with which others are compared."""
    folder = tmp_path_factory.mktemp("two")
    assert fork_ranks(2, train_on_a_rank, folder, 2) == [0, 0]
    return folder


@pytest.mark.parametrize("world_size", RUNS)
def test_stages_train_like_one_process(world_size, two_stages, tmp_path):
    folder = two_stages if world_size == 2 else tmp_path
    if world_size > 2:
        assert fork_ranks(world_size, train_on_a_rank, folder, world_size) == [0] * world_size
    for name, run in RUNS[world_size].items():
        ranks = found_on(folder, world_size, name)
        if run.precision == "no" and run.memory == "off":
            assert_divided(run, ranks)
        if run.same_as:  # with dropout, whose masks do not depend on the number of stages
            first, last = found_on(two_stages, 2, run.same_as)
            expected = first | {"weights": first["weights"] | last["weights"]}
        elif run.has_dropout:
            continue
        else:
            expected = on_one_process(run)
        for rank in ranks:
            assert_same_results(rank, expected, run.tolerance)
        if run.lora:
            names = load_file(folder / "adapters" / "adapter_model.safetensors").keys()
            assert len(names) == 5 * 7 * 2 and all(".lora_" in name for name in names)


# --- evaluation, answers, and what a program does with a step


def with_metrics(model, batch):
    return chunked_loss(model, batch), {"size": (len(batch.inputs["labels"]), 1)}


def twice(model, batch):
    return chunked_loss(model, batch) + chunked_loss(model, batch)


def fail_on_the_last_stage(model, batch):
    loss = chunked_loss(model, batch)
    if stages_of(model).is_last:
        raise KeyError("no such thing")
    return loss


def evaluate_and_answer():
    accelerator = init_distributed()
    for family in ("t5", "qwen2"):
        tokenizer, encode = ByT5Tokenizer(), (encode_seq2seq if family == "t5" else encode_causal)
        rows = open_eval(qa_rows(9), encode(ByT5Tokenizer(), max_seq_len=48), batch_size=4, rank=0, world_size=1)
        # large weights, because with small ones the next token would depend only on the embedding of the last token
        run = Run(family=family, changes={"initializer_factor": 20.0} if family == "t5" else {"initializer_range": 0.5})
        alone, model = run.model(), parallelize(run.model(), accelerator, pp_size=2)
        stages, batches = stages_of(model), run.batches(0)
        assert check_model(model, chunked_loss, max_seq_len=48) == 48
        found = evaluate(model, rows, with_metrics, accelerator)
        with torch.no_grad():
            losses = [plain_loss(alone.eval(), batch).item() for batch in rows]
        assert found["eval_loss"] == pytest.approx(sum(losses) / sum(batch.num_targets for batch in rows), rel=1e-6)
        assert (found["eval_rows"], found["eval_size"]) == (9, 3)
        answers = generate(model, tokenizer, rows, accelerator, max_new_tokens=8)
        assert [answer.row_id for answer in answers] == list(range(9))
        assert len({answer.prediction for answer in answers}) > 4
        for batch in rows:
            for row_id, prompt in zip(batch.row_ids, prompts_of(batch, family), strict=True):
                written = alone.generate(prompt[None], max_new_tokens=8, do_sample=False)[0]
                text = tokenizer.decode(written[0 if family == "t5" else len(prompt) :], skip_special_tokens=True)
                assert answers[row_id].prediction == text

        is_last, beyond = stages.is_last, replace(batches[0], inputs=dict(batches[0].inputs))
        beyond.inputs["input_ids"] = beyond.inputs["input_ids"] + 384
        for loss_fn, batch, kind, message in (
            (fail_on_the_last_stage, batches[0], KeyError if is_last else RankError, "no such thing"),
            (chunked_loss, beyond, IndexError, "index out of range"),  # which every stage notices
            (twice, batches[0], UsageError, "runs a model in stages once, but the loss runs .* again"),
        ):
            with pytest.raises(kind, match=message), torch.no_grad():
                loss_and_metrics(loss_fn, model, batch)
        assert evaluate(model, rows, with_metrics, accelerator)["eval_rows"] == 9  # no message is left behind
    with pytest.raises(UsageError, match=r"ranks would drop different layers \(layerdrop=0.1\): set it to 0.0"):
        parallelize(build("t5", layerdrop=0.1), accelerator, pp_size=2)
    with pytest.raises(UsageError, match="pp_size=2 needs a layer for each stage, but LlamaForCausalLM has 1 layers"):
        parallelize(build("llama", num_hidden_layers=1), accelerator, pp_size=2)
    with pytest.raises(UsageError, match="pp_size=2 x tp_size=2 was set, which does not divide 2 processes"):
        parallelize(build("llama"), accelerator, pp_size=2, tp_size=2)
    with pytest.raises(UsageError, match="pp_size=2 does not combine with HYBRID_SHARD or shard_size: use FULL_SHARD"):
        parallelize(build("llama"), accelerator, pp_size=2, sharding_strategy="FULL_SHARD", shard_size=2)
    with pytest.raises(UsageError, match="a pipeline keeps weights on their stage's device: set pp_size=1"):
        offload_weights(model, "host", accelerator.device)
    with pytest.raises(UsageError, match="weights to train on each stage, but all weights of stage 0 are frozen"):
        sizes = {"num_layers": 4, "num_decoder_layers": 1}
        frozen = Run(family="t5", changes=sizes, frozen=("encoder", "embeddings"))
        parallelize(frozen.model(), accelerator, **frozen.layout)
    torch.manual_seed(0)
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=384, n_positions=24, n_embd=32, n_layer=2, n_head=2))
    model = parallelize(gpt2, accelerator, pp_size=2)
    with pytest.raises(UsageError, match="fails on a row of max_seq_len=30 tokens .*to its number of positions, 24"):
        check_model(model, chunked_loss, max_seq_len=30)
    assert check_model(model, chunked_loss, max_seq_len=30, may_shorten=True) == 24
    state = TrainState(model, make_optimizer(model, memory="off"))
    with pytest.raises(UsageError, match=r"share a model .* have different ones: pass \*\*data_place\(model\)"):
        batches = batches_of(False, count=1, first=accelerator.process_index)
        train_step(state, batches, chunked_loss, accelerator, learning_rate=0.1)
    with pytest.raises(UsageError, match="BertLMHeadModel sees the tokens that it must predict"):
        check_loss(plain_loss, parallelize(bert(), accelerator, pp_size=2))
    check_loss(plain_loss, parallelize(bert(is_decoder=True), accelerator, pp_size=2))
    change_gradients(accelerator)
    accelerator.end_training()


def change_gradients(accelerator):
    """Take a step whose gradients, on each stage, are those of one process, and which `before_update` sets to zero."""
    run = Run(family="t5")
    alone, model, batches = run.model(), parallelize(run.model(), accelerator, pp_size=2), run.batches(0)
    num_targets = sum(batch.num_targets for batch in batches)
    for batch in batches:
        (plain_loss(alone, batch) / num_targets).backward()

    def compare(gradients):
        assert gradients.keys() == dict(model.named_parameters()).keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, alone.get_parameter(name).grad, rtol=1e-5, atol=1e-6)
            gradient.zero_()

    state = TrainState(model, make_optimizer(model, memory="off"))
    options = {"learning_rate": 1e-3, "before_update": compare}
    result = train_step(state, batches, with_metrics, accelerator, **options)
    assert result.metrics["size"] == sum(len(batch.inputs["labels"]) for batch in batches) / len(batches)
    assert result.grad_norm == 0 and result.num_tokens == num_targets
    freed = ref(model)
    model = parallelize(run.model(), accelerator, pp_size=2)
    for name, weight in master_weights(model, make_optimizer(model, memory="exact")):
        assert torch.equal(weight, alone.get_parameter(name))
    del state
    gc.collect()
    assert freed() is None  # nothing keeps a model that its program has dropped


def prompts_of(batch, family):
    """Return the prompts' tokens, without padding."""
    if family == "t5":
        ids = batch.inputs["input_ids"]
        masks = batch.inputs.get("attention_mask", torch.ones_like(ids))
        return [row[mask.bool()] for row, mask in zip(ids, masks, strict=True)]
    rows = zip(batch.inputs["input_ids"], batch.inputs["labels"], strict=True)
    return [ids[: int((labels != -100).nonzero()[0])] for ids, labels in rows]


def test_every_stage_evaluates_and_answers_and_reports_the_errors_of_others():
    assert fork_ranks(2, evaluate_and_answer) == [0, 0]


# --- checkpoints


def state_of(accelerator, layout, seed):
    model = parallelize(build("qwen2", seed=seed, num_hidden_layers=3), accelerator, **layout)
    encode = encode_causal(ByT5Tokenizer(), max_seq_len=48)
    place = data_place(model).coordinates
    stream = open_stream(qa_rows(40), encode, batch_size=2, global_batch_size=12, **place)
    return TrainState(model, make_optimizer(model, memory="off"), stream)


def train_steps(state, accelerator):
    """Take two steps; return losses, norms and row ids of all ranks."""
    results = []
    for _, batches in zip(range(2), state.stream, strict=False):
        result = train_step(state, batches, chunked_loss, accelerator, learning_rate=1e-2, max_grad_norm=1.0)
        mine = [row_id for batch in batches for row_id in batch.row_ids if data_place(state.model).is_counted]
        rows = sorted(sum(gather_json(mine), []))
        results.append([result.loss.item(), result.grad_norm.item(), rows])
    return results


def bits_of(state):
    return [local_of(x).clone() for x in state.model.parameters()]


def save_under(folder, layout, source, name):
    """Load the checkpoint `source`, if any, or train two steps; save it as `name`, and note the next two steps."""
    accelerator = init_distributed()
    state = state_of(accelerator, layout, seed=5 if source else 0)
    if source:
        load_checkpoint(state, folder / source / "step-00000002", accelerator)
    else:
        train_steps(state, accelerator)
    save_checkpoint(state, folder / name, accelerator, max_shard_size="40KB")
    results = train_steps(state, accelerator)
    if accelerator.is_main_process:
        (folder / f"{name}.json").write_text(json.dumps(results))
    if not source:  # a run that resumes in the same layout has the same bits
        again = state_of(accelerator, layout, seed=5)
        load_checkpoint(again, folder / name / "step-00000002", accelerator)
        assert train_steps(again, accelerator) == results
        assert all(map(torch.equal, bits_of(again), bits_of(state)))
        if accelerator.process_index == 1:  # the last stage, while it writes its part of the next save
            fail_at(3, "killed")
        with suppress(SaveError, RankError):
            save_checkpoint(state, folder / name, accelerator, keep=1)
        os._exit(0)
    accelerator.end_training()


def test_checkpoints_of_stages_fit_other_layouts_and_survive_a_kill(tmp_path):
    full = {"sharding_strategy": "FULL_SHARD"}
    assert fork_ranks(2, save_under, tmp_path, {"pp_size": 2}, None, "stages") == [0, -signal.SIGKILL]
    assert fork_ranks(3, save_under, tmp_path, full, "stages", "shards") == [0] * 3
    assert fork_ranks(4, save_under, tmp_path, FULL, "shards", "back") == [0] * 4
    verify_checkpoint(tmp_path / "stages" / "step-00000002")  # which the kill has left as it was
    assert latest_checkpoint(tmp_path / "stages").name == "step-00000002"
    alone = state_of(accelerator := Accelerator(cpu=True), {}, seed=0)
    train_steps(alone, accelerator)
    save_checkpoint(alone, tmp_path / "one", accelerator)
    tensors, *others = (all_tensors(tmp_path / name) for name in ("stages", "shards", "back"))
    expected = all_tensors(tmp_path / "one")
    for found in others:
        assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in found)
    assert expected.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    results = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("stages", "shards", "back")]
    loaded = state_of(accelerator, {}, seed=5)
    load_checkpoint(loaded, tmp_path / "stages" / "step-00000002", accelerator)
    for other in [*results[1:], train_steps(loaded, accelerator)]:
        for mine, theirs in zip(results[0], other, strict=True):
            assert mine[2] == theirs[2] and len(mine[2]) == 12
            assert mine[:2] == pytest.approx(theirs[:2], rel=1e-4)


def all_tensors(folder):
    return {
        name: x for file in (folder / "step-00000002").rglob("*.safetensors") for name, x in load_file(file).items()
    }


# --- which stages hold which weights


def stages_with(model, starts):
    """Return which stages hold each weight, by name."""
    users = users_of_weights(model, trace(model), starts)
    return {name: users[parameter] for name, parameter in model.named_parameters()}


def test_stages_of_a_decoder_hold_what_comes_between_encoder_and_decoder():
    sizes = {"num_attention_heads": 4, "intermediate_size": 32, "pad_token_id": 0}
    encoder = BertConfig(hidden_size=16, num_hidden_layers=2, **sizes)
    decoder = BertConfig(hidden_size=32, num_hidden_layers=3, is_decoder=True, add_cross_attention=True, **sizes)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder, decoder_start_token_id=0)
    found = stages_with(EncoderDecoderModel(config), [0, 1, 3, 4])
    assert found["enc_to_dec_proj.weight"] == (1, 2, 3)
    assert found["encoder.embeddings.word_embeddings.weight"] == (0,)
    assert found["decoder.bert.embeddings.word_embeddings.weight"] == (1, 3)  # the head is tied to them


def test_stages_of_a_stack_of_t5_hold_its_position_biases():
    layers = {"num_layers": 4, "num_decoder_layers": 2, "encoder_attention_type": "transient-global"}
    found = stages_with(build("t5", **layers, model_type="longt5"), [0, 1, 3, 5])
    first = "encoder.block.0.layer.0.TransientGlobalSelfAttention"
    assert found[f"{first}.relative_attention_bias.weight"] == (0, 1, 2)
    assert found[f"{first}.global_relative_attention_bias.weight"] == (0, 1, 2)
    assert found["decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] == (2, 3)
    assert found["encoder.final_layer_norm.weight"] == (2, 3)


# --- memory


def count_tensors():
    accelerator = init_distributed()
    model = parallelize(build("llama"), accelerator, pp_size=2)
    found = []

    def counted(model, batch):
        found.append(sum(isinstance(x, torch.Tensor) and x.shape[2:] == (32,) for x in gc.get_objects()))
        return chunked_loss(model, batch)

    state = TrainState(model, make_optimizer(model, memory="off"))
    train_step(state, batches_of(False)[:1] * 30, counted, accelerator, learning_rate=0.1)
    assert found[-1] == found[15], found
    accelerator.end_training()


def test_a_stage_frees_what_it_has_sent():
    assert fork_ranks(2, count_tensors) == [0, 0]


# --- what is refused, and failures


def shares_a_layer():
    model = build("llama", num_hidden_layers=3)
    model.model.layers[2] = model.model.layers[0]
    return model


def adds_its_embeddings():
    model, kept = build("llama"), []
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: kept.append(output))
    model.model.norm.register_forward_pre_hook(lambda module, args: (args[0] + kept.pop(),))
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (adds_its_embeddings, "LlamaForCausalLM uses the input of a layer after that layer, too: set pp_size=1"),
        (lambda: build("llama", output_attentions=True), "a stage computes what output_attentions returns for its own"),
        (shares_a_layer, "layers that a forward calls once, but LlamaForCausalLM calls some again"),
        (lambda: made("roformer"), "layers of RoFormerForCausalLM take sinusoidal_pos from other parts of the model"),
        (lambda: made("cpmant"), "CpmAntForCausalLM has no layers of that kind: remove pp_size"),
    ],
)
def test_models_that_cannot_be_split_are_refused_in_one_line(make, message):
    with pytest.raises(UsageError, match=message) as error:
        trace(make())
    assert "\n" not in str(error.value)


def made(name):
    fields = tiny_fields(name)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields | {"is_decoder": True})
    return model_from(config, torch.float32, on_meta=False)


def fail_in_a_step(how):
    """Take two steps, in the second of which a stage fails, or its process is killed or stopped."""
    accelerator = init_distributed(heartbeat_timeout=3.0)
    model = parallelize(build("llama", num_hidden_layers=3), accelerator, pp_size=accelerator.num_processes)
    state = TrainState(model, make_optimizer(model, memory="off"))

    def loss_fn(model, batch):
        if state.step == 1 and accelerator.process_index == 1:
            if how == "fails":
                raise KeyError("no such thing")
            if how in (signal.SIGKILL, signal.SIGSTOP):
                os.kill(os.getpid(), how)
        return (twice if how == "twice" else chunked_loss)(model, batch)

    batches = batches_of(False)
    if how == "vocabulary":  # which is on stage 0
        batches[2].inputs["input_ids"] += 384
    for _ in range(2):
        train_step(state, batches, loss_fn, accelerator, learning_rate=0.1)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (signal.SIGKILL, "step 2, computing gradients.*rank 1 has been silent for .* s"),
        (signal.SIGSTOP, "rank 1 has been silent for .* s.*at step 2, computing gradients"),
        ("fails", "rank 1 failed with KeyError: 'no such thing'"),
        ("vocabulary", "IndexError: index out of range"),
        ("twice", "rank 1 failed with UsageError: .*the loss runs LlamaForCausalLM more than once"),
    ],
)
def test_other_stages_name_the_one_that_fails_or_is_silent(how, message):
    victim, num_stages = int(how != "vocabulary"), 2 if isinstance(how, str) else 3
    with started_ranks(num_stages, fail_in_a_step, how) as ranks:
        ending = [rank for rank in range(num_stages) if how != signal.SIGSTOP or rank != victim]
        outputs = {rank: ranks[rank].communicate(timeout=60)[0] for rank in ending}
    for rank in set(ending) - {victim}:
        assert re.search(message, outputs[rank]), (rank, outputs[rank])
        assert ranks[rank].returncode == 1

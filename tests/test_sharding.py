"""Sharded training has the results of unsharded training. Also tested: loading, evaluation, refusals."""

import json

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, ByT5Tokenizer

from lowmem import load_model
from lowmem.checkpoint.load import load_checkpoint
from lowmem.checkpoint.save import save_checkpoint, save_model
from lowmem.data.encode import encode_causal, encode_seq2seq
from lowmem.data.eval_batches import open_eval
from lowmem.data.stream import open_stream
from lowmem.distributed.dtensor import local_of, local_part
from lowmem.distributed.setup import init_distributed
from lowmem.distributed.sharding import parallelize
from lowmem.errors import UsageError
from lowmem.evaluation import evaluate, generate
from lowmem.loss import chunked_loss
from lowmem.memory.savers import entered, offload_activations, recompute, recompute_cheap
from lowmem.optim.make import make_optimizer
from lowmem.step import TrainState, train_step
from tests.forked import fork_ranks
from tests.models import build, qa_rows

FAMILIES = ["t5", "llama", "qwen2"]  # tied embeddings: t5 (with an encoder), qwen2 (without); untied: llama
# strategies for 2 ranks; HYBRID_SHARD is missing because it needs 4
STRATEGIES = {
    "FULL_SHARD": {"sharding_strategy": "FULL_SHARD"},
    "SHARD_GRAD_OP": {"sharding_strategy": "SHARD_GRAD_OP"},
    "cpu_offload": {"sharding_strategy": "FULL_SHARD", "cpu_offload": True},
}


def encoder(family):
    return (encode_seq2seq if family == "t5" else encode_causal)(ByT5Tokenizer(), max_seq_len=64)


def train(
    accelerator,
    model,
    family,
    *,
    name="adamw",
    learning_rate=1e-2,
    memory="off",
    global_batch_size=16,
    batch_size=2,
    max_grad_norm=1.0,
    savers=(),
    steps=3,
):
    """Train; return the state, (loss, norm) of each step, and this rank's bytes of weights and optimizer state."""
    optimizer = make_optimizer(model, name=name, memory=memory)
    options = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    stream = open_stream(
        qa_rows(40), encoder(family), batch_size=batch_size, global_batch_size=global_batch_size, **options
    )
    state, curve = TrainState(model, optimizer, stream), []
    with entered(savers, model, optimizer):
        for _, batches in zip(range(steps), stream, strict=False):
            result = train_step(
                state, batches, chunked_loss, accelerator, learning_rate=learning_rate, max_grad_norm=max_grad_norm
            )
            curve.append((result.loss.item(), result.grad_norm.item()))
    stream.close()
    kept = [*model.parameters(), *(x for tensors in optimizer.state.values() for x in tensors.values())]
    return state, curve, sum(local_of(tensor).nbytes for tensor in kept)


def built(family, **changes):
    return build(family, seed=1, **({"d_ff": 50} if family == "t5" else {}) | changes)  # 4 ranks cannot split 50 evenly


# options for a step of SGD at learning rate 1: the weights change by the gradient
ONE_GRADIENT = {"name": "sgd", "learning_rate": 1.0, "max_grad_norm": None, "steps": 1}


def train_alone(family, folder):
    accelerator = init_distributed()
    _, curve, num_bytes = train(accelerator, built(family), family)
    state, *_ = train(accelerator, built(family), family, **ONE_GRADIENT)
    save_model(state.model, folder / "model")
    (folder / "alone.json").write_text(json.dumps([curve, num_bytes]))


def train_sharded(family, folder, strategies):
    accelerator = init_distributed()
    expected, bytes_alone = json.loads((folder / "alone.json").read_text())
    whole = dict(AutoModel(family).from_pretrained(folder / "model").named_parameters())
    for options in strategies.values():
        model = parallelize(built(family), accelerator, **options)
        _, curve, num_bytes = train(accelerator, model, family)
        for (loss, norm), (loss_alone, norm_alone) in zip(curve, expected, strict=True):
            assert loss == pytest.approx(loss_alone, rel=1e-6) and norm == pytest.approx(norm_alone, rel=1e-5)
        assert num_bytes < 0.52 * bytes_alone, options
        model = parallelize(built(family), accelerator, **options)
        state, *_ = train(accelerator, model, family, **ONE_GRADIENT)
        for name, parameter in state.model.named_parameters():
            torch.testing.assert_close(parameter.full_tensor(), whole[name], rtol=0, atol=1e-6, msg=name)
    accelerator.end_training()


def AutoModel(family):
    return AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_two_shards_have_the_losses_of_one_process_in_half_the_bytes_each(family, tmp_path):
    assert fork_ranks(1, train_alone, family, tmp_path) == [0]
    assert fork_ranks(2, train_sharded, family, tmp_path, STRATEGIES) == [0, 0]
    hybrid = {"HYBRID_SHARD": {"sharding_strategy": "HYBRID_SHARD", "shard_size": 2}}
    assert fork_ranks(4, train_sharded, family, tmp_path, hybrid) == [0] * 4


def train_in_exact(family):
    accelerator = init_distributed()
    runs = []
    for strategy in ("NO_SHARD", "FULL_SHARD"):
        # with one micro-batch, two ranks and no clipping, sums over ranks have two terms, whose order does not matter
        model = parallelize(built(family), accelerator, sharding_strategy=strategy)
        state, curve, num_bytes = train(
            accelerator, model, family, memory="exact", global_batch_size=4, max_grad_norm=None, steps=5
        )
        runs.append((state, [loss for loss, _ in curve], num_bytes))
    (whole, losses, num_bytes), (sharded, sharded_losses, sharded_bytes) = runs
    assert losses == sharded_losses and sharded_bytes < 0.52 * num_bytes
    for (name, mine), theirs in zip(sharded.model.named_parameters(), whole.model.parameters(), strict=True):
        tensors = {"weight": (mine.data, theirs.data)}
        of_optimizer = whole.optimizer.state[theirs]
        tensors |= {key: (x, of_optimizer[key]) for key, x in sharded.optimizer.state[mine].items() if key != "step"}
        assert tensors.keys() == {"weight", "weight_low", "exp_avg", "exp_avg_sq"}
        for x, y in tensors.values():
            local, first, _ = local_part(x)
            assert torch.equal(local, y[first : first + len(local)]), name
    accelerator.end_training()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_exact_has_the_same_bits_sharded_and_unsharded(family):
    """T5 is left out: fully_shard's hooks change the order in which its encoder's bf16 gradients are added."""
    assert fork_ranks(2, train_in_exact, family) == [0, 0]


def sum_on_four_ranks():
    accelerator = init_distributed()
    moments = []
    for strategy in ("NO_SHARD", "FULL_SHARD"):
        model = parallelize(built("llama"), accelerator, sharding_strategy=strategy)
        options = {"memory": "exact", "global_batch_size": 8, "max_grad_norm": None, "steps": 1}
        state, *_ = train(accelerator, model, "llama", **options)
        moments.append([state.optimizer.state[parameter]["exp_avg"] for parameter in model.parameters()])
    are_equal = []
    for whole, sharded in zip(*moments, strict=True):
        local, first, _ = local_part(sharded)
        are_equal.append((local == whole[first : first + len(local)]).flatten())
    # The order of four fp32 terms rarely changes their sum once it is rounded to bf16. If the terms were added in bf16,
    # a third of the elements would differ.
    assert torch.cat(are_equal).float().mean() > 0.99
    accelerator.end_training()


def test_gradients_in_bf16_are_summed_over_ranks_in_fp32():
    assert fork_ranks(4, sum_on_four_ranks) == [0] * 4


def train_and_save_lean(folder):
    accelerator = init_distributed()
    model = parallelize(built("llama", hidden_size=80), accelerator, sharding_strategy="FULL_SHARD")
    state, curve, _ = train(accelerator, model, "llama", memory="lean", steps=4)
    assert curve[-1][0] < curve[0][0]
    save_checkpoint(state, folder, accelerator)
    draws = state.optimizer._random(next(model.parameters()), 0)(slice(0, 8))
    everyone = [torch.empty_like(draws) for _ in range(accelerator.num_processes)]
    torch.distributed.all_gather(everyone, draws)
    assert not torch.equal(*everyone[:2])  # each rank draws different random bits for its rows of the weight
    accelerator.end_training()


def load_lean(folder, strategy):
    accelerator = init_distributed()
    model = parallelize(built("llama", hidden_size=80), accelerator, sharding_strategy=strategy)
    state = TrainState(model, make_optimizer(model, memory="lean"))
    load_checkpoint(state, folder / "step-00000004", accelerator)
    path = save_checkpoint(state, folder / strategy, accelerator)
    if accelerator.is_main_process:
        files = [file.relative_to(path) for file in path.rglob("model*.safetensors")]
        assert all((path / file).read_bytes() == (folder / "step-00000004" / file).read_bytes() for file in files)
    _, curve, _ = train(accelerator, model, "llama", memory="lean", steps=1)
    assert curve[0][0] < 5.9
    accelerator.end_training()


def test_a_sharded_lean_checkpoint_loads_on_other_numbers_of_ranks(tmp_path):
    assert fork_ranks(2, train_and_save_lean, tmp_path) == [0, 0]
    assert fork_ranks(1, load_lean, tmp_path, "NO_SHARD") == [0]
    assert fork_ranks(3, load_lean, tmp_path, "FULL_SHARD") == [0] * 3


def train_with_savers(family):
    accelerator = init_distributed()
    dropout = {"dropout_rate": 0.1} if family == "t5" else {"attention_dropout": 0.1}
    curves = []
    for savers in ((), (recompute,), (recompute_cheap,), (offload_activations,), (recompute, offload_activations)):
        model = parallelize(built(family, **dropout), accelerator, sharding_strategy="FULL_SHARD")
        state, curve, _ = train(accelerator, model, family, savers=savers)
        curves.append((curve, [parameter.to_local().detach().clone() for parameter in state.model.parameters()]))
    (expected, weights), *others = curves
    for curve, found in others:
        assert curve == expected and all(map(torch.equal, found, weights))
    accelerator.end_training()


@pytest.mark.parametrize("family", ["llama"])
def test_savers_keep_the_bits_of_a_sharded_run(family):
    assert fork_ranks(2, train_with_savers, family) == [0, 0]


def train_in_replicas():
    accelerator = init_distributed()
    model = parallelize(built("llama", hidden_size=128), accelerator, sharding_strategy="HYBRID_SHARD", shard_size=2)
    train(accelerator, model, "llama", memory="lean", steps=1)
    for name, parameter in model.named_parameters():
        copies = parameter.device_mesh.get_group(0)
        everyone = [torch.empty_like(parameter.to_local()) for _ in range(copies.size())]
        torch.distributed.all_gather(everyone, parameter.to_local().detach(), group=copies)
        assert torch.equal(*everyone), name
    accelerator.end_training()


def test_replicas_of_a_sharded_model_round_their_sums_identically():
    assert fork_ranks(4, train_in_replicas) == [0] * 4


def train_head_alone():
    accelerator = init_distributed()
    curves = []
    for strategy in ("NO_SHARD", "FULL_SHARD"):
        model = built("llama")
        model.base_model.requires_grad_(False)
        model = parallelize(model, accelerator, sharding_strategy=strategy)
        _, curve, _ = train(accelerator, model, "llama")
        curves.append([number for pair in curve for number in pair])
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    accelerator.end_training()


def test_a_head_over_frozen_layers_gets_the_gradient_of_all_micro_batches_and_ranks():
    assert fork_ranks(2, train_head_alone) == [0, 0]


def fill(family, folder):
    accelerator = init_distributed()
    expected = AutoModel(family).from_pretrained(folder, dtype=torch.float32)
    rank = accelerator.process_index
    config = {"model_config": folder / "config.json"}
    torch.manual_seed(0)
    fresh = load_model(**config)[0]
    torch.manual_seed(0)
    for model, source, strategy in (
        (load_model(folder, on_meta=True)[0], expected, "FULL_SHARD"),  # all ranks have meta weights, and read files
        (load_model(**config, on_meta=rank > 0)[0], fresh, "FULL_SHARD"),  # the other ranks receive rank 0's weights
        (load_model(**config)[0], None, "FULL_SHARD"),  # all ranks have weights; rank 0's are used
        # replicas get rank 0's weights, even if the other ranks have other files
        (load_model(folder / "other" if rank else folder, on_meta=True)[0], expected, "NO_SHARD"),
        (load_model(**config, on_meta=rank > 0)[0], None, "NO_SHARD"),
    ):
        model = parallelize(model, accelerator, sharding_strategy=strategy)
        tied = len({id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)})
        assert tied == len([*model.parameters()]) == len([*expected.parameters()])
        for (name, mine), theirs in zip(model.named_parameters(), (source or model).parameters(), strict=True):
            whole = mine.full_tensor() if strategy == "FULL_SHARD" else mine.detach()
            from_rank_0 = whole.detach().clone()
            torch.distributed.broadcast(from_rank_0, 0)
            assert torch.equal(whole, from_rank_0) and (source is None or torch.equal(whole, theirs)), name
        for mine, theirs in zip(model.buffers(), expected.buffers(), strict=True):
            assert torch.equal(mine, theirs)
    accelerator.end_training()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_on_meta_is_filled_from_files_or_rank_0(family, tmp_path):
    for seed, folder in ((4, tmp_path), (5, tmp_path / "other")):
        build(family, seed=seed, dropout_rate=0.1).save_pretrained(folder, max_shard_size="40KB")
        ByT5Tokenizer().save_pretrained(folder)
    assert fork_ranks(3, fill, family, tmp_path) == [0] * 3


def fill_buffers_and_untied_weights(folder):
    accelerator = init_distributed()
    for name in ("bart", "untied"):
        expected, _ = load_model(folder / name)
        model, _ = load_model(folder / name, on_meta=True)
        model = parallelize(model, accelerator, sharding_strategy="FULL_SHARD")
        mine, theirs = model.state_dict(), expected.state_dict()
        assert mine.keys() == theirs.keys()
        for key, tensor in mine.items():
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            assert torch.equal(whole, theirs[key]), key
    model = build("llama", seed=accelerator.process_index)
    model.register_buffer("one_of_rank", torch.tensor(accelerator.process_index + 5))
    model = parallelize(model if accelerator.is_main_process else model.to("meta"), accelerator, tp_size=2)
    assert model.one_of_rank == 5 and torch.equal(
        model.model.rotary_emb.inv_freq, build("llama").model.rotary_emb.inv_freq
    )
    accelerator.end_training()


def test_buffers_are_filled_and_weights_that_are_untied_in_the_files_stay_untied(tmp_path):
    model = AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model("bart", vocab_size=384, d_model=16, encoder_layers=1, decoder_layers=1)
    )
    model.final_logits_bias.normal_()
    model.save_pretrained(tmp_path / "bart")
    model = build("qwen2")
    model.save_pretrained(tmp_path / "untied")
    file = tmp_path / "untied" / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": torch.randn(384, 32)}, file, metadata={"format": "pt"})
    for folder in tmp_path.iterdir():
        ByT5Tokenizer().save_pretrained(folder)
    assert fork_ranks(2, fill_buffers_and_untied_weights, tmp_path) == [0, 0]


def answer(family, folder):
    accelerator = init_distributed()
    results = []
    for strategy in ("NO_SHARD", "FULL_SHARD", "SHARD_GRAD_OP"):
        model = parallelize(built(family), accelerator, sharding_strategy=strategy)
        rows = open_eval(  # rank 1's last batch is empty
            qa_rows(5), encoder(family), batch_size=2, rank=accelerator.process_index, world_size=2
        )
        # generating calls T5's encoder alone, which must work even before the first forward of the whole model
        generate(model, ByT5Tokenizer(), rows, accelerator, max_new_tokens=2)
        train(accelerator, model, family, steps=2)
        metrics = evaluate(model, rows, chunked_loss, accelerator)
        answers = generate(model, ByT5Tokenizer(), rows, accelerator, max_new_tokens=6)
        # after generating, the weights are sharded again
        assert all(strategy == "NO_SHARD" or hasattr(x, "full_tensor") for x in model.parameters())
        results.append((metrics["eval_loss"], answers))
    (loss, answers), *others = results
    assert len(answers) == 5
    assert all(found == pytest.approx(loss, rel=1e-6) and written == answers for found, written in others)
    accelerator.end_training()


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_sharded_model_evaluates_and_generates_like_an_unsharded_one(family, tmp_path):
    assert fork_ranks(2, answer, family, tmp_path) == [0, 0]


def refuse():
    accelerator = init_distributed()
    for options, message in (
        ({"sharding_strategy": "ZERO_3"}, "set one of NO_SHARD, SHARD_GRAD_OP"),
        ({"cpu_offload": True}, "cpu_offload needs a sharded model, got NO_SHARD"),
        ({"sharding_strategy": "HYBRID_SHARD", "shard_size": 2}, "got shard_size=2 for 3 processes"),
        ({"sharding_strategy": "HYBRID_SHARD"}, "got shard_size=3 for 3 processes"),
        ({"sharding_strategy": "FULL_SHARD", "shard_size": 2}, "shards one replica over all 3"),
    ):
        with pytest.raises(UsageError, match=message):
            parallelize(build("llama"), accelerator, **options)
    model = parallelize(build("llama"), accelerator, sharding_strategy="FULL_SHARD")
    with pytest.raises(ValueError, match="adafactor needs whole matrices"):
        make_optimizer(model, name="adafactor", memory="lean")
    rows = open_eval(qa_rows(3), encoder("llama"), batch_size=1, rank=accelerator.process_index, world_size=3)
    evaluate(model, rows, chunked_loss, accelerator)
    with pytest.raises(ValueError, match="has already run"):
        make_optimizer(model)
    accelerator.end_training()


def test_what_sharding_does_not_support_is_refused():
    assert fork_ranks(3, refuse) == [0] * 3


def test_cpu_offload_on_one_process_keeps_the_losses():
    assert fork_ranks(1, train_offloaded) == [0]


def train_offloaded():
    accelerator = init_distributed()
    model = parallelize(built("llama"), accelerator, sharding_strategy="FULL_SHARD", cpu_offload=True)
    _, curve, _ = train(accelerator, model, "llama", memory="exact", max_grad_norm=None)
    whole = parallelize(built("llama"), accelerator)
    _, expected, _ = train(accelerator, whole, "llama", memory="exact", max_grad_norm=None)
    assert [loss for loss, _ in curve] == [loss for loss, _ in expected]
    accelerator.end_training()


def test_random_layer_drop_is_refused_in_a_sharded_model():
    model = build("t5")
    model.config.encoder_layerdrop = 0.1
    with pytest.raises(UsageError, match="ranks would drop different layers .encoder_layerdrop=0.1.: set it to 0.0"):
        parallelize(model, Accelerator(cpu=True), sharding_strategy="FULL_SHARD")

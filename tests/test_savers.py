import pytest
import torch
from transformers import ByT5Tokenizer, PretrainedConfig, PreTrainedModel

from lowmem.data.encode import encode_causal, encode_seq2seq
from lowmem.data.stream import collate
from lowmem.memory.loss import chunked_loss
from lowmem.memory.savers import recompute
from tests.models import build, qa_rows

DROPOUT = {"t5": {"dropout_rate": 0.1}, "llama": {"attention_dropout": 0.1}}


def batch_of(family):
    encode = (encode_seq2seq if family == "t5" else encode_causal)(ByT5Tokenizer(), max_seq_len=64)
    return collate([encode(row) for row in qa_rows(8)])


def loss_and_gradients(model, batch):
    torch.manual_seed(11)
    model.zero_grad()
    loss = chunked_loss(model, batch)
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def saved_bytes(model, batch):
    """Bytes of distinct storages that autograd keeps for backward."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = chunked_loss(model, batch)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    total = sum(size for pointer, size in kept.items() if pointer not in weights)
    del loss
    return total


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_recompute_changes_no_bit_with_dropout_on(family):
    model, batch = build(family, **DROPOUT[family]), batch_of(family)
    loss, gradients = loss_and_gradients(model, batch)
    with recompute(model):
        recomputed_loss, recomputed_gradients = loss_and_gradients(model, batch)
    assert torch.equal(loss, recomputed_loss)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, recomputed_gradients[name]), name


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_recompute_keeps_less_than_half_of_the_activations(family):
    depth = {"num_layers": 6} if family == "t5" else {"num_hidden_layers": 6}
    model, batch = build(family, **depth), batch_of(family)
    without = saved_bytes(model, batch)
    with recompute(model):
        assert saved_bytes(model, batch) < 0.5 * without


def test_recompute_renames_nothing_and_is_gone_afterwards():
    model, batch = build("t5"), batch_of("t5")
    before = saved_bytes(model, batch)  # transformers hangs hooks of its own on a model's first forward
    keys, hooks = list(model.state_dict()), count_hooks(model)
    with recompute(model):
        assert list(model.state_dict()) == keys
        assert saved_bytes(model, batch) < before
    assert count_hooks(model) == hooks
    assert saved_bytes(model, batch) == before


def count_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def test_recompute_refuses_a_model_that_cannot():
    class Plain(PreTrainedModel):
        config_class = PretrainedConfig
        supports_gradient_checkpointing = False

    with pytest.raises(ValueError, match="Plain does not support it"), recompute(Plain(PretrainedConfig())):
        pass


def test_recompute_does_not_differentiate_frozen_embeddings():
    model, batch = build("t5"), batch_of("t5")
    model.shared.requires_grad_(False)
    model.encoder.requires_grad_(False)
    with recompute(model):
        hidden = model.encoder(input_ids=batch.inputs["input_ids"]).last_hidden_state
    assert not hidden.requires_grad

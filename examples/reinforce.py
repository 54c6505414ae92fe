"""Reinforcement learning on batches of one's own: sample answers, score them, and learn from the better ones.

No stream: each step's batch is a function of the step, the rank and the weights, so a run that is killed and started
again ends with the same weights. The loss is REINFORCE with a leave-one-out baseline (RLOO; Ahmadian et al., 2024,
arXiv 2402.14740): each answer's advantage is its reward minus the mean reward of the other answers to the same prompt.

The model must repeat the prompt's token, and nobody shows it how.

python examples/reinforce.py [--out=FOLDER]
torchrun --nproc_per_node=2 examples/reinforce.py     # each process samples answers to its own prompts
"""

import fire
import torch
from torch.nn import functional as F

import lowmem

VOCABULARY, FIRST_TOKEN, ANSWER_LENGTH = 19, 3, 3  # prompts and answers use the 16 tokens from FIRST_TOKEN on
PROMPTS_PER_STEP, ANSWERS_PER_PROMPT = 16, 8
SHAPE = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": VOCABULARY}


def reward_of(prompts, answers):
    """Return the fraction of each answer's tokens that are its prompt's token, (rows,)."""
    return (answers == prompts).float().mean(1)


def advantages_of(rewards):
    """Return each reward minus the mean of its prompt's other rewards; rows of one prompt follow each other."""
    rewards = rewards.view(-1, ANSWERS_PER_PROMPT)
    return ((rewards - rewards.mean(1, keepdim=True)) * ANSWERS_PER_PROMPT / (ANSWERS_PER_PROMPT - 1)).flatten()


@torch.no_grad()
def sample_batches(model, *, step, rank, world_size, micro_batches=2):
    """Sample answers to this rank's prompts of the step, and make micro-batches of them."""
    torch.manual_seed(step * world_size + rank)  # other prompts and answers in each step and on each rank
    device, num_prompts = next(model.parameters()).device, PROMPTS_PER_STEP // world_size
    prompts = torch.randint(FIRST_TOKEN, VOCABULARY, (num_prompts, 1)).repeat_interleave(ANSWERS_PER_PROMPT, 0)
    options = {"min_new_tokens": ANSWER_LENGTH, "max_new_tokens": ANSWER_LENGTH, "do_sample": True, "top_k": 0}
    model.eval()  # the policy without dropout
    tokens = model.generate(prompts.to(device), attention_mask=torch.ones_like(prompts).to(device), **options)
    model.train()
    rewards = reward_of(tokens[:, :1], tokens[:, 1:])
    inputs = {"input_ids": tokens, "rewards": rewards, "advantages": advantages_of(rewards)}
    pieces = zip(*(values.chunk(micro_batches) for values in inputs.values()), strict=True)
    # An answer is one target: the step divides the summed loss by the number of answers on all ranks.
    return [lowmem.Batch(dict(zip(inputs, piece, strict=True)), len(piece[0]), row_ids=[]) for piece in pieces]


def policy_gradient_loss(model, batch):
    """Return minus the sum over answers of advantage times log-probability, and the mean reward as a metric."""
    tokens = batch.inputs["input_ids"]
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    logps = -F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").sum(1)
    return -(batch.inputs["advantages"] * logps).sum(), {"reward": (batch.inputs["rewards"].sum(), batch.num_targets)}


def main(out: str = "out-reinforce", steps: int = 120, save_steps: int = 40) -> None:
    accelerator = lowmem.init_distributed()
    torch.manual_seed(0)
    model = lowmem.parallelize(lowmem.load_model(model_config=SHAPE)[0], accelerator)
    state = lowmem.TrainState(model, lowmem.make_optimizer(model))
    if checkpoint := lowmem.latest_checkpoint(out):
        lowmem.load_checkpoint(state, checkpoint, accelerator)
        accelerator.print(f"continue from step {state.step}")
    rewards = []
    for step in range(state.step, steps):
        batches = sample_batches(model, step=step, **lowmem.data_place(model).coordinates)
        result = lowmem.train_step(state, batches, policy_gradient_loss, accelerator, learning_rate=5e-3)
        rewards.append(result.metrics["reward"])  # of all ranks; stays on the device until the end
        if state.step % save_steps == 0:
            lowmem.save_checkpoint(state, out, accelerator, keep=2)
    if rewards:
        first, last = (torch.stack(part).mean().item() for part in (rewards[:5], rewards[-5:]))
        chance = 1 / (VOCABULARY - FIRST_TOKEN)
        accelerator.print(f"mean reward: guessing {chance:.3f}, first 5 steps {first:.3f}, last 5 steps {last:.3f}")
    accelerator.end_training()


if __name__ == "__main__":
    fire.Fire(main)

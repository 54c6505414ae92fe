"""The schedule of a pipeline: each stage alternates between the forward and the backward of micro-batches (1F1B).

Stage s of P keeps at most P - s micro-batches for backward, however many the step has. (Narayanan et al. 2021,
arXiv 2104.04473.) As in layered gradient accumulation, each micro-batch is a coroutine that pauses at each layer. For a
layer of another stage, there is a message, or nothing.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from greenlet import GreenletExit, getcurrent
from torch import Tensor, nn

from lowmem.distributed.pipeline import Stages, stages_of
from lowmem.distributed.seeds import seed_of
from lowmem.distributed.trace import replaced_forwards
from lowmem.errors import UsageError
from lowmem.memory.layered import Complete
from lowmem.memory.micro_batch import Autocast, Call, MicroBatch


def pipeline_of(model: nn.Module) -> "Pipeline | None":
    """Return the schedule of a model that is split into stages; None for another model."""
    stages = stages_of(model)
    if stages is not None and stages.schedule is None:
        stages.schedule = Pipeline(stages)
    return None if stages is None else stages.schedule


def one_forward_one_backward(stage: int, num_stages: int, micro_batches: int) -> Iterator[tuple[int, bool]]:
    """Yield (micro-batch, whether to run its forward or its backward) in the order in which a stage runs them."""
    ahead = min(num_stages - 1 - stage, micro_batches)
    for index in range(ahead):
        yield index, True
    for index in range(micro_batches):
        if index + ahead < micro_batches:
            yield index + ahead, True
        yield index, False


def idle_share(num_stages: int, micro_batches: int) -> float:
    """Return the part of a step in which a stage waits, if all stages take the same time."""
    return (num_stages - 1) / (micro_batches + num_stages - 1)


class Pipeline:
    """Runs the micro-batches of a step through this process's stage."""

    gradients = None
    """Complete gradients wait for their norm on the device."""

    def __init__(self, stages: Stages):
        self._stages, self.store = stages, stages.store
        uses = Counter(parameter for layer in stages.own_layers for parameter in layer.parameters())
        # the gradient of a weight that layers share is complete after the backward of the first of them
        self._parameters = {layer: [x for x in layer.parameters() if uses[x] == 1] for layer in stages.own_layers}
        self._alive: dict[int, _Passage] = {}
        self.most_alive = 0
        """The largest number of micro-batches that waited for their backward at a time."""

    def run(
        self, forwards: Sequence[Callable[[], Tensor]], autocast: Autocast, complete: Complete, complete_early: Complete
    ) -> list[Tensor]:
        """Run the micro-batches' forwards in `autocast`, and their backwards; return the losses, detached.

        Stages before the last return zeros. A forward seeds its random numbers; each layer draws from a generator
        seeded by that seed and its index, so that dropout does not depend on the number of stages. Calls `complete`
        with the parameters of each layer, after its last backward.
        """
        stages = self._stages
        losses = [torch.zeros((), device=stages.links.device) for _ in forwards]
        order = one_forward_one_backward(stages.index, stages.number, len(forwards))
        with self.store.step(), replaced_forwards(stages.layers, self._pausing):
            try:
                for index, is_forward in order:
                    if is_forward:
                        passage = self._alive[index] = _Passage(forwards[index], stages.links.device)
                        self.most_alive = max(self.most_alive, len(self._alive))
                        with autocast():
                            loss = self._forward(passage)
                        losses[index] = losses[index] if loss is None else loss
                    else:
                        last = complete if index == len(forwards) - 1 else None
                        self._backward(self._alive.pop(index), autocast, last)
            finally:
                for passage in self._alive.values():
                    passage.end()
                self._alive.clear()
            stages.links.wait()
        return losses

    def _forward(self, passage: "_Passage") -> Tensor | None:
        """Run a micro-batch through this stage. Returns the loss on the last stage, after its backward."""
        stages, micro_batch = self._stages, passage.micro_batch
        reached = micro_batch.switch()
        for index, layer in enumerate(stages.layers):
            if not isinstance(reached, Call) or reached.layer is not layer:
                raise self._other_order()
            hidden = reached.hidden
            if index in stages.own:
                self.store.fetch(layer, stages.layers[index + 1] if index + 1 in stages.own else None)
                passage.calls.append(reached)
                outputs = reached.forward()
                hidden = stages.output_of(index, outputs, hidden)
            else:
                if index in stages.received:
                    message = _Received(micro_batch, hidden, stages)
                    passage.calls.append(message)
                    hidden = message.forward()
                outputs = stages.shaped(index, hidden)
            if index in stages.sent:
                passage.calls.append(_Sent(micro_batch, hidden, stages))
            if index == stages.own[-1] and not stages.is_last:
                passage.end()  # frees what its frames hold
                return None
            reached = micro_batch.switch(outputs)
        if isinstance(reached, Call):
            raise self._other_order()
        return reached

    def _backward(self, passage: "_Passage", autocast: Autocast, complete: Complete | None) -> None:
        own = [call.layer for call in passage.calls if isinstance(call, Call)]
        while passage.calls:
            call = passage.calls.pop()
            if isinstance(call, Call):
                own.pop()
                self.store.fetch(call.layer, own[-1] if own else None)
            call.backward(autocast)
            if isinstance(call, Call) and complete:
                self.store.finish(call.layer)
                complete(self._parameters[call.layer])

    def _other_order(self) -> UsageError:
        found = f"the loss runs {self._stages.model_class} more than once, or not through all its layers"
        return UsageError(f"a pipeline runs a micro-batch once through all layers, but {found}: set pp_size=1")

    def _pausing(self, layer: nn.Module) -> Callable:
        """Return a forward for `layer` that pauses its micro-batch, and seeds the generators before and after."""
        forward = layer.forward

        def pausing_forward(*args, **kwargs):
            if not torch.is_grad_enabled():
                raise UsageError("the loss runs the model without gradients, which a pipeline cannot: set pp_size=1")
            _seed_next(self._stages.links.device)
            outputs = getcurrent().pause(layer, forward, args, kwargs)
            _seed_next(self._stages.links.device)
            return outputs

        return pausing_forward


def _seed_next(device: torch.device) -> None:
    """Seed the generators by the last seed, so that stages that skip a layer go on like the one that ran it."""
    seed = seed_of(torch.initial_seed())
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a millisecond without a GPU
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


class _Passage:
    """A micro-batch on its way through a stage."""

    def __init__(self, forward: Callable[[], Tensor], device: torch.device):
        self.micro_batch = MicroBatch(forward, device, keeps_graph=True)
        self.calls: list[Call | _Received | _Sent] = []
        """In the order of forward."""

    def end(self) -> None:
        if not self.micro_batch.dead:
            self.micro_batch.throw(GreenletExit)


class _Received:
    """An output of an earlier stage: a message in forward, whose gradient is one in backward."""

    def __init__(self, micro_batch: MicroBatch, like: Tensor, stages: Stages):
        self._links, self._shape, self._dtype = stages.links, like.shape, like.dtype
        self._output, self._value = micro_batch.new_leaf(stages.links.receive(like.shape, like.dtype))

    def forward(self) -> Tensor:
        """Return the output, which the caller must keep."""
        output, self._output = self._output, None
        return output

    def backward(self, autocast: Autocast) -> None:
        gradient, self._value.gradient = self._value.gradient, None
        if gradient is None:  # nothing that was computed from it reaches the loss
            gradient = torch.zeros(self._shape, dtype=self._dtype, device=self._links.device)
        self._links.send_back(gradient)


class _Sent:
    """An output that a later stage takes."""

    def __init__(self, micro_batch: MicroBatch, output: Tensor, stages: Stages):
        self._links, self._shape, self._dtype = stages.links, output.shape, output.dtype
        self._value = micro_batch.value_of(output) if output.requires_grad else None
        stages.links.send(output)

    def backward(self, autocast: Autocast) -> None:
        gradient = self._links.receive_back(self._shape, self._dtype)
        if self._value is not None:
            before = self._value.gradient
            self._value.gradient = gradient if before is None else before + gradient

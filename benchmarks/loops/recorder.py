"""What measures a training of transformers' Trainer, from outside."""

from systems import Run
from transformers import TrainerCallback


class Recorder(TrainerCallback):
    def __init__(self, run: Run):
        self._run = run

    def on_step_end(self, args, state, control, **kwargs):
        self._run.mark()

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self._run.losses.append(logs["loss"])

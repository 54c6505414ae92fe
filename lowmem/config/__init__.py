"""The settings of a run: TrainConfig, how it is made from flags, and the rules that it must meet."""

from lowmem.errors import UsageError as UsageError  # scripts for earlier versions import it from here

"""In the fork server that starts test processes, import the modules that they need; see tests/forkserver.py."""

# ruff: noqa: F401
import gc
import os

# libraries read these variables when imported below; GPUs are hidden because initialized CUDA does not survive a fork
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

import transformers.generation
import transformers.models.llama.modeling_llama
import transformers.models.t5.modeling_t5

import lowmem.cli
import lowmem.plan.command
import lowmem.train

# otherwise, garbage collection in a fork would write to the memory pages of these modules and so copy them
gc.freeze()

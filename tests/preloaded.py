"""What an interpreter loads before processes are forked from it: see tests/forkserver.py."""

# ruff: noqa: F401
import gc
import os

# libraries read these at import; and CUDA, once it is initialized, does not survive a fork
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

import transformers.generation
import transformers.models.llama.modeling_llama
import transformers.models.t5.modeling_t5

import lowmem.cli
import lowmem.plan.command
import lowmem.train

# or every full collection in a fork would go through them, and copy their pages
gc.freeze()

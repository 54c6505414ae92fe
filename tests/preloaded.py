"""Imports of the interpreter that test processes are forked from; see tests/forkserver.py."""

# ruff: noqa: F401
import gc
import os

# libraries read these at import; an initialized CUDA does not survive a fork
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

import transformers.generation
import transformers.models.llama.modeling_llama
import transformers.models.t5.modeling_t5

import lowmem.cli
import lowmem.plan.command
import lowmem.train

# so that garbage collection in a fork does not scan these modules and copy their pages
gc.freeze()

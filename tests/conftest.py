"""Every test runs at one thread: its models are tiny, and bits are promised at a fixed number of threads."""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # read at import, also by what `tests.forked` preloads

import torch

torch.set_num_threads(1)

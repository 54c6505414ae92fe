"""Every test runs at one thread: its models are tiny, and bits are promised at a fixed number of threads."""

import torch

torch.set_num_threads(1)

"""One torch thread a test process, a hypothesis profile that CI can repeat, kernels interpreted."""

import os

import torch
from hypothesis import settings

# Triton reads this when a kernel is defined; without a GPU its kernels run on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)
collect_ignore_glob = ["compiled/*"]  # imports kernels that are not interpreted

settings.register_profile("default", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("default")

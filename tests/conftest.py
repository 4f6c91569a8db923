"""One torch thread a test process, a hypothesis profile that CI can repeat, kernels interpreted."""

import os

import pytest
import torch
from hypothesis import settings

from sslkit.ops import attention_cpu, c_kernels

# Triton reads this when a kernel is defined; without a GPU its kernels run on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)
collect_ignore_glob = ["compiled/*"]  # imports kernels that are not interpreted

settings.register_profile("default", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("default")


@pytest.fixture
def pytorchs_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations are PyTorch's, as in timm, with the same rounding."""
    monkeypatch.setattr(c_kernels, "problem", lambda: "this test wants PyTorch's")
    monkeypatch.setattr(attention_cpu, "LONGEST", {})

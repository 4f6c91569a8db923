"""Adapters of other libraries: `sslkit conform benchmarks.conformance.lightly`."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn


class OneLevel(nn.Module):
    """A head of one level, whose logits are a tuple of one."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Logits of the one level."""
        return (self.head(x),)


@contextmanager
def seeded(generator: torch.Generator) -> Iterator[None]:
    """All global generators draw from a seed that the generator draws, and are put back."""
    seed = int(torch.randint(2**31, (), generator=generator))
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 (what libraries draw from)
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002

"""The state of all global random generators, in a form that a checkpoint can hold."""

import random
import warnings
from typing import Any

import numpy as np
import torch


def get_random_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and PyTorch's global generators.

    Returns:
        ``python``: ``random.getstate()`` as a list; ``numpy``: the legacy global generator,
        ``np.random.get_state()``; ``torch``: the CPU generator; ``cuda``: the generator of this
        process's current GPU (one process drives one GPU), None on a machine without. Only tensors,
        lists, str, int, float and None: ``torch.load(weights_only=True)`` reads it.

    >>> state = get_random_state()
    >>> first = torch.rand(1), random.random()
    >>> set_random_state(state)
    >>> first == (torch.rand(1), random.random())
    True
    """
    version, numbers, gauss = random.getstate()
    kind, keys, *position = np.random.get_state()  # noqa: NPY002 - it is the global state we keep
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *position],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put all generators back to where :func:`get_random_state` found them.

    A state from a machine with a GPU on one without, or the reverse, sets the CPU generators and
    warns: random numbers on the GPU then differ from those of an uninterrupted run.

    Raises:
        ValueError: ``state`` does not have exactly the four entries.
    """
    expected = {"python", "numpy", "torch", "cuda"}
    if set(state) != expected:
        raise ValueError(
            f"a random state has the entries {sorted(expected)}, got {sorted(state)}; it must come "
            "from get_random_state"
        )
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *position = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *position))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if (state["cuda"] is not None) != torch.cuda.is_available():
        warnings.warn(
            "the random state was saved on a machine "
            f"{'without' if state['cuda'] is None else 'with'} a GPU and this one is different: "
            "random numbers drawn on the GPU will not continue where they were",
            stacklevel=2,
        )
    elif state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"].cpu())

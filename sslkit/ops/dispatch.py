"""Which body of an operation runs.

Every operation in :mod:`sslkit.ops` takes ``impl="auto" | "torch" | "triton"``. This release has
PyTorch bodies only, so ``"auto"`` is ``"torch"`` and ``"triton"`` is refused, never replaced.
"""

from typing import Literal, get_args

Impl = Literal["auto", "torch", "triton"]


def resolve(impl: str, op: str) -> Literal["torch"]:
    """Name the body that runs for ``impl``; ``op`` is the operation's name, for the errors.

    >>> resolve("auto", "column_mass")
    'torch'

    Raises:
        ValueError: ``impl`` is not one of the three choices.
        RuntimeError: ``impl="triton"``, which no operation of this release can run.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"{op}: impl must be one of {get_args(Impl)}, got {impl!r}")
    if impl == "triton":
        raise RuntimeError(
            f"{op}: impl='triton' cannot run: this release of sslkit has no Triton body for any "
            "operation; use impl='auto' or impl='torch'"
        )
    return "torch"

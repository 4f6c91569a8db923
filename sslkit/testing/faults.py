"""Faults that were found in the field, each with its thread."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A fault and the thread that tells of it.

    Args:
        what: the fault in a few words.
        thread: the issue or pull request, as ``owner/name#number``.
    """

    what: str
    thread: str

    @property
    def url(self) -> str:
        """Address of the thread."""
        name, _, number = self.thread.partition("#")
        return f"https://github.com/{name}/issues/{number}"

    def __str__(self) -> str:
        return f"{self.what} ({self.thread})"


SINKHORN_OVERFLOW = Fault(
    "exp(logits / temperature) overflows, and the targets are NaN", "facebookresearch/dinov2#583"
)
ROW_SHIFT = Fault(
    "the repair subtracts each row's maximum, which few iterations do not balance away",
    "facebookresearch/dinov2#583",
)
GRADIENT_OVER_RANKS = tuple(
    Fault("the gradient is divided by the number of processes", thread)
    for thread in ("lightly-ai/lightly#1920", "lightly-ai/lightly#1977")
)
DROPPED_COLLECTIVE = Fault(
    "what the other processes sent is dropped, or not counted",
    "galilai-group/stable-pretraining#409",
)
MISSING_VIEWS = Fault("the loss leaves views out", "lightly-ai/lightly#2023")
IBOT_NORMALISER = Fault(
    "masked patches are averaged over patches that are not masked", "lightly-ai/lightly#1937"
)
SINGLE_VIEW = Fault("one view gives a loss of NaN", "lightly-ai/lightly#1938")
NO_SLICE = Fault("the head projects what the paper slices", "valeoai/Franca#4")
LOST_COUNTER = Fault(
    "the counter of updates is not in the state_dict", "lightly-ai/lightly-train#892"
)

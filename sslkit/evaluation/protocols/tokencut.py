"""Object discovery with a model, by `sslkit.evaluation.tokencut`."""

from dataclasses import dataclass

from torch import Tensor

from sslkit.evaluation.protocols.discovery import discovery_outcome
from sslkit.evaluation.scores import Outcome
from sslkit.evaluation.subject import Subject
from sslkit.evaluation.tokencut import tokencut_box


@dataclass(frozen=True)
class Options:
    """Object discovery with TokenCut: CorLoc of one box an image, from the keys of a block."""

    threshold: float = 0.2
    """Patches of a higher cosine similarity are joined; tau of the paper."""
    eps: float = 1e-5
    """The weight of all other edges."""
    block: int = -1
    """Which block's keys; -1: the last."""
    num_shown: int = 12
    """Images in the figure; 0: no figure."""


def evaluate(subject: Subject, options: Options) -> Outcome:
    """CorLoc on the test images, each in its own size."""

    def find(keys: Tensor, image_size: tuple[int, int]) -> Tensor:
        return tokencut_box(
            keys,
            patch_size=subject.patch_size,
            image_size=image_size,
            threshold=options.threshold,
            eps=options.eps,
        )

    return discovery_outcome(subject, find, block=options.block, num_shown=options.num_shown)

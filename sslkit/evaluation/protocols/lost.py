"""Object discovery with a model, by `sslkit.evaluation.lost`."""

from dataclasses import dataclass

from torch import Tensor

from sslkit.evaluation.lost import lost_box
from sslkit.evaluation.protocols.discovery import discovery_outcome
from sslkit.evaluation.scores import Outcome
from sslkit.evaluation.subject import Subject


@dataclass(frozen=True)
class Options:
    """Object discovery with LOST: CorLoc of one box an image, from the keys of a block."""

    num_candidates: int = 100
    """Patches of lowest degree that the seed may grow by; k of the paper."""
    block: int = -1
    """Which block's keys; -1: the last."""
    num_shown: int = 12
    """Images in the figure; 0: no figure."""


def evaluate(subject: Subject, options: Options) -> Outcome:
    """CorLoc on the test images, each in its own size."""

    def find(keys: Tensor, image_size: tuple[int, int]) -> Tensor:
        return lost_box(
            keys,
            patch_size=subject.patch_size,
            image_size=image_size,
            num_candidates=options.num_candidates,
        )

    return discovery_outcome(subject, find, block=options.block, num_shown=options.num_shown)

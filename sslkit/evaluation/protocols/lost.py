"""Object discovery with a model, by `sslkit.evaluation.lost`."""

from torch import Tensor

from sslkit.evaluation.lost import lost_box
from sslkit.evaluation.options import LOST as Options
from sslkit.evaluation.protocols.discovery import discovery_outcome
from sslkit.evaluation.scores import Outcome
from sslkit.evaluation.subject import Subject


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

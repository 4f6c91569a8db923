"""Object discovery with a model, by `sslkit.evaluation.tokencut`."""

from torch import Tensor

from sslkit.evaluation.options import TokenCut as Options
from sslkit.evaluation.protocols.discovery import discovery_outcome
from sslkit.evaluation.scores import Outcome
from sslkit.evaluation.subject import Subject
from sslkit.evaluation.tokencut import tokencut_box


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

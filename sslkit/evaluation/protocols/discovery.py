"""What the commands of LOST and TokenCut share: a box an image, CorLoc, and a picture."""

from collections.abc import Callable

import torch
from torch import Tensor

from sslkit.evaluation import figures as draw
from sslkit.evaluation.boxes import localised
from sslkit.evaluation.features import evenly_spaced
from sslkit.evaluation.scores import Outcome, Score
from sslkit.evaluation.subject import Subject
from sslkit.evaluation.tokens import Unsuitable


def discovery_outcome(
    subject: Subject,
    find: Callable[[Tensor, tuple[int, int]], Tensor],
    *,
    block: int,
    num_shown: int,
) -> Outcome:
    """CorLoc of the boxes that ``find`` draws on the test images.

    Images without a true box are left out; ``details`` say how many.

    Args:
        subject: its test data have boxes.
        find: (keys [H, W, D] of a block, (height, width) of the image) -> box [4].
        block: which block's keys.
        num_shown: images in the picture, evenly spaced.

    Raises:
        Unsuitable: the test data have no boxes.
    """
    boxed = subject.annotated("test", "boxes")
    features = subject.features("test", "keys", view="padded", block=block)
    kept, predicted, truth = [], [], []
    for index, keys in zip(features.indices.tolist(), features.spatial("keys"), strict=True):
        boxes = boxed.boxes(index)
        if len(boxes):
            height, width = boxed[index][0].shape[1:]
            kept.append(index)
            truth.append(boxes)
            predicted.append(find(keys, (height, width)))
    if not kept:
        raise Unsuitable("no test image has a box: there is nothing to find")
    hits = localised(torch.stack(predicted), truth)
    figures = {}
    if num_shown:
        shown = evenly_spaced(len(kept), num_shown)
        figures["boxes"] = draw.discovery_boxes(
            [boxed[kept[i]][0] for i in shown],
            [predicted[i] for i in shown],
            [truth[i] for i in shown],
        )
    details = {"images": len(kept), "images_without_boxes": len(features) - len(kept)}
    return Outcome({"CorLoc": Score.mean(hits, items=torch.tensor(kept))}, figures, details)

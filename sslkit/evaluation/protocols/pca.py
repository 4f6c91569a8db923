"""Principal components of a model's patches as colours, by `sslkit.evaluation.pca`."""

import torch

from sslkit.evaluation import figures as draw
from sslkit.evaluation.options import PCA as Options
from sslkit.evaluation.pca import pca_maps
from sslkit.evaluation.scores import Outcome
from sslkit.evaluation.subject import Subject


def evaluate(subject: Subject, options: Options) -> Outcome:
    """The figure; ``details`` say how much of the variance the colours show."""
    few = subject.limited("test", options.num_images)
    features = few.features("test", "patches", view="dense")
    maps = pca_maps(features.patches, threshold=options.threshold, clip=options.clip)
    images = torch.stack(few.images("test", features.indices.tolist()))
    details = {
        "foreground": round(maps.foreground.double().mean().item(), 4),
        "explained by each colour": [round(x, 4) for x in maps.explained.tolist()],
    }
    return Outcome({}, {"pca_maps": draw.pca_maps(images, maps.rgb)}, details)

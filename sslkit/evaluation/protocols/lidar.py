"""LiDAR of a model, by `sslkit.evaluation.effective_rank`."""

from sslkit.data.crops import MultiCrop
from sslkit.evaluation.augmented import view_features
from sslkit.evaluation.effective_rank import lidar
from sslkit.evaluation.options import LiDAR as Options
from sslkit.evaluation.scores import Outcome, Score
from sslkit.evaluation.subject import Subject


def evaluate(subject: Subject, options: Options) -> Outcome:
    """Effective rank of what tells training images apart. There is no interval, as in `rankme`."""
    crops = MultiCrop(
        global_size=subject.global_size,
        global_scale=options.scale,
        blur_sigma=options.blur_sigma,
    )
    views = view_features(
        subject,
        crops,
        num_images=options.num_images,
        num_views=options.num_views,
        token=options.token,
    )
    n, q, D = views.shape
    found = lidar(views, delta=options.delta, eps=options.eps)
    return Outcome(
        {"LiDAR": Score(found, percent=False)},
        details={"images": n, "views": q, "largest possible": min(n - 1, D)},
    )

"""RankMe of a model, by `sslkit.evaluation.effective_rank`."""

from sslkit.evaluation.effective_rank import rankme
from sslkit.evaluation.options import RankMe as Options
from sslkit.evaluation.scores import Outcome, Score
from sslkit.evaluation.subject import Subject


def evaluate(subject: Subject, options: Options) -> Outcome:
    """Effective rank of the training images' features. There is no interval.

    A bootstrap resample repeats images, and repeated images have a lower rank.
    """
    features = subject.limited("train", options.num_images).features("train", options.token)
    found = features[options.token]
    return Outcome(
        {"RankMe": Score(rankme(found, eps=options.eps), percent=False)},
        details={"images": len(found), "largest possible": min(found.shape)},
    )

"""PCA features of a model as files for Feat2GS, by `sslkit.evaluation.feat2gs`."""

from pathlib import Path
from typing import Any

from einops import rearrange

from sslkit.evaluation.feat2gs import pca_features, write_pca_features
from sslkit.evaluation.options import Feat2GS as Options
from sslkit.evaluation.scores import Outcome, Score
from sslkit.evaluation.subject import Subject


def evaluate(subject: Subject, options: Options) -> Outcome:
    """Write the files; the score is the share of the variance that the components keep."""
    views = subject.features("test", "patches", view="dense")
    most = min(views.patches.shape[3], views.patches.shape[:3].numel())
    scene = pca_features(views.patches, dim=min(options.dim, most))
    source: Any = subject.test
    names = [Path(source.name(i)).stem for i in views.indices.tolist()]
    write_pca_features(options.features, scene, names)
    patches = rearrange(views.patches, "v h w d -> (v h w) d")
    total = patches.double().var(0, correction=0).sum().item()
    kept = scene.variances.double().sum().item() / total
    return Outcome({"variance kept": Score(kept)}, {}, {"views": names})

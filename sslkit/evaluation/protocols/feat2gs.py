"""PCA features of a model as files for Feat2GS, by `sslkit.evaluation.feat2gs`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from einops import rearrange

from sslkit.evaluation.feat2gs import pca_features, write_pca_features
from sslkit.evaluation.scores import Outcome, Score
from sslkit.evaluation.subject import Subject


@dataclass(frozen=True)
class Options:
    """Feat2GS: write the features of the test images, the views of one scene, for its training."""

    features: Path
    """Folder to write to."""
    dim: int = 256
    """Principal components kept; all of them where a model has fewer features, or a scene fewer
    patches."""


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

"""Is the run still learning? Signs of a collapse are put in words."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sslkit.unit_rows import unit_rows

_MEANING = {
    "uniform targets": (
        "the entropy of the targets is at its limit ln K",
        "The teacher gives every image the same target, so there is nothing to learn. Try a lower "
        "teacher temperature, a longer temperature warm-up or a lower learning rate.",
    ),
    "one prototype": (
        "the entropy of the mean target is near 0 of at most ln K",
        "Nearly all images are assigned to one prototype. Try Sinkhorn targets in place of "
        "centering, a faster centre (lower centering momentum), a larger batch or a lower learning "
        "rate.",
    ),
    "uniform student": (
        "the loss is at ln K, that of a constant prediction of 1 / K",
        "This level of the head has learnt nothing. Try a longer warm-up or a different learning "
        "rate, and see that the head gets gradients and is not frozen any more.",
    ),
    "one feature": (
        "the spread of the features over the batch is near 0 (healthy: towards 1)",
        "All images have nearly the same features. Try a lower learning rate, a longer warm-up, a "
        "larger KoLeo weight, a larger batch or a higher teacher momentum.",
    ),
}
"""For each sign: what was seen, and what it means and what to try."""


def feature_std(features: Tensor) -> Tensor:
    """How far the directions of the features spread over the batch, from 0 to about 1.

    With unit vectors ``z_b = x_b / |x_b|`` of dimension D::

        sqrt( D * mean_d var_b z_bd ),     var with B - 1 in the denominator

    1 for directions uniform on the sphere (each feature then has standard deviation 1 / sqrt(D)); 0
    when all samples have one direction. With c the mean cosine of two different samples it is
    ``sqrt(1 - c)`` exactly, so that .1 means a mean cosine of .99.

    Args:
        features: [B, D], for example the class tokens of a batch of images.

    Returns:
        A 0-dimensional float32 tensor (float64 for float64); NaN for B < 2, which has no spread.

    >>> feature_std(torch.eye(4)), feature_std(torch.ones(4, 8))
    (tensor(1.), tensor(0.))
    """
    if features.ndim != 2:
        raise ValueError(f"features must be [B, D], got shape {tuple(features.shape)}")
    x = features.detach().to(torch.promote_types(features.dtype, torch.float32))
    if len(x) < 2:
        return x.new_full((), math.nan)
    z = unit_rows(x)
    return z.var(dim=0).sum().sqrt()


class CollapseMonitor:
    """Turns the signs of a collapse into plain warnings.

    Four signs, each a fraction of its own scale, are looked at from ``grace_steps`` on:

    uniform targets
        ``target_entropy >= uniform_targets * ln K``: the teacher gives every sample the same
        (uniform) target, from which nothing can be learnt.
    one prototype
        ``mean_entropy <= few_prototypes * ln K``: the mean assignment of the batch sits on one
        prototype or few. (Sharp targets alone, a small ``target_entropy``, are healthy as long as
        different samples get different prototypes.)
    uniform student
        ``loss >= uniform_loss * ln K``: a student that predicts 1 / K for everything has a
        cross-entropy of exactly ln K, whatever the targets.
    one feature
        ``spread <= one_feature``, with the spread of :func:`feature_std`: all images have nearly
        the same features.

    A sign is reported once when it has been there for ``patience`` updates in a row, and again only
    after it was gone. A value that is NaN shows no sign.

    Early in a healthy run all four can be there: at step 0 the loss is about ln K, and the features
    of a random network hardly differ. Choose ``grace_steps`` past the warm-up of the learning rate.

    Args:
        num_prototypes: K of each level, by the names that :meth:`update` uses.
        grace_steps: no warning before this step.
        patience: updates in a row, at least 1.
        uniform_targets: of ln K.
        few_prototypes: of ln K. At .05 a level of 1024 prototypes uses about 1.4 of them.
        uniform_loss: of ln K.
        one_feature: of a spread of 1. At .05 the mean cosine of two images is .9975.

    >>> monitor = CollapseMonitor({"dino/level0": 8}, grace_steps=100, patience=1)
    >>> signs = dict(target_entropy={"dino/level0": 2.079}, mean_entropy={}, losses={}, spread=0.6)
    >>> monitor.update(99, **signs)
    []
    >>> for warning in monitor.update(100, **signs):
    ...     print(warning)  # doctest: +NORMALIZE_WHITESPACE
    step 100: uniform targets: the entropy of the targets is at its limit ln K: dino/level0 2.079 of
    2.079. The teacher gives every image the same target, so there is nothing to learn. Try a lower
    teacher temperature, a longer temperature warm-up or a lower learning rate.
    >>> monitor.update(101, **signs)
    []
    """

    def __init__(
        self,
        num_prototypes: Mapping[str, int],
        *,
        grace_steps: int,
        patience: int = 3,
        uniform_targets: float = 0.99,
        few_prototypes: float = 0.05,
        uniform_loss: float = 0.995,
        one_feature: float = 0.05,
    ) -> None:
        too_few = [name for name, count in num_prototypes.items() if count < 2]
        if too_few:
            raise ValueError(f"num_prototypes must be at least 2, which is not so for {too_few}")
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        fractions = {
            "uniform_targets": uniform_targets,
            "few_prototypes": few_prototypes,
            "uniform_loss": uniform_loss,
            "one_feature": one_feature,
        }
        for name, fraction in fractions.items():
            if not 0 < fraction < 1:
                raise ValueError(f"{name} is a fraction between 0 and 1, got {fraction}")
        self.limits = {name: math.log(count) for name, count in num_prototypes.items()}
        self.grace_steps = grace_steps
        self.patience = patience
        self.uniform_targets = uniform_targets
        self.few_prototypes = few_prototypes
        self.uniform_loss = uniform_loss
        self.one_feature = one_feature
        self._streaks: dict[tuple[str, str], int] = {}

    def update(
        self,
        step: int,
        *,
        target_entropy: Mapping[str, float],
        mean_entropy: Mapping[str, float],
        losses: Mapping[str, float],
        spread: float,
    ) -> list[str]:
        """Look at the values of one step.

        Args:
            step: counted from 0.
            target_entropy: mean over the samples of the entropy of their targets in nats
                (``Assignments.usage().target_entropy``), by names of ``num_prototypes``. Like the
                next two, it may lack levels; what is not given is not watched.
            mean_entropy: entropy of the mean target in nats (``Assignments.usage().entropy``).
            losses: cross-entropies as means over rows, so that a uniform student has ln K. iBOTLoss
                counts images without masked patches as 0: divide it by the share of masked images.
            spread: :func:`feature_std` of the class tokens; NaN if not known.

        Returns:
            The new warnings, at most one for each of the four signs; usually none.

        Raises:
            ValueError: a name is not in ``num_prototypes``.
        """
        self._require_known({**target_entropy, **mean_entropy, **losses})
        if step < self.grace_steps:
            return []
        present = {
            "uniform targets": self._at_least(self.uniform_targets, target_entropy),
            "one prototype": self._at_most(self.few_prototypes, mean_entropy),
            "uniform student": self._at_least(self.uniform_loss, losses),
            "one feature": {"": f"{spread:.4f}"} if spread <= self.one_feature else {},
        }
        self._streaks = {
            (sign, name): self._streaks.get((sign, name), 0) + 1
            for sign, seen in present.items()
            for name in seen
        }
        warnings = []
        for sign, seen in present.items():
            new = [
                text for name, text in seen.items() if self._streaks[sign, name] == self.patience
            ]
            if new:
                what, advice = _MEANING[sign]
                warnings.append(f"step {step}: {sign}: {what}: {', '.join(new)}. {advice}")
        return warnings

    def _at_least(self, fraction: float, values: Mapping[str, float]) -> dict[str, str]:
        """The values that reach ``fraction`` of their ln K, in words."""
        return {n: self._text(n, v) for n, v in values.items() if v >= fraction * self.limits[n]}

    def _at_most(self, fraction: float, values: Mapping[str, float]) -> dict[str, str]:
        """The values that are no more than ``fraction`` of their ln K, in words."""
        return {n: self._text(n, v) for n, v in values.items() if v <= fraction * self.limits[n]}

    def _text(self, name: str, value: float) -> str:
        return f"{name} {value:.3f} of {self.limits[name]:.3f}"

    def _require_known(self, values: Mapping[str, float]) -> None:
        unknown = sorted(values.keys() - self.limits.keys())
        if unknown:
            raise ValueError(f"unknown levels {unknown}; num_prototypes has {sorted(self.limits)}")

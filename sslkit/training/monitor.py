"""Is the run still learning? Signs of a collapse are put in words."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sslkit.unit_rows import unit_rows

HELP = "docs/recipe.md, Reading the curves"
_MEANING = {
    "uniform targets": "entropy of the targets {value} of at most ln K = {limit}",
    "one prototype": "entropy of the mean target {value} of at most ln K = {limit}",
    "uniform student": "loss {value} stays at ln K = {limit}",
    "one feature": "spread of the features {value}, healthy towards 1",
}
"""For each sign: what was seen, in the first of the levels that show it."""


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

    Four signs, each a fraction of its own scale, are looked at from ``grace_steps`` on. What to do
    about each is in `docs/recipe.md`, *Reading the curves*.

    uniform targets
        ``target_entropy >= uniform_targets * ln K``: the teacher gives every sample the same
        (uniform) target, from which nothing can be learnt.
    one prototype
        ``mean_entropy <= few_prototypes * ln K``: the mean assignment of the batch sits on one
        prototype or few. (Sharp targets alone, a small ``target_entropy``, are healthy as long as
        different samples get different prototypes.)
    uniform student
        ``|loss - ln K| <= (1 - uniform_loss) * ln K``: a student that predicts 1 / K for everything
        has a cross-entropy of exactly ln K, whatever the targets. A larger loss is another thing:
        that of a student that is sure and wrong, as in the first steps of every run.
    one feature
        ``spread <= one_feature``, with the spread of :func:`feature_std`: all images have nearly
        the same features.

    A sign is reported once: when a level has shown it for ``patience`` updates in a row for the
    first time. A value that is NaN shows no sign.

    Early in a healthy run all four can be there: at step 0 the loss is about ln K, and the features
    of a random network hardly differ. Choose ``grace_steps`` past the warm-up of the learning rate.

    Args:
        num_prototypes: K of each level, by the names that :meth:`update` uses.
        grace_steps: no warning before this step.
        loss_grace_steps: none of a uniform student before this step: on its way down, the loss of
            a healthy run passes ln K. ``grace_steps`` by default.
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
    step 100: uniform targets: entropy of the targets 2.079 of at most ln K = 2.079 in dino/level0.
    See docs/recipe.md, Reading the curves
    >>> monitor.update(101, **signs)
    []
    """

    def __init__(
        self,
        num_prototypes: Mapping[str, int],
        *,
        grace_steps: int,
        loss_grace_steps: int | None = None,
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
        self.loss_grace_steps = grace_steps if loss_grace_steps is None else loss_grace_steps
        self.patience = patience
        self.uniform_targets = uniform_targets
        self.few_prototypes = few_prototypes
        self.uniform_loss = uniform_loss
        self.one_feature = one_feature
        self._streaks: dict[tuple[str, str], int] = {}
        self._told: set[str] = set()

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
            The new warnings, one for each sign that is there for the first time; usually none.

        Raises:
            ValueError: a name is not in ``num_prototypes``.
        """
        self._require_known({**target_entropy, **mean_entropy, **losses})
        if step < self.grace_steps:
            return []
        present = {
            "uniform targets": self._within(self.uniform_targets, math.inf, target_entropy),
            "one prototype": self._within(-math.inf, self.few_prototypes, mean_entropy),
            "uniform student": (
                self._within(self.uniform_loss, 2 - self.uniform_loss, losses)
                if step >= self.loss_grace_steps
                else {}
            ),
            "one feature": {"": spread} if spread <= self.one_feature else {},
        }
        self._streaks = {
            (sign, name): self._streaks.get((sign, name), 0) + 1
            for sign, seen in present.items()
            for name in seen
        }
        warnings = []
        for sign, seen in present.items():
            new = [name for name in seen if self._streaks[sign, name] >= self.patience]
            if new and sign not in self._told:
                self._told.add(sign)
                warnings.append(
                    f"step {step}: {sign}: {self._text(sign, new, seen[new[0]])}. See {HELP}"
                )
        return warnings

    def _within(self, low: float, high: float, values: Mapping[str, float]) -> dict[str, float]:
        """The values between two fractions of their ln K."""
        return {n: v for n, v in values.items() if low <= v / self.limits[n] <= high}

    def _text(self, sign: str, names: list[str], value: float) -> str:
        limit = f"{self.limits[names[0]]:.3f}" if names[0] else ""
        what = _MEANING[sign].format(value=f"{value:.3f}", limit=limit)
        where = f" in {names[0]}" if names[0] else ""
        return what + where + (f" and {len(names) - 1} more" if len(names) > 1 else "")

    def _require_known(self, values: Mapping[str, float]) -> None:
        unknown = sorted(values.keys() - self.limits.keys())
        if unknown:
            raise ValueError(f"unknown levels {unknown}; num_prototypes has {sorted(self.limits)}")

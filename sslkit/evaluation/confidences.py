"""Confidences: six scores of how well an image is known, from its features and logits.

Of a confidence, higher means more in-distribution (ID). All six are among those that OpenOOD v1.5
compares (Zhang et al. 2023, arXiv 2306.09301); `sslkit.evaluation.ood` measures how well they do.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sslkit.evaluation.knn import cosine_neighbours
from sslkit.evaluation.labels import with_labels

_ITEMS_AT_ONCE = 4096


def max_probability(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Largest softmax probability (MSP; Hendrycks & Gimpel 2017, arXiv 1610.02136), [B].

    In float64: in float32 the many probabilities that round to 1 would be ties.

    >>> max_probability(torch.tensor([[0.0, 0.0], [0.0, 3.0]]))
    tensor([0.5000, 0.9526], dtype=torch.float64)
    """
    _two_axes("logits", logits)
    return (logits.double() / temperature).softmax(dim=1).amax(dim=1)


def max_logit(logits: Tensor) -> Tensor:
    """Largest logit (MLS; Hendrycks et al. 2022, arXiv 1911.11132), float64 [B].

    >>> max_logit(torch.tensor([[0.0, -1.0], [0.0, 3.0]]))
    tensor([0., 3.], dtype=torch.float64)
    """
    _two_axes("logits", logits)
    return logits.double().amax(dim=1)


def energy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Negative free energy ``T log sum_c exp(logits_c / T)`` (Liu et al. 2020, arXiv 2010.03759).

    Float64 [B].

    >>> energy(torch.tensor([[0.0, 0.0], [0.0, 3.0]]))
    tensor([0.6931, 3.0486], dtype=torch.float64)
    """
    _two_axes("logits", logits)
    return temperature * (logits.double() / temperature).logsumexp(dim=1)


def knn_confidence(train_features: Tensor, features: Tensor, *, k: int = 50) -> Tensor:
    """Minus the distance to the k-th nearest training item (Sun et al. 2022, arXiv 2204.06507).

    Euclidean, of L2-normalised features: ``-sqrt(2 - 2 cos)``. OpenOOD's is minus its square,
    which sorts alike.

    Args:
        train_features: ID training features [N, D].
        features: [B, D].
        k: OpenOOD's default is 50. Of fewer training items, the farthest counts.

    Returns:
        Float64 [B], from -2 to 0.

    >>> knn_confidence(torch.eye(2), torch.tensor([[3.0, 0.0], [1.0, 1.0]]), k=1)
    tensor([-0.0000, -0.7654], dtype=torch.float64)
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if not len(train_features):
        raise ValueError("train_features is empty: the distance needs at least one training item")
    similarity, _ = cosine_neighbours(features, train_features, min(k, len(train_features)))
    return -(2 - 2 * similarity[:, -1].double()).clamp(min=0).sqrt()


@dataclass(frozen=True)
class Mahalanobis:
    """Gaussian classes of one covariance (Lee et al. 2018, arXiv 1807.03888), from `fit`.

    Attributes:
        means: float64 [C', D], of the C' classes that were trained.
        whitening: float64 [D, r] with ``whitening @ whitening.T`` the covariance's inverse.
    """

    means: Tensor
    whitening: Tensor

    @classmethod
    def fit(cls, features: Tensor, labels: Tensor) -> "Mahalanobis":
        """Class means and their shared covariance, of training items.

        ``covariance = (1 / N) sum_i (x_i - mean_(label_i)) (x_i - mean_(label_i))^T``, in float64.
        A singular one is inverted on its range (pseudo-inverse): directions in which no item
        leaves its class's mean are not looked at.

        Args:
            features: [N, D].
            labels: int [N]; items of label -1 are left out, and a warning says how many.
        """
        _check_training(features, labels)
        labels, features = with_labels(labels, features, name="labels")
        classes, which = labels.to(features.device).unique(return_inverse=True)
        counts = which.bincount(minlength=len(classes))
        D = features.shape[1]
        means = torch.zeros(len(classes), D, dtype=torch.float64, device=features.device)
        for x, c in _in_parts(features, which):
            means.index_add_(0, c, x)
        means /= counts[:, None]
        covariance = means.new_zeros(D, D)
        for x, c in _in_parts(features, which):
            x -= means[c]
            covariance += x.T @ x / len(features)
        variances, directions = torch.linalg.eigh(covariance)
        kept = variances > variances.amax() * D * torch.finfo(variances.dtype).eps
        if not kept.any():
            raise ValueError(
                "all training items of a class are the same: the covariance is 0, and there is no "
                "distance to measure"
            )
        return cls(means, directions[:, kept] * variances[kept].rsqrt())

    def confidence(self, features: Tensor) -> Tensor:
        """Minus the squared distance to the nearest class mean, float64 [B], of [B, D]."""
        middle = self.means.mean(0)  # distances of numbers near 0 are exact
        centres = (self.means - middle) @ self.whitening  # [C', r]
        return -torch.cat(
            [
                torch.cdist((x - middle) @ self.whitening, centres).square().amin(dim=1)
                for (x,) in _in_parts(features)
            ]
        )


@dataclass(frozen=True)
class ViM:
    """Virtual-logit matching (Wang et al. 2022, arXiv 2203.10807), from `fit`.

    Attributes:
        weight: float64 [C, D], of the linear classifier.
        bias: float64 [C].
        origin: float64 [D].
        residual: float64 [D, D - P]: orthonormal directions outside the principal space.
        alpha: scale of the residual's norm.
    """

    weight: Tensor
    bias: Tensor
    origin: Tensor
    residual: Tensor
    alpha: float

    @classmethod
    def fit(
        cls, features: Tensor, weight: Tensor, bias: Tensor, *, num_principal: int | None = None
    ) -> "ViM":
        """Principal space and scale, of training features.

        With the classifier ``logits = W x + b``, all in float64::

            origin = -pinv(W) b
            P: the span of the eigenvectors of (1/N) sum_i (x_i - origin) (x_i - origin)^T
               of the ``num_principal`` largest eigenvalues;  R: its orthogonal complement
            alpha = sum_i max_c logits_ic / sum_i |R^T (x_i - origin)|

        Args:
            features: [N, D].
            weight: W, [C, D].
            bias: b, [C].
            num_principal: dimension of the principal space, 0 < P < D. The default is the paper's
                1000 for D > 1500 and 512 below, and D // 2 for D < 768, which the authors'
                code added; N // 2 where N is no larger than that. OpenOOD v1.5 takes 256.
        """
        D = features.shape[1]
        if weight.ndim != 2 or weight.shape[1] != D or bias.shape != weight.shape[:1]:
            raise ValueError(
                f"weight and bias must be [C, {D}] and [C], as features have {D} dimensions; got "
                f"{list(weight.shape)} and {list(bias.shape)}"
            )
        if num_principal is None:
            num_principal = 1000 if D > 1500 else 512 if D >= 768 else D // 2
            if len(features) <= num_principal:  # they span no more dimensions than they are
                num_principal = max(1, len(features) // 2)
        if not 0 < num_principal < D:
            raise ValueError(
                f"num_principal={num_principal} must be between 1 and {D - 1}: features have {D} "
                "dimensions, and some must be left for the residual"
            )
        _two_axes("features", features)
        W, b = weight.double(), bias.double()
        origin = -torch.linalg.pinv(W) @ b
        scatter = W.new_zeros(D, D)
        for (x,) in _in_parts(features):
            scatter += (x - origin).T @ (x - origin) / len(features)
        if not scatter.isfinite().all():
            raise ValueError("features hold NaN or infinite values")
        _, directions = torch.linalg.eigh(scatter)  # ascending
        residual = directions[:, : D - num_principal]
        largest = sum((x @ W.T + b).amax(1).sum().item() for (x,) in _in_parts(features))
        norms = sum(
            ((x - origin) @ residual).norm(dim=1).sum().item() for (x,) in _in_parts(features)
        )
        if norms <= 1e-9 * len(features) * scatter.trace().sqrt().item():
            raise ValueError(
                f"all features lie in the principal space: choose num_principal < {num_principal}"
            )
        return cls(W, b, origin, residual, largest / norms)

    def confidence(self, features: Tensor) -> Tensor:
        """``log sum_c exp(logits_c) - alpha * |residual|``, float64 [B], of [B, D]."""
        parts = []
        for (x,) in _in_parts(features):
            virtual = self.alpha * ((x - self.origin) @ self.residual).norm(dim=1)
            parts.append(energy(x @ self.weight.T + self.bias) - virtual)
        return torch.cat(parts)


def ood_confidences(
    train_features: Tensor,
    train_labels: Tensor,
    weight: Tensor,
    bias: Tensor,
    test_features: Mapping[str, Tensor],
    *,
    k: int = 50,
    num_principal: int | None = None,
) -> dict[str, dict[str, Tensor]]:
    """All six confidences of the items of some sets.

    Args:
        train_features: ID training features [N, D].
        train_labels: int [N]; Mahalanobis leaves items of label -1 out.
        weight, bias: [C, D] and [C], a linear classifier of these features.
        test_features: [n, D] of each set by name, ID and OOD.
        k: see `knn_confidence`.
        num_principal: see `ViM.fit`.

    Returns:
        By score (``"msp"``, ``"max_logit"``, ``"energy"``, ``"knn"``, ``"mahalanobis"``,
        ``"vim"``) and set, float64 [n].

    >>> from sslkit.evaluation.ood import auroc
    >>> x, labels = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), torch.ones(60)
    >>> found = ood_confidences(x, labels.long(), x[:2], x[:2, 0], {"id": x, "ood": 5 * x})
    >>> {name: auroc(one["id"], one["ood"]) > 0.5 for name, one in found.items()}["mahalanobis"]
    True
    """
    mahalanobis = Mahalanobis.fit(train_features, train_labels)
    vim = ViM.fit(train_features, weight, bias, num_principal=num_principal)
    scores: dict[str, dict[str, Tensor]] = {
        name: {} for name in ("msp", "max_logit", "energy", "knn", "mahalanobis", "vim")
    }
    for name, features in test_features.items():
        logits = features.double() @ weight.double().T + bias.double()
        scores["msp"][name] = max_probability(logits)
        scores["max_logit"][name] = max_logit(logits)
        scores["energy"][name] = energy(logits)
        scores["knn"][name] = knn_confidence(train_features, features, k=k)
        scores["mahalanobis"][name] = mahalanobis.confidence(features)
        scores["vim"][name] = vim.confidence(features)
    return scores


def _two_axes(name: str, x: Tensor) -> None:
    if x.ndim != 2:
        raise ValueError(f"{name} must be [B, C], got {list(x.shape)}")


def _check_training(features: Tensor, labels: Tensor) -> None:
    _two_axes("features", features)
    if labels.shape != features.shape[:1] or not len(labels):
        raise ValueError(
            f"labels must be [{len(features)}], one for each of at least one feature, got "
            f"{list(labels.shape)}"
        )
    if not features.isfinite().all():
        raise ValueError("features hold NaN or infinite values")


def _in_parts(features: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows at a time, the features in float64: those of ImageNet do not fit at once."""
    split = [x.split(_ITEMS_AT_ONCE) for x in others]
    for x, *rest in zip(features.split(_ITEMS_AT_ONCE), *split, strict=True):
        yield x.to(torch.float64, copy=True), *rest

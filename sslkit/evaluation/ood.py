"""Out-of-distribution detection: does a confidence tell unknown images from known ones?

The protocol of OpenOOD v1.5 (Zhang et al. 2023, arXiv 2306.09301). Every score here is a
confidence: higher means more in-distribution. ID: in-distribution; OOD: out of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from sslkit.data.annotated.open import open_annotated
from sslkit.data.sources import Source, Subset
from sslkit.evaluation.knn import cosine_neighbours
from sslkit.evaluation.linear_probe import linear_probe
from sslkit.evaluation.scores import Outcome, Score
from sslkit.evaluation.subject import Subject, require_labels

_ITEMS_AT_ONCE = 4096

NEAR_FAR: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "cifar10": (("cifar100", "tin"), ("mnist", "svhn", "texture", "places365")),
    "cifar100": (("cifar10", "tin"), ("mnist", "svhn", "texture", "places365")),
    "imagenet": (("ssb_hard", "ninco"), ("inaturalist", "textures", "openimage_o")),
    "imagenet200": (("ssb_hard", "ninco"), ("inaturalist", "textures", "openimage_o")),
}
"""OpenOOD v1.5's near and far OOD sets, by ID set and under OpenOOD's names."""


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
        train_features: ID training features [N, D], with N >= k.
        features: [B, D].
        k: OpenOOD's default is 50.

    Returns:
        Float64 [B], from -2 to 0.

    >>> knn_confidence(torch.eye(2), torch.tensor([[3.0, 0.0], [1.0, 1.0]]), k=1)
    tensor([-0.0000, -0.7654], dtype=torch.float64)
    """
    similarity, _ = cosine_neighbours(features, train_features, k)
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
            labels: int [N], all >= 0.
        """
        _check_training(features, labels)
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
                code added. OpenOOD v1.5 takes 256.
        """
        D = features.shape[1]
        if weight.ndim != 2 or weight.shape[1] != D or bias.shape != weight.shape[:1]:
            raise ValueError(
                f"weight and bias must be [C, {D}] and [C], as features have {D} dimensions; got "
                f"{list(weight.shape)} and {list(bias.shape)}"
            )
        if num_principal is None:
            num_principal = 1000 if D > 1500 else 512 if D >= 768 else D // 2
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
        train_labels: int [N], all >= 0.
        weight, bias: [C, D] and [C], a linear classifier of these features.
        test_features: [n, D] of each set by name, ID and OOD.
        k: see `knn_confidence`.
        num_principal: see `ViM.fit`.

    Returns:
        By score (``"msp"``, ``"max_logit"``, ``"energy"``, ``"knn"``, ``"mahalanobis"``,
        ``"vim"``) and set, float64 [n].

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


def auroc(
    confidence_id: Tensor,
    confidence_ood: Tensor,
    *,
    id_weights: Tensor | None = None,
    ood_weights: Tensor | None = None,
) -> float:
    """Area under the ROC curve: the chance that an ID item is more confident than an OOD item.

    ``sum_ij w_i v_j [a_i > b_j] + [a_i = b_j] / 2``, over ``sum_ij w_i v_j``. It is the same with
    OOD as the positive class on the negated confidence (OpenOOD) and with ID as the positive class.

    Args:
        confidence_id: a, [n].
        confidence_ood: b, [m].
        id_weights: w >= 0, [n]: how often each item counts (a bootstrap's counts); default 1.
        ood_weights: v >= 0, [m].

    >>> auroc(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0]))
    0.75
    """
    a, w = _checked("id", confidence_id, id_weights)
    b, v = _checked("ood", confidence_ood, ood_weights)
    b, order = b.sort()
    below = torch.cat([v.new_zeros(1), v[order].cumsum(0)])  # weight of the OOD items up to each
    wins = (below[torch.searchsorted(b, a)] + below[torch.searchsorted(b, a, right=True)]) / 2
    return ((w * wins).sum() / (w.sum() * v.sum())).item()


def fpr_at_95_tpr(
    confidence_id: Tensor,
    confidence_ood: Tensor,
    *,
    positive: Literal["ood", "id"] = "ood",
    id_weights: Tensor | None = None,
    ood_weights: Tensor | None = None,
) -> float:
    """False positive rate at the threshold that finds 95 % of the positive class; lower is better.

    ``positive="ood"`` is OpenOOD v1.5's: items of confidence <= t are taken for OOD, with t the
    lowest confidence of an OOD item at which at least 95 % of the OOD items are found; the result
    is the share of the ID items that are taken for OOD.

    ``positive="id"`` is that of the earlier literature (and OpenOOD v1): items of confidence >= t
    are taken for ID, at least 95 % of the ID items; the result is the share of the OOD items
    that are taken for ID.

    scikit-learn's ``roc_curve``, as OpenOOD calls it, leaves out points between collinear ones, so
    that with many ties OpenOOD may read the rate off a later threshold and be higher.

    Args:
        confidence_id, confidence_ood: [n] and [m].
        positive: see above.
        id_weights, ood_weights: see `auroc`.

    >>> id_, ood = torch.arange(20.0), torch.arange(20.0) - 15
    >>> fpr_at_95_tpr(id_, ood), fpr_at_95_tpr(id_, ood, positive="id")
    (0.2, 0.2)
    """
    id_ = _checked("id", confidence_id, id_weights)
    ood = _checked("ood", confidence_ood, ood_weights)
    if positive not in ("ood", "id"):
        raise ValueError(f"positive must be 'ood' or 'id', got {positive!r}")
    # Scores of which the positive class has the higher ones.
    (x, w), (y, v) = (id_, ood) if positive == "id" else ((-ood[0], ood[1]), (-id_[0], id_[1]))
    x, order = x.sort(descending=True)
    found = w[order].cumsum(0)
    # A hair below, so that the rounding of sums cannot ask for one item more.
    enough = 0.95 * found[-1] * (1 - 1e-12)
    threshold = x[(found >= enough).nonzero()[0, 0]]
    return (v[y >= threshold].sum() / v.sum()).item()


def near_far_means(
    values: Mapping[str, float], near: Sequence[str], far: Sequence[str]
) -> tuple[float, float]:
    """Means of a metric over the near and over the far OOD sets, each set counting the same.

    Args:
        values: the metric by OOD set.
        near, far: names of sets; see `NEAR_FAR`.

    >>> near_far_means({"ninco": 0.5, "ssb_hard": 0.7, "textures": 0.9}, *NEAR_FAR["imagenet"])
    Traceback (most recent call last):
    ValueError: no value for the OOD sets ['inaturalist', 'openimage_o']; there are values for [...]
    >>> near_far_means({"a": 0.5, "b": 0.75, "c": 1.0}, ["a", "b"], ["c"])
    (0.625, 1.0)
    """
    if not near or not far:
        raise ValueError(f"near and far must each name an OOD set, got {near!r} and {far!r}")
    missing = sorted({*near, *far} - set(values))
    if missing:
        raise ValueError(
            f"no value for the OOD sets {missing}; there are values for {sorted(values)}"
        )
    return (
        sum(values[name] for name in near) / len(near),
        sum(values[name] for name in far) / len(far),
    )


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
    if int(labels.min()) < 0:
        raise ValueError("labels hold a negative label: leave unlabelled items out")
    if not features.isfinite().all():
        raise ValueError("features hold NaN or infinite values")


def _in_parts(features: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows at a time, the features in float64: those of ImageNet do not fit at once."""
    split = [x.split(_ITEMS_AT_ONCE) for x in others]
    for x, *rest in zip(features.split(_ITEMS_AT_ONCE), *split, strict=True):
        yield x.to(torch.float64, copy=True), *rest


def _checked(side: str, confidence: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Confidence and weights in float64."""
    if confidence.ndim != 1 or not len(confidence):
        raise ValueError(f"confidence_{side} must be [n] with n >= 1, got {list(confidence.shape)}")
    if confidence.isnan().any():
        raise ValueError(f"confidence_{side} holds NaN, which is neither high nor low")
    if weights is None:
        weights = torch.ones_like(confidence, dtype=torch.float64)
    if weights.shape != confidence.shape or not weights.sum() > 0 or weights.min() < 0:
        raise ValueError(
            f"{side}_weights must be [{len(confidence)}], >= 0 and not all 0, got "
            f"{list(weights.shape)}"
        )
    return confidence.double(), weights.double()


@dataclass(frozen=True)
class Options:
    """Out-of-distribution detection: AUROC of six scores, over near and far sets."""

    near: tuple[str, ...] = ()
    """Images of similar classes, each a folder or what --data takes (imglist:LIST for OpenOOD's
    lists): all of it, or its test split. OpenOOD's for ImageNet are SSB-hard and NINCO."""
    far: tuple[str, ...] = ()
    """Images of other kinds. OpenOOD's for ImageNet: iNaturalist, Textures and OpenImage-O."""
    k: int = 50
    """The k-NN score is the distance to the k-th nearest training image."""
    num_principal: int | None = None
    """Dimension of ViM's principal space; default: 1000, 512 or half, as the features are wide."""
    num_steps: int = 12_500
    """Steps of SGD of the linear classifier of the class token that gives the logits."""
    batch_size: int = 1024
    """Items a step."""


def evaluate(subject: Subject, options: Options) -> Outcome:
    """Mean AUROC over the near and over the far sets by score; every set's in the details.

    Known images are the test data. Bootstrap items are the known images and then those of every
    unknown set; a resample that holds no image of a set leaves this set out of the mean.
    """
    from sslkit.evaluation import figures

    if not options.near and not options.far:
        raise ValueError("name at least one unknown data set: --near PATH ... or --far PATH ...")
    for spec in dict.fromkeys((*options.near, *options.far)):
        subject = subject.with_source(spec, whole_source(spec))
    train, test = (subject.features(name, "cls") for name in ("train", "test"))
    head = linear_probe(
        train.cls[:, None],
        None,
        require_labels(train, "train"),
        test.cls[:, None],
        None,
        require_labels(test, "test"),
        generator=subject.generator(),
        num_blocks=(1,),
        mean_patch=(False,),
        num_steps=options.num_steps,
        batch_size=options.batch_size,
        device=subject.device,
    )
    sets = {spec: subject.features(spec, "cls").cls for spec in (*options.near, *options.far)}
    found = ood_confidences(
        train.cls,
        train.labels,
        head.best.weight,
        head.best.bias,
        {"": test.cls, **sets},
        k=min(options.k, len(train)),
        num_principal=options.num_principal,
    )
    groups = {"near": options.near, "far": options.far}
    groups = {group: specs for group, specs in groups.items() if specs}
    scores = {
        f"{group} AUROC, {name}": _mean_auroc(one, specs)
        for name, one in found.items()
        for group, specs in groups.items()
    }
    drawn = {
        name: {
            "id": one[""],
            **{group: torch.cat([one[spec] for spec in specs]) for group, specs in groups.items()},
        }
        for name, one in found.items()
    }
    means = {
        name: {group: scores[f"{group} AUROC, {name}"].value for group in groups} for name in found
    }
    tables = {
        title: {
            name: {spec: metric(one[""], one[spec]) for spec in sets} for name, one in found.items()
        }
        for title, metric in (("AUROC", auroc), ("FPR at 95 % TPR", fpr_at_95_tpr))
    }
    return Outcome(
        scores,
        {"ood": figures.ood_histograms(drawn, aurocs=means)},
        {"accuracy of the classifier": head.accuracy, **tables},
    )


def whole_source(spec: str) -> Source:
    """The test split of data that has one of its own; all images of other data.

    Args:
        spec: see `sslkit.data.annotated.open.open_annotated`; OpenOOD's lists are
            ``imglist:LIST``.
    """
    source = open_annotated(spec, split="test")
    if isinstance(source, Subset):
        source = open_annotated(spec, test_fraction=0)
    return cast(Source, source)


def _mean_auroc(confidences: Mapping[str, Tensor], specs: Sequence[str]) -> Score:
    """Mean over some sets; the items are those of all sets, known ones (``""``) first."""
    sizes = [len(x) for x in confidences.values()]

    def resampled(counts: Tensor) -> float:
        weights = dict(zip(confidences, counts.split(sizes), strict=True))
        values = [
            auroc(
                confidences[""],
                confidences[spec],
                id_weights=weights[""],
                ood_weights=weights[spec],
            )
            for spec in specs
            if weights[spec].any() and weights[""].any()
        ]
        return sum(values) / len(values) if values else 0.5

    return Score.of(resampled, sum(sizes))

"""Overclustering: planted clusters, and each step against scikit-learn or a loop."""

import builtins

import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from sslkit.evaluation import overclustering as module
from sslkit.evaluation.confusion import confusion_matrices, mean_iou
from sslkit.evaluation.overclustering import cluster_counts, overclustering, reduced
from sslkit.evaluation.segmentation import resize_masks
from tests.noise import noise, seeded


def planted(num_classes, kinds=1, *, batch=12, grid=(5, 7), patch=4, spread=0.1):
    """Features of classes that have ``kinds`` looks each, and masks that have one class a patch."""
    looks = torch.randint(num_classes * kinds, (batch, *grid), generator=seeded())
    features = 3 * noise(num_classes * kinds, 12, seed=4)[looks] + spread * noise(*looks.shape, 12)
    masks = looks // kinds
    return features, masks.repeat_interleave(patch, 1).repeat_interleave(patch, 2)


@pytest.mark.parametrize(("num_classes", "kinds", "extra"), [(4, 1, 0), (3, 2, 0), (3, 2, 4)])
def test_planted_clusters_score_one(num_classes, kinds, extra):
    features, masks = planted(num_classes, kinds)
    found = overclustering(
        features,
        masks,
        num_classes,
        num_clusters=num_classes * kinds + extra,
        size=(20, 28),
        num_iterations=10,
        num_restarts=100,  # a start that has a point of each cluster is among them
    )
    assert found.mean_ious == (1.0,) * 5
    assert found.mean_iou == 1
    assert found.counts.shape == (5, 12, num_classes, num_classes * kinds + extra)
    patches = masks[:, ::4, ::4]
    for classes, ids in zip(found.classes, found.clusters, strict=True):
        assert torch.equal(classes[ids.long()], patches)


def test_noise_scores_little_and_more_clusters_do_not_lower_it():
    masks = planted(4)[1]
    scores = [
        overclustering(
            noise(12, 5, 7, 12), masks, 4, num_clusters=k, size=None, seeds=(0, 1)
        ).mean_iou
        for k in (4, 12, 40)
    ]
    assert scores[0] < 0.25
    assert scores[0] < scores[1] < scores[2]


def test_score_is_that_of_the_renamed_masks():
    features, masks = planted(3, spread=6)
    masks[0, :9] = 255
    found = overclustering(features, masks, 3, num_clusters=7, size=(9, 11), seeds=(3, 1))
    truth = resize_masks(masks, (9, 11))
    for score, counts, classes, ids in zip(
        found.mean_ious, found.counts, found.classes, found.clusters, strict=True
    ):
        predicted = classes[resize_masks(ids, (9, 11)).long()]
        expected = mean_iou(confusion_matrices(truth, predicted, 3).sum(0))
        assert score == pytest.approx(expected)
        assert counts.sum() == (truth != 255).sum()
        totals = counts.sum(0)
        assert (
            torch.equal(classes, totals.argmax(0)) or (totals.sort(0).values.diff(dim=0) == 0).any()
        )
    assert found.mean_iou == pytest.approx(sum(found.mean_ious) / 2)


def test_counts_are_those_of_the_loop():
    masks = torch.randint(3, (2, 4, 5), generator=seeded())
    masks[0, 0, :3] = 255
    clusters = torch.randint(6, (2, 4, 5), generator=seeded(1))
    found = cluster_counts(masks, clusters, 3, 6)
    for image, count in enumerate(found.tolist()):
        expected = [[0] * 6 for _ in range(3)]
        for c, k in zip(
            masks[image].flatten().tolist(), clusters[image].flatten().tolist(), strict=True
        ):
            if c != 255:
                expected[c][k] += 1
        assert count == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_reduction_is_that_of_scikit_learn(dtype, monkeypatch):
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 70)
    x = (noise(200, 6) @ noise(6, 9, seed=1) + 5).to(dtype)
    x[:, 4] = 3.1  # does not vary
    found = reduced(x, 5)
    assert found.dtype == torch.float32
    expected = PCA(5, svd_solver="full").fit_transform(
        StandardScaler().fit_transform(x.double().numpy())
    )
    expected = torch.from_numpy(expected).float()
    sign = (found * expected).sum(0).sign()
    torch.testing.assert_close(found * sign, expected, atol=2e-4, rtol=1e-3)
    quirky = reduced(x, 5, reference_quirks=True)  # few rows: faiss takes all of them
    sign = (quirky * expected).sum(0).sign()
    torch.testing.assert_close(quirky * sign, expected, atol=2e-3, rtol=1e-2)
    assert reduced(x, 50).shape == (200, 9)


def test_kmeans_reaches_the_distortion_of_scikit_learn_on_all_points():
    x = noise(6000, 3).numpy()
    settings = {"num_iterations": 50, "num_restarts": 3, "seed": 0}

    def distortion(ids):
        ids = ids.long()
        sums = torch.zeros(8, 3).index_add_(0, ids, torch.from_numpy(x))
        means = sums / torch.bincount(ids, minlength=8)[:, None]
        return (torch.from_numpy(x) - means[ids]).square().sum().item()

    clean = module._kmeans(x, 8, **settings, subsample=False)
    assert torch.equal(clean, module._kmeans(x, 8, **settings, subsample=False))
    reference = KMeans(8, n_init=3, random_state=0).fit(x).inertia_
    assert distortion(clean) < 1.01 * reference
    quirky = module._kmeans(x, 8, **settings, subsample=True)  # of 2048 points
    assert distortion(quirky) > distortion(clean)


def test_seeds_and_restarts():
    features, masks = planted(6, spread=8)
    arguments = {"num_clusters": 6, "size": None, "num_iterations": 3, "num_restarts": 1}
    first, again = (overclustering(features, masks, 6, seeds=(0, 1), **arguments) for _ in range(2))
    assert torch.equal(first.counts, again.counts)
    assert not torch.equal(first.clusters[0], first.clusters[1])
    swapped = overclustering(features, masks, 6, seeds=(1, 0), **arguments)
    assert torch.equal(swapped.clusters, first.clusters.flip(0))


@pytest.mark.filterwarnings("ignore:masks have no pixel of 1 of the 4")
def test_reference_quirks():
    features, masks = planted(3)
    masks[:, :, 1::4] = (masks[:, :, 1::4] + 1) % 3  # what centres see, and corners do not
    arguments = {"num_clusters": 3, "seeds": (0,)}
    clean, quirky = (
        overclustering(
            features,
            masks,
            4 if quirks else 3,
            size=(5, 7),
            reference_quirks=quirks,
            **{**arguments, "num_clusters": 4 if quirks else 3},
        )
        for quirks in (False, True)
    )
    assert clean.mean_iou == 1  # centres (column 2 of 4) see the true class
    assert quirky.mean_iou <= 0.75  # of four classes, the absent one counts as 0
    corner = masks.clone()
    corner[:, :, ::4] = (corner[:, :, ::4] + 1) % 3
    same = [
        overclustering(features, m, 3, size=(5, 7), reference_quirks=True, **arguments).counts
        for m in (masks, corner)
    ]
    assert not torch.equal(*same)


def test_without_faiss(monkeypatch):
    real = builtins.__import__

    def refuse(name, *arguments, **options):
        if name == "faiss":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    features, masks = planted(2)
    with pytest.raises(ImportError, match=r"pip install 'sslkit\[evaluation\]'"):
        overclustering(features, masks, 2, num_clusters=2)


FEATURES, MASKS = noise(2, 3, 4, 5), torch.zeros(2, 6, 8, dtype=torch.long)
MASKS[:, -1, -1] = 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masks": MASKS[:1]}, "2 images of patches but 1 masks"),
        ({"num_clusters": 1}, "num_clusters=1 must be between num_classes=2 and .* patches, 24"),
        ({"num_clusters": 25}, "num_clusters=25"),
        ({"seeds": ()}, "seeds is empty"),
        ({"masks": MASKS + 2}, "masks hold class 2, but num_classes=2"),
        ({"patches": FEATURES * torch.nan}, "NaN or infinite"),
    ],
)
def test_refused(changes, message):
    arguments = {"patches": FEATURES, "masks": MASKS, "num_classes": 2, "num_clusters": 3}
    with pytest.raises(ValueError, match=message):
        overclustering(**{**arguments, **changes})

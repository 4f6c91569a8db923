"""Items without a label (-1) take no part in any score, and how many they are is said."""

import warnings
from dataclasses import replace

import pytest
import torch

from sslkit import backbones
from sslkit.data.labels import MAX_CLASSES
from sslkit.data.scenes import Scenes
from sslkit.evaluation.confidences import Mahalanobis, ViM, knn_confidence
from sslkit.evaluation.features import extract
from sslkit.evaluation.knn import knn_accuracy, knn_predict
from sslkit.evaluation.labels import labelled_rows, with_labels
from sslkit.evaluation.linear_probe import linear_probe as probe
from sslkit.evaluation.logistic import held_out_part, logistic_regression
from sslkit.evaluation.matryoshka import matryoshka_curve
from sslkit.evaluation.protocols import knn, linear_probe, logistic, ood, robustness
from sslkit.evaluation.scores import Score
from sslkit.evaluation.subject import Subject, labelled
from sslkit.evaluation.tokens import Unsuitable
from sslkit.evaluation.views import PaddedView

from .noise import noise


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def problem(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of three overlapping classes [n, 5], and labels of which each third is missing."""
    labels = torch.arange(n) % 4 % 3
    features = noise(n, 5, seed=seed) + torch.eye(3, 5)[labels]
    return features, labels.where(torch.arange(n) % 3 > 0, -1)


TRAIN, TEST = problem(60, 1), problem(42, 2)
KEPT = tuple(part[TRAIN[1] >= 0] for part in TRAIN), tuple(part[TEST[1] >= 0] for part in TEST)

SCORES = {
    "knn": lambda train, test: knn_accuracy(*train, *test, ks=(1, 7, 100)),
    "linear": lambda train, test: (
        probe(
            *(train[0][:, None], None, train[1], test[0][:, None], None, test[1]),
            generator=seeded(),
            num_blocks=(1,),
            mean_patch=(False,),
            learning_rates=(0.1, 1.0),
            num_steps=20,
            batch_size=100,
        ).accuracies
    ),
    "logistic": lambda train, test: (
        logistic_regression(*train, *test, generator=seeded(), costs=(0.1, 1.0)).score
    ),
    "mahalanobis": lambda train, test: Mahalanobis.fit(*train).confidence(TEST[0]).tolist(),
    "matryoshka": lambda train, test: matryoshka_curve(
        train[0],
        test[0],
        score=lambda a, b: knn_accuracy(a, train[1], b, test[1], ks=(3,))[3],
        sizes=(2, 5),
    ),
}


@pytest.mark.filterwarnings("ignore:14 of 42")
@pytest.mark.parametrize("name", SCORES)
def test_scores_are_those_of_the_labelled_items(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = SCORES[name](*KEPT)
    with pytest.warns(UserWarning, match=r"20 of 60 items have no label .* left out") as said:
        assert SCORES[name](TRAIN, TEST) == expected
    of_test = [w for w in said if "14 of 42 items" in str(w.message)]
    assert bool(of_test) == (name != "mahalanobis")


@pytest.mark.parametrize(
    ("name", "side"), [*((name, 0) for name in SCORES), ("knn", 1), ("linear", 1), ("logistic", 1)]
)
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.full((60,), -1), "all 60 are -1"),
        (TRAIN[1].where(TRAIN[1] >= 0, -2), "hold -2: labels are classes"),
        (TRAIN[1].where(TRAIN[1] >= 0, 10**9), "hold 1000000000: labels are classes"),
        (TRAIN[1].double(), r"must be integers \[N\].* got torch.float64 \[60\]"),
    ],
)
def test_other_labels_are_refused_by_the_argument(name, labels, message, side):
    pair = [KEPT[0], KEPT[1]]
    features = TRAIN[0]
    pair[side] = (features, labels)
    argument = "labels" if name == "mahalanobis" else ("train_labels", "test_labels")[side]
    with pytest.raises(
        ValueError, match=f"^{argument} {message}|^{argument} hold no label: {message}"
    ):
        SCORES[name](*pair)


def test_rows_of_whatever_belongs_to_the_labels():
    labels = torch.tensor([2, -1, 0], dtype=torch.int16)
    x = noise(3, 2, 2)
    with pytest.warns(UserWarning, match=r"1 of 3 items have no label \(names are -1 there\)"):
        found, kept, nothing = with_labels(labels, x, None, name="names")
    assert (found.tolist(), found.dtype, nothing) == ([2, 0], torch.int64, None)
    assert torch.equal(kept, x[[0, 2]])
    assert labelled_rows(torch.tensor([True, False]), name="names") is None
    with pytest.raises(ValueError, match="names hold no label: there is no item"):
        labelled_rows(torch.zeros(0, dtype=torch.int64), name="names")


# --- few items ----------------------------------------------------------------------------------


def test_with_fewer_items_than_neighbours_all_vote():
    features, labels = torch.eye(3)[:, :2] + 0.1, torch.tensor([4, 9, 9])
    query = torch.tensor([[1.0, 0.3]])
    found = knn_predict(features, labels, query, ks=(1, 3, 20), num_neighbours=200)
    cosine = torch.nn.functional.cosine_similarity(query, features)
    weights = (cosine / 0.07).softmax(0)
    assert found[1].tolist() == [4]
    assert found[20].tolist() == found[3].tolist() == [4 if weights[0] > weights[1:].sum() else 9]
    assert knn_accuracy(features, labels, features, labels, ks=(200,))[200] >= 0


def test_labels_need_not_be_small():
    """Memory is for the classes that occur."""
    features, labels = noise(50, 4), MAX_CLASSES - 1 - torch.arange(50)
    found = knn_predict(features, labels, features.repeat(40, 1), ks=(1,))[1]
    assert torch.equal(found, labels.repeat(40))


def test_one_class_is_told():
    features, labels = noise(6, 4), torch.zeros(6, dtype=torch.int64)
    with pytest.warns(UserWarning, match="train_labels hold only the class 0: nothing else"):
        assert knn_accuracy(features, labels, features, labels, ks=(1,)) == {1: 1.0}
    with pytest.raises(Unsuitable, match="only the class 0"):
        logistic_regression(features, labels, features, labels, generator=seeded())


@pytest.mark.parametrize("seed", range(20))
def test_something_is_always_held_out(seed):
    labels = torch.tensor([0, 1, 1, 2])  # a tenth of four items is less than one
    out = held_out_part(labels, 0.1, generator=torch.Generator().manual_seed(seed))
    assert out.sum() == 1
    assert labels[out].item() == 1


def test_out_of_distribution_scores_of_few_images():
    train, test = noise(5, 32), noise(3, 32, seed=1)
    farthest = -torch.cdist(
        torch.nn.functional.normalize(test.double()), torch.nn.functional.normalize(train.double())
    ).amax(1)
    torch.testing.assert_close(knn_confidence(train, test), farthest, atol=1e-3, rtol=0)
    vim = ViM.fit(train, noise(2, 32), noise(2))
    assert vim.residual.shape == (32, 30)
    assert vim.confidence(test).isfinite().all()


def test_a_score_needs_an_item():
    with pytest.raises(ValueError, match="no test item to score"):
        Score.mean(torch.zeros(0))


def test_an_image_without_a_known_pixel_is_not_a_test_item():
    confusions = torch.tensor([[[3, 0], [0, 1]], [[0, 0], [0, 0]]])
    score = Score.of_confusion(confusions)
    assert (score.value, score.num_items) == (1.0, 1)


# --- subjects -----------------------------------------------------------------------------------


class PartlyLabelled(Scenes):
    """Scenes of which every third has no label."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image, label if index % 3 else -1


@pytest.fixture(scope="module")
def subject():
    size = (20, 32)
    return Subject(
        "micro",
        backbones.create("sslkit_vit_micro", img_size=16),
        {"train": PartlyLabelled(24, size=size), "test": PartlyLabelled(9, size=size, seed=1)},
        {"weights": "random", "data": "scenes"},
        global_size=16,
        dense_size=(16, 24),
    )


@pytest.mark.filterwarnings("ignore:.*items have no label")
def test_protocols_score_labelled_images_alone(subject):
    options = linear_probe.Options(num_steps=3, num_blocks=(1,))
    outcomes = [
        knn.evaluate(subject, knn.Options()),
        linear_probe.evaluate(subject, options),
        logistic.evaluate(subject, logistic.Options(max_iter=20)),
    ]
    assert {score.num_items for one in outcomes for score in one.scores.values()} == {6}
    assert list(outcomes[0].scores) == ["k=10", "k=16"]
    unlabelled = replace(subject, limits={"train": 1})  # image 0
    for module, chosen in (
        (knn, knn.Options()),
        (linear_probe, options),
        (logistic, logistic.Options()),
        (robustness, robustness.Options(num_steps=3)),
        (ood, ood.Options(near=("scenes",), num_steps=3)),
    ):
        with pytest.raises(Unsuitable, match="train data has no image with a label"):
            module.evaluate(unlabelled, chosen)


def test_selected_features_keep_their_patches(subject):
    images = [(torch.full((3, 8 + 4 * i, 8), 60 * i, dtype=torch.uint8), i - 1) for i in range(4)]
    features = extract(subject.encoder, images, transform=PaddedView((4, 4)))
    with pytest.warns(UserWarning, match="1 of 4 items"):
        kept = labelled(features, "test")
    assert kept.labels.tolist() == [0, 1, 2]
    assert kept.indices.tolist() == [1, 2, 3]
    for one, other in zip(kept.spatial("patches"), features.spatial("patches")[1:], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(kept.cls, features.cls[1:])

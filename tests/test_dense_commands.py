"""The commands of the dense protocols on a tiny subject: they score what their functions score."""

from dataclasses import replace

import pytest
import torch

from sslkit import RASAProjector, backbones
from sslkit.data.scenes import Scenes
from sslkit.evaluation.encoders import as_encoder
from sslkit.evaluation.feat2gs import read_pca_features
from sslkit.evaluation.floor import ColourAndPosition
from sslkit.evaluation.in_context import in_context_segmentation
from sslkit.evaluation.linear_segmentation import linear_segmentation as segment_linearly
from sslkit.evaluation.overclustering import matched_mean_iou
from sslkit.evaluation.overclustering import overclustering as overcluster
from sslkit.evaluation.position import position_probe
from sslkit.evaluation.protocols import (
    depth,
    feat2gs,
    in_context,
    linear_segmentation,
    overclustering,
    position,
)
from sslkit.evaluation.scores import bootstrap
from sslkit.evaluation.subject import Subject
from sslkit.evaluation.tokens import Unsuitable


class TwoDepths(Scenes):
    """Scenes of known depths, named by files."""

    def depth(self, index):
        """Objects at 1 m before a wall at 3 m; the first row is unknown."""
        depth = 3 - 2 * (self.mask(index) > 0).float()
        depth[0] = 0
        return depth

    def name(self, index):
        return f"folder/view_{index}.png"


@pytest.fixture(scope="module")
def subject():
    sources = {
        "train": TwoDepths(24, size=(20, 32)),
        "test": TwoDepths(9, size=(20, 32), seed=1),
    }
    encoder = backbones.create("sslkit_vit_micro", img_size=16)
    return Subject("micro", encoder, sources, {}, dense_size=(16, 24), batch_size=8)


@pytest.fixture(scope="module")
def floor(subject):
    return replace(subject, name="floor", encoder=as_encoder(ColourAndPosition(4), patch_size=4))


def interval_of(score):
    return bootstrap(score, num_resamples=20, generator=torch.Generator().manual_seed(0))


def masked(subject, source):
    features = subject.features(source, "patches", view="dense")
    return features.patches, subject.masks(source, features)


@pytest.mark.parametrize("quirks", [False, True])
def test_in_context(subject, quirks):
    outcome = in_context.evaluate(
        subject, in_context.Options(patches_per_image=5, reference_quirks=quirks, half=False)
    )
    names = subject.test.mask_class_names
    expected = in_context_segmentation(
        *masked(subject, "train"),
        *masked(subject, "test"),
        len(names),
        patches_per_image=5,
        generator=subject.generator(),
        reference_quirks=quirks,
    )
    assert outcome.scores["mIoU"].value == pytest.approx(expected.mean_iou)
    assert outcome.scores["mIoU"].num_items == 9
    assert outcome.details["memory patches"] == 24 * 5
    assert list(outcome.details["IoU"]) == list(names)
    assert outcome.figures["in_context"].axes
    interval = interval_of(outcome.scores["mIoU"])
    assert 0 <= interval.low < interval.high <= 1


def test_linear_segmentation_takes_the_best_rate(subject):
    options = linear_segmentation.Options(
        learning_rates=(1e-6, 0.3), size=(8, 12), epochs=3, batch_size=8
    )
    outcome = linear_segmentation.evaluate(subject, options)
    rates = outcome.details["mIoU by learning rate"]
    assert outcome.scores["mIoU"].value == pytest.approx(max(rates.values()))
    assert outcome.details["learning rate"] == float(max(rates, key=rates.get))
    expected = segment_linearly(
        *masked(subject, "train"),
        *masked(subject, "test"),
        len(subject.test.mask_class_names),
        size=(8, 12),
        lr=0.3,
        epochs=3,
        batch_size=8,
        generator=subject.generator(),
    )
    assert rates["0.3"] == pytest.approx(expected.mean_iou)
    assert interval_of(outcome.scores["mIoU"]).high <= 1


def test_overclustering(floor):
    names = floor.test.mask_class_names
    options = overclustering.Options(num_clusters=(30, 0, 10**6), seeds=(3, 4), size=(16, 24))
    outcome = overclustering.evaluate(floor, options)
    assert list(outcome.scores) == ["K=30", f"K={len(names)}"]
    patches, masks = masked(floor, "test")
    expected = overcluster(patches, masks, len(names), num_clusters=30, seeds=(3, 4), size=None)
    assert outcome.scores["K=30"].value == pytest.approx(expected.mean_iou)
    assert list(outcome.details["mIoU by seed"]["K=30"].values()) == pytest.approx(
        expected.mean_ious
    )
    # A resample is what the images so often would score, their clusters named anew.
    counts = torch.tensor([0.0, 2, 1, 1, 0, 3, 1, 1, 0], dtype=torch.float64)
    totals = (expected.counts * counts[:, None, None]).sum(1)
    again = sum(map(matched_mean_iou, totals)) / 2
    assert outcome.scores["K=30"].resampled(counts) == pytest.approx(again)
    with pytest.raises(ValueError, match=r"num_clusters=\(1000000,\) are all more"):
        overclustering.evaluate(floor, overclustering.Options(num_clusters=(10**6,)))


def test_depth(subject, floor):
    options = depth.Options(num_layers=2, epochs=2, max_depth=2.5)
    outcome = depth.evaluate(subject, options)
    assert outcome.details["layers"] == 2
    errors = {name: score.value for name, score in outcome.scores.items()}
    assert list(errors) == [
        "RMSE, scale and shift aligned (m)",
        "RMSE (m)",
        "absolute relative error",
        "within 1.25",
    ]
    # The wall is beyond max_depth: what is known is 1 m everywhere, and no shape is left.
    assert errors["RMSE, scale and shift aligned (m)"] == pytest.approx(0, abs=1e-6)
    assert errors["RMSE (m)"] > 0.01
    whole = depth.evaluate(floor, replace(options, max_depth=10.0))
    assert whole.details["layers"] == 1
    assert whole.scores["RMSE, scale and shift aligned (m)"].value > 0.2
    assert not whole.scores["RMSE (m)"].higher_is_better
    assert depth.evaluate(replace(subject, nesting=8), options).details["layers"] == 1


@pytest.mark.parametrize(
    ("module", "annotation"),
    [
        (depth, "depth"),
        (in_context, "mask"),
        (linear_segmentation, "mask"),
        (overclustering, "mask"),
    ],
)
def test_what_lacks_annotations_is_refused_before_any_extraction(module, annotation, tmp_path):
    pictures = [(torch.zeros(3, 16, 16, dtype=torch.uint8), 0)]
    subject = Subject(
        "none", torch.nn.Identity(), {"train": pictures, "test": pictures}, {}, cache=tmp_path
    )
    with pytest.raises(Unsuitable, match=rf"data \(list\) has no {annotation}"):
        module.evaluate(subject, module.Options())
    assert not list(tmp_path.iterdir())


def test_position_before_and_after_rasa(floor, monkeypatch):
    monkeypatch.setattr("sslkit.evaluation.position._NUM_STEPS", 30)
    basis = torch.zeros(2, 5)
    basis[0, 3] = basis[1, 4] = 1  # the row and the column
    rasa = RASAProjector(5, num_iterations=1)
    rasa.basis.copy_(basis)
    outcome = position.evaluate(replace(floor, rasa=rasa), position.Options(hidden_dim=0))
    assert list(outcome.scores) == ["linear R²", "before RASA: linear R²"]
    after, before = (score.value for score in outcome.scores.values())
    assert before == pytest.approx(1, abs=1e-5)
    assert after < 0.5
    plain = position.evaluate(floor, position.Options(hidden_dim=8))
    assert list(plain.scores) == ["linear R²", "two layers R²"]
    assert plain.scores["linear R²"].num_items == 9
    train, test = (masked(floor, name)[0] for name in ("train", "test"))
    expected = position_probe(train, test)
    assert plain.scores["linear R²"].value == pytest.approx(expected.r2)


def test_feat2gs_writes_the_views(subject, tmp_path):
    options = feat2gs.Options(features=tmp_path / "scene", dim=32)
    outcome = feat2gs.evaluate(subject, options)
    assert outcome.scores["variance kept"].value == pytest.approx(1)
    found = read_pca_features(tmp_path / "scene")
    assert list(found) == [f"view_{i}" for i in range(9)]
    assert found["view_3"].shape == (4, 6, 32)
    half = feat2gs.evaluate(subject, replace(options, dim=8)).scores["variance kept"].value
    assert 0.1 < half < 1

"""Linear segmentation: its training step against the formula, and planted classes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sslkit.evaluation.linear_segmentation import (
    _upsampled_scores,
    fit_linear_segmentation,
    linear_segmentation,
)
from sslkit.evaluation.segmentation import predicted_masks, resize_masks
from tests.test_in_context import blocks, codes_of, noise, seeded


def test_layer_before_resizing_is_layer_after_resizing():
    linear = torch.nn.Linear(6, 3).double()
    patches = noise(2, 3, 5, 6).double()
    resized = F.interpolate(patches.movedim(-1, 1), (7, 8), mode="bilinear").movedim(1, -1)
    expected = linear(resized).movedim(-1, 1)
    torch.testing.assert_close(_upsampled_scores(linear, patches, (7, 8)), expected)


def by_hand(patches, masks, num_classes, *, lr, epochs, drop_epoch, batch_size, generator):
    """The same training with features resized first, gradients written out, in float64."""
    B, D = len(patches), patches.shape[-1]
    bound = D**-0.5
    parameters = []
    for shape in ((num_classes, D), (num_classes,)):
        parameters.append(torch.empty(shape).uniform_(-bound, bound, generator=generator).double())
    weight, bias = parameters
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    size = tuple(masks.shape[1:])
    x = F.interpolate(patches.movedim(-1, 1).double(), size, mode="bilinear").movedim(1, -1)
    for epoch in range(epochs):
        rate = lr if epoch < drop_epoch else lr * 0.1
        for chosen in torch.randperm(B, generator=generator).split(batch_size):
            pixels, truth = x[chosen].flatten(0, 2), masks[chosen].flatten()
            pixels, truth = pixels[truth != 255], truth[truth != 255]
            error = (pixels @ weight.T + bias).softmax(1)
            error[range(len(truth)), truth] -= 1
            gradients = error.T @ pixels / len(truth), error.mean(0)
            for p, g, v in zip((weight, bias), gradients, velocity, strict=True):
                v.mul_(0.9).add_(g + 1e-4 * p)
                p.sub_(rate * v)
    return weight, bias


def test_training_is_that_of_the_formula():
    patches, masks = noise(7, 2, 3, 4), blocks(7, (2, 3), 3)
    masks[0, :3] = 255
    settings = {"lr": 0.5, "epochs": 4, "drop_epoch": 2, "batch_size": 3}
    linear = fit_linear_segmentation(patches, masks, 3, size=None, generator=seeded(3), **settings)
    weight, bias = by_hand(patches, masks, 3, generator=seeded(3), **settings)
    torch.testing.assert_close(linear.weight, weight.float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(linear.bias, bias.float(), atol=1e-5, rtol=1e-4)
    halves = fit_linear_segmentation(
        patches.half(), masks, 3, size=None, generator=seeded(3), **settings
    )
    torch.testing.assert_close(linear.weight, halves.weight, atol=5e-3, rtol=0)


def test_planted_classes_are_found_and_noise_is_not():
    train, test = blocks(20, (4, 6), 5), blocks(6, (4, 6), 5, seed=1)
    arguments = {"size": (24, 36), "lr": 0.3, "batch_size": 5}
    features = codes_of(test, seed=1)
    test[0, :3] = 255
    found = linear_segmentation(
        codes_of(train), train, features, test, 5, generator=seeded(), **arguments
    )
    assert found.predictions.shape == test.shape
    known = test[:, 1::4, 1::4] != 255
    right = found.predictions[:, 1::4, 1::4] == test[:, 1::4, 1::4]
    assert right[known].float().mean() > 0.97
    assert found.mean_iou > 0.7
    assert found.mean_iou == pytest.approx(found.iou.mean().item())
    assert found.confusions.shape == (6, 5, 5)
    assert found.confusions[0].sum() == 13 * 24
    chance = linear_segmentation(
        noise(20, 4, 6, 16),
        train,
        noise(6, 4, 6, 16, seed=1),
        test,
        5,
        generator=seeded(),
        **arguments,
    )
    assert chance.mean_iou < 0.2


def test_memory_mapped_halves(tmp_path):
    masks = blocks(8, (2, 3), 2)
    array = codes_of(masks).half().numpy()
    np.save(tmp_path / "patches.npy", array)
    mapped = torch.from_numpy(np.load(tmp_path / "patches.npy", mmap_mode="c"))
    arguments = {"size": None, "lr": 0.3, "epochs": 5, "batch_size": 4}
    first, second = (
        linear_segmentation(x, masks, x, masks, 2, generator=seeded(), **arguments)
        for x in (mapped, torch.from_numpy(array))
    )
    assert torch.equal(first.confusions, second.confusions)
    other = linear_segmentation(mapped, masks, mapped, masks, 2, generator=seeded(), **arguments)
    assert torch.equal(other.predictions, first.predictions)


@pytest.mark.filterwarnings("ignore:.*_masks have no pixel of 1 of the")
def test_reference_quirks():
    patches, masks = noise(5, 2, 3, 4), blocks(5, (2, 3), 2)
    settings = {"size": (5, 7), "lr": 0.1, "epochs": 1, "batch_size": 3}
    quirky = linear_segmentation(
        patches, masks, patches, masks, 3, generator=seeded(), reference_quirks=True, **settings
    )
    # One whole batch of 3: the other two images are never seen.
    order = torch.randperm(5, generator=drawn(4 * 3 + 3))
    linear = fit_linear_segmentation(
        patches, masks, 3, generator=seeded(), reference_quirks=True, **settings
    )
    changed = masks.clone()
    changed[order[3:]] = 0
    again = fit_linear_segmentation(
        patches, changed, 3, generator=seeded(), reference_quirks=True, **settings
    )
    assert torch.equal(linear.weight, again.weight)
    # Scored at 5 × 7, of masks resized by their corners; class 2, absent, counts as 0.
    assert quirky.predictions.shape == (5, 5, 7)
    truth = resize_masks(masks, (5, 7), mode="nearest")
    predicted = predicted_masks(linear(patches), (5, 7))
    assert torch.equal(quirky.predictions, predicted)
    per_class = []
    for c in range(3):
        t, p = truth == c, predicted == c
        per_class.append((t & p).sum() / (t | p).sum().clamp(min=1))
    assert quirky.mean_iou == pytest.approx(torch.stack(per_class).mean().item(), abs=1e-6)


@pytest.mark.filterwarnings("ignore:.*_masks have no pixel of 1 of the")
@pytest.mark.parametrize(("reference_quirks", "score"), [(False, 1.0), (True, 2 / 3)])
def test_a_class_that_is_nowhere(reference_quirks, score):
    masks = blocks(8, (2, 3), 2, patch=1)
    patches = F.one_hot(masks, 2).float()
    found = linear_segmentation(
        patches,
        masks,
        patches,
        masks,
        3,
        size=(2, 3),
        lr=1.0,
        batch_size=4,
        generator=seeded(),
        reference_quirks=reference_quirks,
    )
    assert found.mean_iou == pytest.approx(score)


def drawn(count):
    """The generator with seed 0 after the initial weights and biases."""
    generator = seeded()
    torch.empty(count).uniform_(generator=generator)
    return generator


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masks": torch.zeros(3, 4, 6).long()}, "2 images of patches but 3 masks to train on"),
        ({"epochs": 0}, "batch_size and epochs must be at least 1, got 60, 0"),
        ({"masks": torch.full((2, 4, 6), 7)}, "masks hold class 7, but num_classes=2"),
        ({"masks": torch.full((2, 4, 6), -1)}, "masks hold class -1, but num_classes=2"),
        ({"masks": torch.full((2, 4, 6), 255)}, "masks hold 255 only"),
    ],
)
def test_refused(changes, message):
    arguments = {"patches": noise(2, 2, 3, 4), "masks": torch.zeros(2, 4, 6).long()}
    with pytest.raises(ValueError, match=message):
        fit_linear_segmentation(**{**arguments, "num_classes": 2, "generator": seeded(), **changes})


def test_as_many_test_masks_as_images():
    patches, masks = noise(2, 2, 3, 4), torch.zeros(2, 4, 6).long()
    with pytest.raises(ValueError, match="2 images of patches but 1 masks to test"):
        linear_segmentation(patches, masks, patches, masks[:1], 1, generator=seeded())

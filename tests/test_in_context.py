"""In-context segmentation, step by step against loops, and as a whole on planted classes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from sslkit.evaluation.in_context import (
    Memory,
    build_memory,
    in_context_segmentation,
    patch_class_frequencies,
    segment,
)
from sslkit.testing.references import dense as dense_oracle
from sslkit.testing.references import evaluation as oracle
from tests.noise import noise, seeded


def random_masks(batch, size, num_classes, *, ignored=0.2, seed=0):
    generator = seeded(seed)
    masks = torch.randint(num_classes, (batch, *size), generator=generator)
    masks[torch.rand(masks.shape, generator=generator) < ignored] = 255
    return masks


def blocks(batch, grid, num_classes, *, patch=4, seed=0):
    """Masks [B, h, w] that have one class a patch."""
    classes = torch.randint(num_classes, (batch, *grid), generator=seeded(seed))
    return classes.repeat_interleave(patch, 1).repeat_interleave(patch, 2)


def codes_of(masks, patch=4, *, dim=16, spread=0.3, seed=0):
    """Features of one-class patches: a direction for each class, with noise."""
    ids = masks[:, ::patch, ::patch].clamp(max=8)
    return noise(9, dim)[ids] + spread * noise(*ids.shape, dim, seed=seed)


@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    patch=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    num_classes=st.integers(1, 4),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_frequencies_are_those_of_the_loop(grid, patch, num_classes, ignored, seed):
    size = grid[0] * patch[0], grid[1] * patch[1]
    masks = random_masks(2, size, num_classes, ignored=ignored, seed=seed)
    found = patch_class_frequencies(masks, grid, num_classes)
    assert found.dtype == torch.float32
    for mask, frequencies in zip(masks.tolist(), found, strict=True):
        expected = torch.tensor(oracle.patch_frequencies(mask, grid, num_classes))
        torch.testing.assert_close(frequencies, expected.float())


@pytest.mark.parametrize(("grid", "size"), [((2, 3), (5, 7)), ((3, 2), (4, 8))])
def test_segmentation_is_that_of_the_loop(grid, size):
    memory = Memory(noise(20, 4), noise(20, 3, seed=1).softmax(-1))
    patches = noise(2, *grid, 4, seed=2)
    found = segment(memory, patches, size, num_neighbours=6, temperature=0.1, chunk_size=4)
    assert (found.shape, found.dtype) == ((2, *size), torch.uint8)
    for image, classes in zip(patches.tolist(), found, strict=True):
        scores = [
            [
                oracle.in_context_scores(
                    memory.keys.tolist(), memory.labels.tolist(), x, k=6, temperature=0.1
                )
                for x in row
            ]
            for row in image
        ]
        maps = [
            oracle.bilinear([[cell[c] for cell in row] for row in scores], size) for c in range(3)
        ]
        assert torch.equal(classes.long(), torch.tensor(maps).argmax(0))


def test_memory_holds_every_labelled_patch():
    masks = random_masks(3, (4, 6), 3)
    masks[1, :2, :2] = 255
    patches = noise(3, 2, 3, 5)
    memory = build_memory(patches, masks, 3)
    frequencies = patch_class_frequencies(masks, (2, 3), 3).flatten(0, 2)
    known = frequencies.sum(-1) > 0
    assert known.sum() == len(memory) == 17
    assert torch.equal(memory.keys, patches.flatten(0, 2)[known])
    assert torch.equal(memory.labels, frequencies[known])


def test_memory_keeps_few_patches_of_an_image_rare_classes_first():
    masks = torch.zeros(200, 4, 16, dtype=torch.long)
    masks[:, :, 4:8] = 1  # one patch of class 1, three of class 0
    patches = noise(200, 1, 4, 2)
    memory = build_memory(patches, masks, 2, patches_per_image=1, generator=seeded())
    assert len(memory) == 200
    rare = memory.labels[:, 1].mean().item()
    # P(u < min of 3 (3 v_i)) = integral over u in 0..1 of (1 - u / 3)^3 = 0.6018...
    assert rare == pytest.approx(3 / 4 * (1 - (2 / 3) ** 4), abs=4 * (0.24 / 200) ** 0.5)
    again = build_memory(patches, masks, 2, patches_per_image=1, generator=seeded())
    assert torch.equal(again.keys, memory.keys)


@pytest.mark.parametrize(("limit", "expected"), [(1, 2), (3, 5), (100, 8)])
def test_memory_of_images_with_few_labelled_patches(limit, expected):
    masks = torch.zeros(2, 2, 6, dtype=torch.long)
    masks[1, :, 2:] = 255  # of the second image's 6 patches, 2 are labelled
    memory = build_memory(noise(2, 2, 3, 4), masks, 1, patches_per_image=limit, generator=seeded())
    frequencies = patch_class_frequencies(masks, (2, 3), 1).flatten(0, 2).sum()
    assert frequencies == 8
    assert len(memory) == expected
    assert (memory.labels.sum(-1) == 1).all()


@pytest.mark.parametrize("patches_per_image", [None, 3])
def test_memory_in_half_precision(patches_per_image, monkeypatch):
    monkeypatch.setattr("sslkit.evaluation.in_context._IMAGES_AT_ONCE", 2)
    masks, patches = random_masks(5, (4, 6), 3), 1000 * noise(5, 2, 3, 16)
    masks[2] = 255  # an image without a label
    arguments = {"patches_per_image": patches_per_image}
    whole, half = (
        build_memory(patches, masks, 3, dtype=dtype, generator=seeded(), **arguments)
        for dtype in (None, torch.float16)
    )
    assert half.keys.dtype == half.labels.dtype == torch.float16
    expected = F.normalize(whole.keys, dim=1)
    torch.testing.assert_close(half.keys.float(), expected, atol=3e-4, rtol=0)
    torch.testing.assert_close(half.labels.float(), whole.labels, atol=3e-4, rtol=0)
    queries = noise(3, 2, 3, 16, seed=3)
    first, second = (segment(m, queries, (4, 6), temperature=0.2) for m in (whole, half))
    assert (first == second).float().mean() > 0.98


def test_confusions_are_of_each_image():
    train, test = random_masks(4, (4, 6), 3), random_masks(3, (4, 6), 3, seed=1)
    for quirks in (False, True):
        found = in_context_segmentation(
            noise(4, 2, 3, 5), train, noise(3, 2, 3, 5, seed=1), test, 3, reference_quirks=quirks
        )
        assert found.confusions.shape == (3, 3, 3)
        truth = torch.stack([torch.bincount(m[m < 3], minlength=3) for m in test])
        assert torch.equal(found.confusions.sum(2), truth)
        total = found.confusions.sum(0).double()
        union = total.sum(0) + total.sum(1) - total.diagonal()
        torch.testing.assert_close(found.iou, total.diagonal() / union)


def test_reference_quirks_match_classes_over_all_images_at_once():
    train, test = random_masks(4, (4, 6), 4, ignored=0), random_masks(3, (4, 6), 4, seed=1)
    clean, quirky = (
        in_context_segmentation(
            noise(4, 2, 3, 5), train, noise(3, 2, 3, 5, seed=1), test, 4, reference_quirks=quirks
        )
        for quirks in (False, True)
    )
    best = dense_oracle.best_permutation(clean.confusions.sum(0).tolist())
    assert quirky.mean_iou == pytest.approx(best)
    assert best > clean.mean_iou + 0.01


@pytest.mark.parametrize("patches_per_image", [None, 8])
def test_planted_classes_are_found_and_noise_is_not(patches_per_image):
    train, test = blocks(12, (4, 6), 5), blocks(6, (4, 6), 5, seed=1)
    found = in_context_segmentation(
        codes_of(train),
        train,
        codes_of(test, seed=1),
        test,
        5,
        num_neighbours=8,
        patches_per_image=patches_per_image,
        generator=seeded(),
    )
    assert found.memory_size == 12 * (patches_per_image or 24)
    assert found.predictions.shape == test.shape
    centres = found.predictions[:, 1::4, 1::4] == test[:, 1::4, 1::4]
    assert centres.float().mean() > 0.99  # between patches, bilinear scores round the corners
    assert found.mean_iou == pytest.approx(found.iou.mean().item())
    assert found.mean_iou > 0.75
    chance = in_context_segmentation(noise(12, 4, 6, 16), train, noise(6, 4, 6, 16), test, 5)
    assert chance.mean_iou < 0.2


def test_ignored_pixels_are_not_scored():
    train, test = blocks(4, (3, 5), 2), blocks(3, (3, 5), 2, seed=1)
    features = codes_of(test, spread=0)
    scored = test.clone()
    scored[:, :, 6:] = 255
    whole, part = (
        in_context_segmentation(codes_of(train, spread=0), train, features, masks, 2)
        for masks in (test, scored)
    )
    assert torch.equal(whole.predictions, part.predictions)
    confusion = oracle.confusion(scored.flatten().tolist(), part.predictions.flatten().tolist(), 2)
    assert sum(map(sum, confusion)) == 3 * 12 * 6
    expected = [
        confusion[c][c] / (sum(confusion[c]) + sum(row[c] for row in confusion) - confusion[c][c])
        for c in range(2)
    ]
    assert part.iou.tolist() == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:.*_masks have no pixel of 1 of the")
def test_reference_quirks():
    masks = torch.tensor([[[0, 0, 1, 1]]])
    features = F.one_hot(1 - masks, 2).float()  # the test images' codes are swapped
    settings = {"num_neighbours": 2, "temperature": 0.02}
    arguments = F.one_hot(masks, 2).float(), masks, features, masks, 3
    clean = in_context_segmentation(*arguments, **settings)
    quirky = in_context_segmentation(*arguments, **settings, reference_quirks=True)
    assert (clean.mean_iou, clean.iou.tolist()[:2]) == (0, [0, 0])
    # Matching swaps the classes back; class 2, in neither masks nor predictions, counts as 0.
    assert quirky.mean_iou == pytest.approx(2 / 3)
    assert torch.equal(clean.predictions, quirky.predictions)


@pytest.mark.filterwarnings("ignore:train_masks have no pixel of 1 of the")
def test_reference_quirks_take_ignored_pixels_for_background():
    train = torch.tensor([[[255, 1]]])
    test = torch.tensor([[[0, 1]]])
    features = torch.eye(2).view(1, 1, 2, 2)
    clean, quirky = (
        in_context_segmentation(features, train, features, test, 2, reference_quirks=quirks)
        for quirks in (False, True)
    )
    assert (clean.memory_size, clean.predictions.tolist()) == (1, [[[1, 1]]])
    assert (quirky.memory_size, quirky.predictions.tolist()) == (2, [[[0, 1]]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: patch_class_frequencies(torch.zeros(1, 5, 6), (2, 3), 1),
            "5 by 6 pixels, which the patch grid 2 by 3 does not divide",
        ),
        (
            lambda: patch_class_frequencies(torch.full((1, 2, 3), 4), (2, 3), 3),
            "masks hold class 4, but num_classes=3",
        ),
        (
            lambda: build_memory(noise(2, 2, 3, 4), torch.zeros(3, 4, 6), 1),
            "2 images of patches but 3 masks",
        ),
        (
            lambda: build_memory(
                noise(1, 2, 3, 4), torch.zeros(1, 2, 3).long(), 1, patches_per_image=2
            ),
            "generator is needed",
        ),
        (
            lambda: build_memory(
                noise(1, 2, 3, 4),
                torch.zeros(1, 2, 3).long(),
                1,
                patches_per_image=0,
                generator=seeded(),
            ),
            "patches_per_image must be at least 1, got 0",
        ),
        (
            lambda: build_memory(noise(1, 2, 3, 4), torch.full((1, 2, 3), 255), 1),
            "the memory is empty: every pixel of the masks is 255",
        ),
        (
            lambda: in_context_segmentation(
                noise(1, 1, 1, 2),
                torch.zeros(1, 2, 2).long(),
                noise(2, 1, 1, 2),
                torch.zeros(3, 2, 2).long(),
                1,
            ),
            "2 images of patches but 3 masks to test",
        ),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

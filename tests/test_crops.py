"""Views: what is drawn against torchvision's classes, what is rendered against its functions."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as vision
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import ColorJitter, RandomResizedCrop

from sslkit.data.crops import MultiCrop, View
from sslkit.data.normalisation import IMAGENET_MEAN, IMAGENET_STD

PLAIN = View((0, 0, 1, 1), False, None, (0, 1, 2, 3), False, None, False)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_image(height=40, width=56, channels=3, seed=0):
    shape = (channels, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded(seed))


def draw_many(crops, height, width, count):
    generator = seeded(0)
    return [crops.draw(height, width, generator=generator) for _ in range(count)]


# --- drawing -------------------------------------------------------------------------------------


def quantiles(values):
    levels = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    return torch.quantile(torch.tensor(values, dtype=torch.float64), levels)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (64, 64), (40, 400)])
@pytest.mark.parametrize("which", ["global", "local"])
def test_boxes_are_distributed_as_torchvisions(height, width, which):
    count = 3000
    crops = MultiCrop(num_global=2, num_local=2)
    views = draw_many(crops, height, width, count // 2)
    boxes = [view.box for row in views for view in (row[:2] if which == "global" else row[2:])]
    torch.manual_seed(0)
    scale = crops.global_scale if which == "global" else crops.local_scale
    image = torch.empty(3, height, width)
    theirs = [RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(count)]
    for axis, extent in enumerate((height, width, height, width)):
        ours_axis, theirs_axis = ([box[axis] for box in side] for side in (boxes, theirs))
        # 3000 draws each: the standard error of a quantile is below 1.5 % of the extent here.
        error = (quantiles(ours_axis) - quantiles(theirs_axis)).abs().max() / extent
        assert error < 0.05, (axis, error)
    assert all(
        top >= 0 and left >= 0 and h > 0 and w > 0 and top + h <= height and left + w <= width
        for top, left, h, w in boxes
    )


def test_jitter_is_distributed_as_torchvisions():
    crops = MultiCrop(num_local=0, jitter_probability=1.0)
    views = [view for row in draw_many(crops, 32, 32, 1500) for view in row]
    torch.manual_seed(0)
    ranges = ((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1))
    reference = ColorJitter(0.4, 0.4, 0.2, 0.1)
    assert [
        tuple(round(bound, 6) for bound in getattr(reference, name))
        for name in ("brightness", "contrast", "saturation", "hue")
    ] == list(ranges)
    theirs = [ColorJitter.get_params(*(list(r) for r in ranges)) for _ in range(3000)]
    for i, (low, high) in enumerate(ranges):
        ours_i, theirs_i = [view.jitter[i] for view in views], [row[i + 1] for row in theirs]
        assert low <= min(ours_i) <= max(ours_i) <= high
        error = (quantiles(ours_i) - quantiles(theirs_i)).abs().max() / (high - low)
        assert error < 0.05
    orders = [view.jitter_order for view in views]
    counts = np.array([orders.count(order) for order in sorted(set(orders))])
    assert len(counts) == math.factorial(4)
    chi_square = ((counts - 125) ** 2 / 125).sum()
    assert chi_square < 49.7  # 23 degrees of freedom, p = 0.001


def test_probabilities_by_kind_of_view():
    rows = draw_many(MultiCrop(num_global=3, num_local=2), 48, 48, 2000)
    # One row a kind of choice: its probability in (first global, other globals, locals).
    expected = {
        "flip": (0.5, 0.5, 0.5),
        "jitter": (0.8, 0.8, 0.8),
        "grey": (0.2, 0.2, 0.2),
        "blur": (1.0, 0.1, 0.5),
        "solarise": (0.0, 0.2, 0.0),
    }
    for i, kind in enumerate((0, 1, 1, 2, 2)):
        views = [row[i] for row in rows]
        found = {
            "flip": [view.flip for view in views],
            "jitter": [view.jitter is not None for view in views],
            "grey": [view.grey for view in views],
            "blur": [view.blur_sigma is not None for view in views],
            "solarise": [view.solarise for view in views],
        }
        for name, outcomes in found.items():
            share, p = np.mean(outcomes), expected[name][kind]
            assert abs(share - p) <= 3.5 * math.sqrt(p * (1 - p) / len(views)), (i, name, share)


def test_blur_sigma_is_uniform():
    rows = draw_many(MultiCrop(num_local=0), 48, 48, 2000)
    sigmas = torch.tensor([row[0].blur_sigma for row in rows], dtype=torch.float64)
    assert 0.1 <= sigmas.min() < 0.12
    assert 1.98 < sigmas.max() <= 2.0
    uniform = 0.1 + 1.9 * torch.linspace(0.05, 0.95, 19)
    assert (quantiles(sigmas.tolist()) - uniform).abs().max() < 0.1


def test_choices_of_one_view_are_independent():
    views = [row[1] for row in draw_many(MultiCrop(num_local=0), 64, 64, 4000)]
    choices = {
        "flip": [view.flip for view in views],
        "jitter": [view.jitter is not None for view in views],
        "grey": [view.grey for view in views],
        "blur": [view.blur_sigma is not None for view in views],
        "solarise": [view.solarise for view in views],
        "top": [(view.box[0] + 0.5) / (65 - view.box[2]) for view in views],
        "area": [view.box[2] * view.box[3] for view in views],
    }
    correlation = np.corrcoef(np.array(list(choices.values()), dtype=float)) - np.eye(len(choices))
    assert np.abs(correlation).max() < 0.06  # the standard error is 0.016


@pytest.mark.parametrize(("size", "ratio"), [((64, 32), 0.5), ((32, 64), 2.0)])
def test_boxes_follow_the_ratio_of_the_view(size, ratio):
    crops = MultiCrop(global_size=size, global_scale=(0.1, 0.2), num_local=0)
    ratios = [view.box[3] / view.box[2] for row in draw_many(crops, 400, 400, 200) for view in row]
    assert 0.74 * ratio < min(ratios) < 0.85 * ratio
    assert 1.2 * ratio < max(ratios) < 1.35 * ratio


@given(height=st.integers(1, 40), width=st.integers(1, 3000), seed=st.integers(0, 99))
def test_boxes_lie_in_any_image(height, width, seed):
    crops = MultiCrop(global_size=(32, 16), local_size=8)
    for view in crops.draw(height, width, generator=seeded(seed)):
        top, left, box_height, box_width = view.box
        assert 0 <= top < top + box_height <= height
        assert 0 <= left < left + box_width <= width


# --- rendering -----------------------------------------------------------------------------------


def test_render_is_torchvisions_operations_in_dinos_order():
    image = random_image()
    view = View((3, 5, 30, 40), True, (1.3, 0.7, 1.1, -0.08), (2, 0, 3, 1), False, 1.2, True)
    x = vision.resized_crop(image, 3, 5, 30, 40, [24, 28], vision.InterpolationMode.BICUBIC, True)
    x = vision.horizontal_flip(x).float() / 255
    x = vision.adjust_saturation(x, 1.1)
    x = vision.adjust_brightness(x, 1.3)
    x = vision.adjust_hue(x, -0.08)
    x = vision.adjust_contrast(x, 0.7)
    x = vision.gaussian_blur(x, [3, 3], [1.2, 1.2])
    expected = vision.solarize(x, 128 / 255)
    result = MultiCrop().render(image, view, (24, 28)) / 255
    # A value within rounding of the threshold may fall on either side of it.
    close = (result - expected).abs() < 1e-4
    assert close.float().mean() > 0.999


def test_grey_comes_before_blur_and_solarising():
    view = PLAIN._replace(box=(0, 0, 40, 56), grey=True, blur_sigma=1.0, solarise=True)
    result = MultiCrop().render(random_image(), view, (40, 56))
    assert torch.equal(result[0], result[1])
    assert torch.equal(result[0], result[2])


def test_output_is_the_normalised_render():
    crops = MultiCrop(global_size=32, local_size=(12, 16), num_local=3)
    image = random_image()
    result = crops(image, generator=seeded(3))
    views = crops.draw(40, 56, generator=seeded(3))
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (IMAGENET_MEAN, IMAGENET_STD))
    for i, view in enumerate(views):
        got = result.globals_[i] if i < 2 else result.locals_[i - 2]
        size = 32 if i < 2 else (12, 16)
        expected = (crops.render(image, view, size) / 255 - mean) / std
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert result.globals_.dtype == torch.float32


def test_source_image_is_not_changed():
    image = random_image(32, 32)
    before = image.clone()
    crops = MultiCrop(global_size=32, global_scale=(1, 1), num_local=0, aspect_ratio=(1, 1))
    crops(image, generator=seeded(0))
    assert torch.equal(image, before)


@pytest.mark.parametrize("channels", [1, 3, 4, 13])
def test_any_number_of_channels(channels):
    crops = MultiCrop(global_size=24, local_size=10, num_local=3)
    result = crops(random_image(channels=channels), generator=seeded(0))
    assert result.globals_.shape == (2, channels, 24, 24)
    assert result.locals_.shape == (3, channels, 10, 10)
    assert result.globals_.isfinite().all()


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 2000), (700, 3)])
def test_extreme_images(size):
    crops = MultiCrop(global_size=24, local_size=10, num_local=2)
    result = crops(random_image(*size), generator=seeded(0))
    assert result.globals_.isfinite().all()
    assert result.locals_.isfinite().all()


def test_views_are_a_function_of_the_generator():
    crops = MultiCrop(global_size=24, local_size=10, num_local=2)
    image = random_image()
    torch.manual_seed(0)
    first = crops(image, generator=seeded(1))
    torch.manual_seed(1)
    again, other = crops(image, generator=seeded(1)), crops(image, generator=seeded(2))
    assert torch.equal(first.globals_, again.globals_)
    assert torch.equal(first.locals_, again.locals_)
    assert not torch.equal(first.globals_, other.globals_)


def test_memory_layout_does_not_matter():
    crops = MultiCrop(global_size=24, local_size=10, num_local=2)
    image = random_image()
    channels_last = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    results = [crops(each, generator=seeded(1)).globals_ for each in (image, channels_last)]
    torch.testing.assert_close(*results, atol=0.02, rtol=0)  # one level of 255 in the resizing


def test_views_do_not_depend_on_the_number_of_threads():
    crops = MultiCrop(global_size=300, num_local=0, jitter_probability=1.0)
    image = random_image(330, 350)
    results = []
    try:
        for num_threads in (1, 4):
            torch.set_num_threads(num_threads)
            views = [crops(image, generator=seeded(seed)).globals_ for seed in range(6)]
            results.append(torch.stack(views))
    finally:
        torch.set_num_threads(1)
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("side", "expected"), [(16, 3), (32, 3), (49, 3), (64, 5), (89, 7), (90, 9), (98, 9), (224, 9)]
)
def test_blur_kernel_follows_the_view(side, expected):
    image = torch.zeros(1, side, side, dtype=torch.uint8)
    image[0, side // 2, side // 2] = 255
    view = PLAIN._replace(box=(0, 0, side, side), blur_sigma=2.0)
    spread = (MultiCrop().render(image, view, side) > 0).any(dim=1).sum()
    assert spread == expected
    spread = (MultiCrop(blur_kernel_size=11).render(image, view, side) > 0).any(dim=1).sum()
    assert spread == 11


def test_published_constants():
    crops = MultiCrop()
    assert (crops.global_size, crops.global_scale, crops.num_global) == (224, (0.32, 1.0), 2)
    assert (crops.local_size, crops.local_scale, crops.num_local) == (98, (0.05, 0.32), 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_global": 0}, "num_global must be at least 1"),
        ({"global_scale": (0.5, 1.2)}, "global_scale must satisfy 0 < low <= high <= 1"),
        ({"local_scale": (0.5, 0.2)}, "local_scale must satisfy"),
        ({"blur_sigma": (0, 1)}, "blur_sigma must satisfy"),
        ({"grey_probability": 1.5}, "grey_probability must lie in 0..1"),
        ({"blur_probability": (1, 2, 0)}, "blur_probability must lie in 0..1"),
        ({"jitter": (0.4, 0.4, 0.2, 0.6)}, "hue in 0..0.5"),
        ({"blur_kernel_size": 4}, "blur_kernel_size must be odd"),
        ({"local_size": 1}, "local_size 1 is too small"),
    ],
)
def test_refused_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiCrop(**arguments)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(3, 8, 8), r"uint8 tensor \[C, h, w\], got torch.float32 \[3, 8, 8\]"),
        (torch.zeros(8, 8, dtype=torch.uint8), r"got torch.uint8 \[8, 8\]"),
        (torch.zeros(3, 0, 8, dtype=torch.uint8), "non-empty"),
        (torch.zeros(4, 8, 8, dtype=torch.uint8), r"mean has 3 value\(s\) but the image has 4"),
    ],
)
def test_refused_images(image, message):
    with pytest.raises(ValueError, match=message):
        MultiCrop(mean=IMAGENET_MEAN, std=IMAGENET_STD)(image, generator=seeded(0))

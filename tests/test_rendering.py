"""Views rendered together, on a CPU and by the way of a GPU, whatever the batch they are in."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from sslkit.data import rendering, resizing
from sslkit.data.crops import Crops, MultiCrop, height_width
from sslkit.data.image_array import ImageArray
from sslkit.data.loader import MultiCropDataset, make_loader
from sslkit.data.normalisation import IMAGENET_STD
from sslkit.data.rendering import View, pack_views, render_boxes
from sslkit.data.resizing import bicubic_weights, resize_boxes

CROPS = MultiCrop(global_size=(24, 40), local_size=(16, 10), num_local=3)
SHAPES = ((50, 70), (90, 31), (24, 40), (130, 130), (3, 55))
PLAIN = View((0, 0, 1, 1), False, None, (0, 1, 2, 3), False, None, False)
JITTER = (1.3, 0.7, 0.9, -0.08)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def smooth_image(height, width, channels, seed):
    """Pixels that resemble their neighbours, dark to bright, as a photograph's do."""
    coarse = torch.rand(1, channels, 9, 9, generator=seeded(seed)) * 320 - 32
    image = F.interpolate(coarse, (height, width), mode="bicubic")[0]
    noise = 8 * torch.randn(channels, height, width, generator=seeded(seed))
    return image.add(noise).clamp(0, 255).to(torch.uint8)


def padded(images):
    """In one tensor, surrounded by noise: what lies around an image must not matter."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    shape = (len(images), images[0].shape[0], height, width)
    batch = torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded(9))
    for image, target in zip(images, batch, strict=True):
        target[:, : image.shape[1], : image.shape[2]] = image
    return batch


def drawn(channels=3, crops=CROPS, repeats=4):
    """Images, and their views."""
    shapes = SHAPES * repeats
    images = [smooth_image(*shape, channels, seed) for seed, shape in enumerate(shapes)]
    views = [crops.draw(*shape, generator=seeded(i)) for i, shape in enumerate(shapes)]
    return images, views


def packed(views, crops=CROPS):
    """The global views, and the local ones."""
    number = crops.num_global
    groups = [row[:number] for row in views], [row[number:] for row in views]
    sizes = crops.global_size, crops.local_size
    return [
        pack_views(group, crops.look(size).blur_taps)
        for group, size in zip(groups, sizes, strict=True)
    ]


def render_batch(images, crops, packed_globals, packed_locals):
    """As a GPU does."""
    groups = []
    for group, size in (packed_globals, crops.global_size), (packed_locals, crops.local_size):
        groups.append(render_boxes(images, group, crops.look(size), height_width(size)))
    return Crops(*groups)


def one_by_one(images, views, crops=CROPS):
    """What a CPU renders, image after image: [V_g, B, C, h, w] and [V_l, B, C, h, w]."""
    each = [crops.render_all(image, row) for image, row in zip(images, views, strict=True)]
    return torch.stack([e.globals_ for e in each], 1), torch.stack([e.locals_ for e in each], 1)


def assert_same_up_to_resizing(result, expected, std=IMAGENET_STD):
    """On average 0.02 levels of 255 (measured: at most 0.006), and no pixel 6 levels apart.

    A CPU resizes uint8 with weights of 16 bits: a pixel now and then is one level off, which
    jitter stretches by at most 1.4 * 1.4 * 1.2, twice at a corner of the hue's hexagon.
    """
    std = torch.as_tensor(std).view(-1, 1, 1)
    levels = (result - expected).abs() * std * 255
    assert levels.mean() < 0.02
    assert levels.max() < 6


# --- resizing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "size"), [(7, 7), (50, 8), (8, 50), (13, 12), (1, 5), (300, 7)])
def test_weights_are_torchs(length, size):
    eye = torch.eye(length)[None, None]
    torchs = F.interpolate(eye, (size, length), mode="bicubic", antialias=True)[0, 0]
    weights = bicubic_weights(torch.tensor([2.0]), torch.tensor([float(length)]), length + 5, size)
    expected = F.pad(torchs, (2, 3))  # the box starts at 2 and three pixels follow it
    torch.testing.assert_close(weights[0], expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(16, 24), (9, 9), (64, 20)])
def test_resizing_equals_uint8_interpolation(channels, size):
    images, views = drawn(channels)
    views = [[view._replace(flip=False) for view in row] for row in views]
    whole = pack_views(views, 3)
    result = resize_boxes(padded(images), whole.boxes, whole.flips, size)
    expected = [
        torch.stack([CROPS.render(image, PLAIN._replace(box=view.box), size) for view in row])
        for image, row in zip(images, views, strict=True)
    ]
    difference = (result - torch.stack(expected, dim=1)).abs()
    assert difference.max() <= 2
    assert difference.mean() < 0.02  # measured: 0.007
    assert torch.equal(result, result.round())


def test_workspace_does_not_matter(monkeypatch):
    images, views = drawn(repeats=1)
    whole = render_batch(padded(images), CROPS, *packed(views))
    monkeypatch.setattr(resizing, "_WORKSPACE_BYTES", 1)  # an image at a time
    parts = render_batch(padded(images), CROPS, *packed(views))
    assert_same_up_to_resizing(parts.globals_, whole.globals_)
    assert_same_up_to_resizing(parts.locals_, whole.locals_)


# --- pixel operations ----------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"flip": True},
        *({"jitter": JITTER, "jitter_order": order} for order in itertools.permutations(range(4))),
        {"grey": True},
        {"blur_sigma": 0.1},
        {"blur_sigma": 1.7},
        {"solarise": True},
    ],
    ids=str,
)
def test_every_operation(choice, channels):
    """Two of three images get it; the first keeps its plain view."""
    images = [smooth_image(40, 30, channels, seed) for seed in range(3)]
    plain = PLAIN._replace(box=(4, 3, 30, 24))
    views = [[plain], [plain._replace(**choice)], [plain._replace(**choice)]]
    crops = MultiCrop(global_size=(20, 18), num_global=1, num_local=0)
    result = render_batch(padded(images), crops, *packed(views, crops)).globals_
    expected, _ = one_by_one(images, views, crops)
    std = IMAGENET_STD if channels == 3 else (sum(IMAGENET_STD) / 3,) * channels
    assert_same_up_to_resizing(result, expected, std)


# --- whole batches -------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_batch_equals_one_image_after_the_other(channels):
    images, views = drawn(channels)
    result = render_batch(padded(images), CROPS, *packed(views))
    std = IMAGENET_STD if channels == 3 else (sum(IMAGENET_STD) / 3,) * channels
    for got, expected in zip(result, one_by_one(images, views), strict=True):
        assert got.shape == expected.shape
        assert got.dtype == torch.float32
        assert_same_up_to_resizing(got, expected, std)


def test_normalisation_settings():
    mean, std = (0.1, 0.5), (0.3, 1.0)
    crops = MultiCrop(global_size=16, num_local=0, mean=mean, std=std)
    images, views = drawn(2, crops, repeats=1)
    result = render_batch(padded(images), crops, *packed(views, crops))
    assert_same_up_to_resizing(result.globals_, one_by_one(images, views, crops)[0], std)


def test_no_local_views():
    crops = MultiCrop(global_size=16, num_local=0)
    images, views = drawn(3, crops, repeats=1)
    result = render_batch(padded(images), crops, *packed(views, crops))
    assert result.locals_.shape[:2] == (0, len(images))


def test_result_repeats():
    images, views = drawn()
    first, again = (render_batch(padded(images), CROPS, *packed(views)) for _ in range(2))
    assert torch.equal(first.globals_, again.globals_)
    assert torch.equal(first.locals_, again.locals_)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_renders_the_same_and_is_not_waited_for():
    images, views = drawn()
    batch = padded(images).pin_memory().to("cuda", non_blocking=True)
    on_gpu = [group.to("cuda", non_blocking=True) for group in packed(views)]
    render_batch(batch, CROPS, *on_gpu)  # loads libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = render_batch(batch, CROPS, *on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for got, expected in zip(result, one_by_one(images, views), strict=True):
        assert_same_up_to_resizing(got.cpu(), expected)
    again = render_batch(batch, CROPS, *on_gpu)
    assert torch.equal(again.globals_, result.globals_)
    assert torch.equal(again.locals_, result.locals_)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("views_at_once", [1, 3, 1000])
def test_a_view_does_not_depend_on_those_beside_it(channels, views_at_once, monkeypatch):
    crops = MultiCrop(global_size=(13, 11), local_size=(9, 7), num_local=3, jitter=(1, 1, 1, 0.5))
    images, views = drawn(channels, crops)
    expected = one_by_one(images, views, crops)
    view_bytes = 4 * channels * 13 * 11
    monkeypatch.setattr(rendering, "_CHUNK_BYTES", views_at_once * view_bytes)
    for number in (1, 2, 7, len(images)):
        for first in range(0, len(images) - number + 1, number):
            part = slice(first, first + number)
            resized = [crops.resize(i, v) for i, v in zip(images[part], views[part], strict=True)]
            result = crops.render_resized(resized, views[part])
            assert torch.equal(result.globals_, expected[0][:, part])
            assert torch.equal(result.locals_, expected[1][:, part])


# --- loader --------------------------------------------------------------------------------------


def batches(count=3, **arguments):
    images = torch.stack([smooth_image(40, 48, 3, seed) for seed in range(7)])
    source = ImageArray(images.permute(0, 2, 3, 1).numpy())
    dataset = MultiCropDataset(source, CROPS, seed=3)
    loader = make_loader(dataset, batch_size=4, **arguments)
    return list(itertools.islice(loader, count))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_gives_the_same_batches(num_workers):
    for here, there in zip(
        batches(), batches(augment_on="cpu", num_workers=num_workers), strict=True
    ):
        assert_same_up_to_resizing(there.global_crops, here.global_crops)
        assert_same_up_to_resizing(there.local_crops, here.local_crops)
        for name in ("labels", "epochs", "indices"):
            assert torch.equal(getattr(here, name), getattr(there, name))
        assert there.render_seconds > 0 == here.render_seconds


def test_images_of_different_sizes_and_channels():
    class Ragged:
        num_classes, class_names = 0, None

        def __init__(self, channels):
            self.channels = channels

        def __len__(self):
            return len(self.channels)

        def __getitem__(self, index):
            return smooth_image(*SHAPES[index], self.channels[index], index), -1

    def first(channels, **arguments):
        dataset = MultiCropDataset(Ragged(channels), CROPS)
        return next(iter(make_loader(dataset, batch_size=4, **arguments)))

    here, there = first([3] * 4), first([3] * 4, augment_on="cpu")
    assert_same_up_to_resizing(there.global_crops, here.global_crops)
    with pytest.raises(ValueError, match=r"different channel counts: \[1, 3\]"):
        first([1, 3, 3, 3], augment_on="cpu")

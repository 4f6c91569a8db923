"""The stream of batches: exact under restarts, ranks and workers; broken images are survived."""

import itertools
import time
import traceback
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from sslkit.data.crops import MultiCrop
from sslkit.data.image_array import ImageArray
from sslkit.data.image_folder import ImageFolder
from sslkit.data.loader import MultiCropDataset, make_loader
from sslkit.data.unreadable import Unreadable, UnreadableLog
from tests.partly_broken import PartlyBroken

CROPS = MultiCrop(global_size=(12, 16), local_size=8, num_local=3)


class Broken(PartlyBroken):
    """An image array some of whose images cannot be read."""

    def __init__(self, size, broken):
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (size, 20, 24, 3), np.uint8)
        super().__init__(ImageArray(images, np.arange(size) % 7), broken)


def dataset(size=11, broken=(), seed=5):
    return MultiCropDataset(Broken(size, broken), CROPS, seed=seed)


def take(iterable, count):
    return list(itertools.islice(iter(iterable), count))


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        for name, value in batch._asdict().items():
            if name.endswith("_seconds"):
                continue
            counterpart = getattr(other, name)
            same = torch.equal(value, counterpart) if name != "unreadable" else value == counterpart
            assert same, name


# --- batches -------------------------------------------------------------------------------------


def test_batch_layout():
    data = dataset()
    (batch,) = take(make_loader(data, batch_size=4), 1)
    assert batch.global_crops.shape == (2, 4, 3, 12, 16)
    assert batch.local_crops.shape == (3, 4, 3, 8, 8)
    assert batch.unreadable == ()
    for b in range(4):
        epoch, index = int(batch.epochs[b]), int(batch.indices[b])
        sample = data[epoch, index]
        assert torch.equal(batch.global_crops[:, b], sample.crops.globals_)
        assert torch.equal(batch.local_crops[:, b], sample.crops.locals_)
        assert batch.labels[b] == index % 7 == data.source[index][1]
    moved = batch.to("meta")
    assert moved.global_crops.device.type == moved.indices.device.type == "meta"
    assert moved._fields == batch._fields


@pytest.mark.parametrize("augment_on", [None, "cpu"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_time_is_told_apart(num_workers, augment_on):
    class Slow(Broken):
        def __getitem__(self, index):
            time.sleep(0.02)
            return super().__getitem__(index)

    class SlowCrops(MultiCrop):
        def resize(self, image, views):
            time.sleep(0.05)
            return super().resize(image, views)

        def render_resized(self, *arguments):
            time.sleep(0.25)
            return super().render_resized(*arguments)

    crops = SlowCrops(global_size=12, local_size=8, num_local=1)
    data = MultiCropDataset(Slow(5, (2,)), crops)
    loader = make_loader(data, batch_size=5, num_workers=num_workers, augment_on=augment_on)
    (batch,) = take(loader, 1)
    rendered = 5 * (augment_on is None)
    assert 0.02 * 6 <= batch.read_seconds < 0.02 * 6 + 0.5  # the replacement of 2 is read, too
    assert 0.1 * rendered < batch.augment_seconds < 0.1 * rendered + 0.5


def test_no_local_crops():
    data = MultiCropDataset(Broken(5, ()), MultiCrop(global_size=12, num_local=0))
    (batch,) = take(make_loader(data, batch_size=2), 1)
    assert batch.local_crops.shape[:2] == (0, 2)


def test_views_change_with_epoch_index_and_seed():
    keys = [(0, 1), (1, 1), (0, 2)]
    views = [dataset(broken=(), seed=seed)[key] for seed in (0, 1) for key in keys]
    pictures = {sample.crops.globals_.numpy().tobytes() for sample in views}
    assert len(pictures) == len(views)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_batches_do_not_depend_on_workers_or_restarts(num_workers):
    data = dataset(broken=(2, 6))
    reference = take(make_loader(data, batch_size=4), 7)
    loader = make_loader(data, batch_size=4, num_workers=num_workers, prefetch_batches=3)
    assert_same(take(loader, 4), reference[:4])
    # Stopped after 4 batches, with others prefetched: the position is what was consumed.
    resumed = make_loader(data, batch_size=4, start_sample=16, num_workers=num_workers)
    assert_same(take(resumed, 3), reference[4:])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_torchs_global_generator_is_left_alone(num_workers):
    before = torch.get_rng_state()
    take(make_loader(dataset(), batch_size=4, num_workers=num_workers), 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_ranks_share_the_same_global_batches():
    data = dataset()
    whole = take(make_loader(data, batch_size=6), 4)
    ranks = [take(make_loader(data, batch_size=6, rank=r, world_size=2), 4) for r in range(2)]
    for step, batch in enumerate(whole):
        for rank in range(2):
            assert torch.equal(ranks[rank][step].global_crops, batch.global_crops[:, rank::2])
            assert torch.equal(ranks[rank][step].indices, batch.indices[rank::2])


def test_mixed_channel_counts(tmp_path):
    class Mixed(Broken):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image[: 1 + 2 * (index % 2)], label

    data = MultiCropDataset(Mixed(4, ()), CROPS)
    with pytest.raises(ValueError, match=r"different channel counts: \[1, 3\]"):
        take(make_loader(data, batch_size=4), 1)


# --- unreadable images ---------------------------------------------------------------------------


def test_unreadable_image_is_replaced_and_reported():
    data = dataset(broken=(4,))
    sample = data[3, 4]
    assert sample.unreadable == (Unreadable(4, "photo_4.jpg", "truncated"),)
    assert sample.index != 4
    assert sample.label == sample.index % 7
    again = data[3, 4]
    assert torch.equal(again.crops.globals_, sample.crops.globals_)
    # The replacement shows the other image under the random choices of the original sample.
    assert len({data[epoch, 4].index for epoch in range(30)}) > 5


def test_all_but_one_unreadable():
    data = dataset(size=3, broken=(0, 1))
    sample = data[0, 0]
    assert sample.index == 2
    assert {each.index for each in sample.unreadable} <= {0, 1}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_all_unreadable_ends_with_an_error(num_workers):
    loader = make_loader(dataset(size=3, broken=range(3)), batch_size=2, num_workers=num_workers)
    message = r"64 images drawn in a row.*\(3 different ones of 3\)"
    with pytest.raises(RuntimeError, match=message) as caught:
        take(loader, 1)
    # Frees the iterator here; left to the garbage collector, its workers take 5 s to stop.
    traceback.clear_frames(caught.tb)


def test_other_errors_are_not_taken_for_broken_images():
    data = dataset()
    data.source.images = None
    with pytest.raises(TypeError):
        data[0, 0]


@pytest.mark.parametrize("fault", ["truncated", "vanished"])
def test_a_folder_with_a_broken_file_trains(tmp_path, fault):
    for i in range(6):
        Image.new("RGB", (20, 16), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    source = ImageFolder(tmp_path)
    content = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").unlink()
    if fault == "truncated":
        (tmp_path / "3.png").write_bytes(content[:40])
    log = UnreadableLog(len(source), threshold=0.2)
    with warnings.catch_warnings(record=True) as caught:
        for batch in take(make_loader(MultiCropDataset(source, CROPS), batch_size=4), 6):
            assert 3 not in batch.indices
            log.update(batch.indices, batch.unreadable)
    assert ["3.png" in str(each.message) for each in caught] == [True], caught
    assert (log.num_seen, log.num_unreadable) == (6, 1)

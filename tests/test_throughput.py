"""The watch on the loader: shares and rates by a fake clock, warnings of real loops."""

import itertools
import math
import os
import time

import numpy as np
import pytest
import torch

from sslkit.commands.main import run as sslkit_command
from sslkit.data import Batch, ImageArray, MultiCrop, MultiCropDataset, make_loader
from sslkit.data.throughput import DataWatch, measure


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def loop(watch, clock, steps, *, wait, model, read=0.0, augment=0.0, render=0.0, images=8):
    """``steps`` steps of a loop; the warnings that came, with the number of the step."""

    def batches():
        labels, crops = torch.zeros(images, dtype=torch.int64), torch.zeros(1, images, 1, 1, 1)
        while True:
            clock.now += wait + render
            yield Batch(crops, crops, labels, labels, labels, (), read, augment, render)

    warnings = []
    stream = batches()
    for step in range(steps):
        batch = watch.next(stream)
        assert len(batch.labels) == images
        clock.now += model
        warnings += [(step, text) for text in (watch.warning(),) if text]
    return warnings


def watched(num_workers=2, **arguments):
    clock = Clock()
    return DataWatch(num_workers, **{"window": 10, "num_cores": 8, **arguments}, clock=clock), clock


# --- metrics -------------------------------------------------------------------------------------


def test_shares_and_rates():
    watch, clock = watched(num_workers=3)
    loop(watch, clock, 8, wait=1.0, model=3.0, read=2.0, augment=4.0)
    metrics = watch.metrics()
    assert metrics == {"loader_images_per_second": 3 * 8 / 6.0, "data_wait": 0.25}


def test_nothing_is_known_before_the_second_batch():
    watch, clock = watched()
    assert all(math.isnan(value) for value in watch.metrics().values())
    loop(watch, clock, 1, wait=100.0, model=1.0, read=1.0)  # the start of the workers
    assert all(math.isnan(value) for value in watch.metrics().values())
    assert watch.warning() is None


def test_window_slides():
    watch, clock = watched(window=5)
    loop(watch, clock, 20, wait=1.0, model=1.0, read=2.0)
    loop(watch, clock, 6, wait=0.0, model=1.0, read=4.0)
    assert watch.metrics() == {"loader_images_per_second": 4.0, "data_wait": 0.0}


def test_rendering_on_a_device_is_no_waiting():
    watch, clock = watched()
    loop(watch, clock, 8, wait=1.0, model=2.0, render=1.0, read=1.0)
    assert watch.metrics()["data_wait"] == 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window counts steps and must be at least 1, got 0"),
        ({"threshold": 20}, "threshold is a share and must lie between 0 and 1, got 20"),
    ],
)
def test_refused_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        DataWatch(2, **arguments)


def test_cores_are_shared_by_the_processes_of_torchrun(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16), raising=False)
    assert DataWatch(2).num_cores == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert DataWatch(2).num_cores == 4


# --- warnings ------------------------------------------------------------------------------------


def test_no_warning_up_to_the_threshold():
    watch, clock = watched()
    assert loop(watch, clock, 30, wait=1.0, model=4.0, read=2.0) == []
    assert loop(watch, clock, 30, wait=1.1, model=4.0, read=2.0)


def test_warning_comes_once_the_window_is_full_and_again_after_a_recovery():
    watch, clock = watched()
    slow = {"wait": 1.0, "model": 1.0, "read": 4.0}
    assert [step for step, _ in loop(watch, clock, 40, **slow)] == [10]
    assert loop(watch, clock, 10, wait=0.15, model=0.85, read=4.0) == []  # better, but no recovery
    assert loop(watch, clock, 20, **slow) == []
    assert loop(watch, clock, 20, wait=0.0, model=1.0, read=1.0) == []
    assert len(loop(watch, clock, 20, **slow)) == 1


@pytest.mark.parametrize(
    ("work", "cores", "expected"),
    [
        # 8 images in 2 s of the loop, 1 s of the model; two workers give 16 in 4 s of one.
        (
            {"read": 3.0, "augment": 1.0},
            8,
            "the model waits for data 50% of the time: with 2 workers the loader makes 4 images/s, "
            "the model would take 8. Reading and decoding images takes 75% of the loader's time: "
            "use smaller source images, shards or a faster disk, or raise the number of workers "
            "to about 4",
        ),
        (
            {"read": 1.0, "augment": 3.0},
            4,
            "Augmentation takes 75% of the loader's time: augment on the GPU (augment_on of "
            "make_loader), and raise the number of workers to 3, the number of CPU cores that the "
            "model leaves (4 would be needed)",
        ),
        ({"read": 1.0, "augment": 3.0}, 3, ". 3 CPU cores leave no room for more workers"),
    ],
)
def test_warning_names_the_bottleneck(work, cores, expected):
    watch, clock = watched(num_cores=cores)
    ((_, text),) = loop(watch, clock, 20, wait=1.0, model=1.0, **work)
    assert text.endswith(expected)


def test_batches_made_in_the_training_process():
    watch, clock = watched(num_workers=0)
    ((_, text),) = loop(watch, clock, 20, wait=1.0, model=2.0, read=1.0)
    assert "with 0 workers the loader makes 8 images/s, the model would take 4" in text
    assert text.endswith("or raise the number of workers to about 1")


def test_a_model_on_all_cores_leaves_none_to_workers():
    watch, clock = watched(num_workers=0, num_cores=2, model_cores=2)
    ((_, text),) = loop(watch, clock, 20, wait=1.0, model=2.0, read=1.0)
    assert text.endswith(". 2 CPU cores leave no room for more workers")


def test_late_batches_of_a_fast_loader():
    watch, clock = watched()
    ((_, text),) = loop(watch, clock, 20, wait=1.0, model=1.0, read=0.5)
    assert "makes 32 images/s, the model would take 8, so that batches come late although" in text


# --- real loops ----------------------------------------------------------------------------------


def loader(num_workers):
    images = np.random.default_rng(0).integers(0, 256, (32, 48, 48, 3), np.uint8)
    crops = MultiCrop(global_size=32, local_size=16, num_local=2)
    dataset = MultiCropDataset(ImageArray(images), crops)
    return make_loader(dataset, batch_size=4, num_workers=num_workers)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("slow_model", [False, True])
def test_a_real_loop_warns_if_and_only_if_the_model_waits(num_workers, slow_model):
    watch = DataWatch(num_workers, window=8)
    batches = iter(loader(num_workers))
    warnings = []
    for _ in range(12):
        batch = watch.next(batches)
        if slow_model:
            time.sleep(20 * (batch.read_seconds + batch.augment_seconds))
        warnings.append(watch.warning())
    metrics = watch.metrics()
    assert metrics["loader_images_per_second"] > 10
    if slow_model:
        assert metrics["data_wait"] < 0.2
        assert warnings == [None] * 12
    else:
        assert metrics["data_wait"] > 0.5
        (text,) = filter(None, warnings)
        assert text.startswith("the model waits for data")


def test_loader_is_measured_without_its_start():
    clock = Clock()
    labels, crops = torch.zeros(8, dtype=torch.int64), torch.zeros(1, 8, 1, 1, 1)

    def batches():
        for i in itertools.count():
            clock.now += 100 if i < 2 else 2
            yield Batch(crops, crops, labels, labels, labels, (), 1.0, 3.0)

    speed = measure(batches(), num_workers=2, num_images=20, clock=clock)
    assert speed == (4.0, 1 / 8, 3 / 8)


def test_command_line(tmp_path, capsys):
    np.save(tmp_path / "images.npy", np.zeros((9, 30, 30, 3), np.uint8))
    arguments = "--batch-size 4 --workers 0 --images 8 --global-size 16 --local-size 12"
    data = str(tmp_path / "images.npy")
    sslkit_command(["throughput", data, *arguments.split(), "--num-local", "1"])
    output = capsys.readouterr().out
    assert " images/s with 0 workers; a worker takes " in output
    assert "reading and decoding" in output


def test_command_line_explains_missing_data():
    with pytest.raises(SystemExit, match=r"^error: no data 'nowhere'"):
        sslkit_command(["throughput", "nowhere"])

"""The loader's race: it notices other views, and runs from its command line."""

import itertools
import json
import sys

import pytest
import torch

from benchmarks import bench_loader
from benchmarks.bench_loader import LARGEST_DEVIATION, V1, Contestant, compare


def fake(seed, shift=0.0, smooth=False):
    """A loader of 6 noisy images, 3 a batch, in one order after the other."""

    def batches():
        generator = torch.Generator().manual_seed(seed)
        order = itertools.cycle([0, 2, 4, 5, 1, 3])
        while True:
            index = torch.tensor(list(itertools.islice(order, 3)))
            views = [torch.randn(3, 3, 6, 6, generator=generator) for _ in range(10)]
            views = [view + index.view(3, 1, 1, 1) + shift for view in views]
            if smooth:
                views = [view.sort(dim=-1).values for view in views]
            yield [*views, index]

    return Contestant(batches)


@pytest.mark.parametrize(
    ("other", "same"),
    [(fake(1), True), (fake(1, shift=0.1), False), (fake(1, smooth=True), False)],
)
def test_other_views_are_noticed(other, same, capsys):
    unseen = Contestant(lambda: [], has_views=False)
    worst = compare({V1: fake(0), "other": other, "unseen": unseen}, num_images=6, passes=40)
    assert (worst < LARGEST_DEVIATION) == same
    assert "other" in capsys.readouterr().out


def test_command_line(tmp_path, monkeypatch, capsys):
    arguments = "--scenes 2 --workers 0 --batch-size 2 --batches 1 --rounds 2 --checked 16"
    monkeypatch.setattr(sys, "argv", ["", *arguments.split(), "--results", str(tmp_path)])
    assert bench_loader.main() == 0
    output = capsys.readouterr().out
    assert "times the images/s of torchvision v1, Pillow (goal 1.5)" in output
    (file,) = tmp_path.iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows[0]["contestant"] == V1
    assert rows[0]["times_v1"] == 1
    assert all(row["images_per_s"] > 0 and row["versions"]["pillow"] for row in rows)

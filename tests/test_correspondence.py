"""Semantic correspondence: matching and PCK against loops, and a planted data set."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from sslkit.data.annotated.annotated_source import KeypointPair
from sslkit.evaluation.correspondence import (
    SquareView,
    class_pck,
    correct_keypoints,
    match_keypoints,
)
from sslkit.evaluation.encoders import as_encoder
from sslkit.evaluation.protocols import correspondence
from sslkit.evaluation.protocols.correspondence import Options, evaluate
from sslkit.evaluation.subject import Subject
from sslkit.evaluation.tokens import Unsuitable
from sslkit.testing.references import objects as oracle
from tests.noise import noise, seeded


@given(
    grids=st.tuples(*[st.integers(1, 5)] * 4),
    size=st.tuples(st.integers(5, 40), st.integers(5, 40)),
    seed=st.integers(0, 999),
)
def test_matches_are_those_of_the_loop(grids, size, seed):
    source, target = noise(*grids[:2], 4, seed=seed), noise(*grids[2:], 4, seed=seed + 1)
    (h, w), n = size, 5
    points = torch.rand(n, 2, generator=seeded(seed), dtype=torch.float64) * torch.tensor([w, h])
    found = match_keypoints(source, target, points, view_size=size)
    assert (found.shape, found.dtype) == ((n, 2), torch.float64)
    unit = [F.normalize(x.double(), dim=-1).tolist() for x in (source, target)]
    expected = [oracle.found_keypoint(*unit, point, size) for point in points.tolist()]
    assert found.tolist() == [pytest.approx(xy) for xy in expected]


@pytest.mark.parametrize("grid", [(8, 8), (4, 16), (5, 7)])
def test_identical_images_have_pck_1(grid):
    features = torch.eye(grid[0] * grid[1]).view(*grid, -1)
    h, w = 16 * grid[0], 16 * grid[1]
    points = torch.rand(50, 2, generator=seeded()) * torch.tensor([w, h])
    found = match_keypoints(features, features, points, view_size=(h, w))
    # Each is found in its own cell: at most half a cell away in either direction.
    assert (found - points).abs().max() <= 8
    box = torch.tensor([0, 0, w, h])
    assert correct_keypoints(found, points, box, alpha=8 * 2**0.5 / max(h, w)).all()


def test_a_shifted_image_shifts_the_matches():
    features = noise(6, 9, 32)
    points = (torch.tensor([[2, 1], [5, 3], [4, 4]]) + 0.5) * 10
    found = match_keypoints(features, features.roll((1, 3), (0, 1)), points, view_size=(60, 90))
    assert torch.equal(found, (points + torch.tensor([30, 10])).double())


def test_reference_quirks():
    # One-hot features tell which source cells a point is sampled from, and with what weights.
    features = torch.eye(16).view(4, 4, 16)
    point = torch.tensor([[24.9, 0.0]])
    arguments = {"view_size": (64, 64)}
    # Clean: 24.9 px lies in cell 24.9 / 16 = 1.56 -> column 1, whose centre is 24.
    assert match_keypoints(features, features, point, **arguments).tolist() == [[24, 8]]
    # Quirk: 24 px is at 24 / 64 * 3 = 1.125 of the cells' corners -> column 1, whose corner is 16.
    found = match_keypoints(features, features, point, reference_quirks=True, **arguments)
    assert found.tolist() == [[16, 0]]
    # 32.9 px is truncated to 32, half way between columns 1 and 2: the first of equal ones.
    point = torch.tensor([[32.9, 0.0]])
    assert match_keypoints(features, features, point, **arguments).tolist() == [[40, 8]]
    found = match_keypoints(features, features, point, reference_quirks=True, **arguments)
    assert found.tolist() == [[16, 0]]
    at_limit = torch.tensor([[10.0, 0.0]]), torch.tensor([[0.9, 0.0]]), torch.tensor([0, 0, 100, 9])
    assert correct_keypoints(*at_limit).tolist() == [True]
    assert correct_keypoints(*at_limit, reference_quirks=True).tolist() == [False]


@given(
    box=st.tuples(*[st.integers(0, 40)] * 2, *[st.integers(1, 60)] * 2),
    alpha=st.sampled_from([0.05, 0.1, 0.5]),
    seed=st.integers(0, 999),
)
def test_pck_is_that_of_the_loop(box, alpha, seed):
    box = (box[0], box[1], box[0] + box[2], box[1] + box[3])
    predicted, truth = 60 * torch.rand(2, 6, 2, generator=seeded(seed), dtype=torch.float64)
    found = correct_keypoints(predicted, truth, torch.tensor(box), alpha=alpha)
    rows = zip(predicted.tolist(), truth.tolist(), strict=True)
    assert found.tolist() == [oracle.pck_correct(p, t, box, alpha) for p, t in rows]


def test_macro_average_is_over_classes():
    pck = class_pck(
        torch.tensor([3, 1, 0, 0]), torch.tensor([4, 4, 1, 0]), torch.tensor([0, 0, 2, 1])
    )
    assert pck[[0, 2]].tolist() == [0.5, 0]
    assert pck[1].isnan()
    assert pck.nanmean() == 0.25


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (50, 50)])
def test_square_view_keeps_points_in_place(shape):
    h, w = shape
    image = torch.full((3, h, w), 100, dtype=torch.uint8)
    x, y = w - 9, h - 5
    image[:, y - 2 : y + 2, x - 2 : x + 2] = 0  # a dark spot of 4 by 4 pixels around (x, y)
    view = SquareView(120, mean=(0, 0, 0), std=(1, 1, 1))
    pixels = view(image)
    assert pixels.shape == (3, 120, 120)
    dark = (pixels[0] < 0.2).nonzero().float() + 0.5
    px, py = view.scale(shape) * torch.tensor([x, y])
    assert dark.mean(0).tolist() == pytest.approx([py.item(), px.item()], abs=0.5)
    scale = view.scale(shape)
    white = pixels[:, :, round(w * scale) + 4 :], pixels[:, round(h * scale) + 4 :]
    for part in white:
        assert (part > 0.97).all()
    assert pixels[:, : round(h * scale) - 20, : round(w * scale) - 40].mean() < 0.5


# ------------------------------------------------------------------------------------ the command


class Pairs:
    """Images of coloured tiles; the target is the source, flipped for the second category."""

    def __init__(self, named=True):
        self.named, self.asked = named, []

    def __len__(self):
        return 6

    def pair(self, index):
        self.asked.append(index)
        tiles = torch.randint(256, (3, 4, 6), generator=seeded(index // 2), dtype=torch.uint8)
        image = tiles.repeat_interleave(8, 1).repeat_interleave(8, 2)  # 32 by 48
        points = torch.tensor([[4.0, 12.0], [20.0, 28.0], [44.0, 4.0]])
        flipped = index >= 4
        return KeypointPair(
            image,
            image.flip(2) if flipped else image,
            points,
            points,  # wrong where flipped, but for none: 48 - 4 = 44 is another point's place
            torch.tensor([0.0, 0.0, 48.0, 32.0]),
            "cat" if flipped else "bus",
            index % 3,
            f"{index // 2}" if self.named else "",
            f"{index // 2}{flipped}" if self.named else "",
        )


def colours(images):
    patches = F.avg_pool2d(images, 8).movedim(1, -1)
    return patches.mean((1, 2)), patches


def subject(pairs, function=colours, **changes):
    encoder = as_encoder(function, patch_size=8)
    return Subject("colours", encoder, {"test": pairs}, {}, **changes)


@pytest.mark.parametrize("named", [True, False])
def test_command(named):
    encoded = []

    def watched(images):
        encoded.append(images.shape)
        return colours(images)

    pairs = Pairs(named)
    outcome = evaluate(subject(pairs, watched), Options(image_size=99, num_shown=2))
    assert encoded[0] == (1, 3, 96, 96)
    # Sources and unflipped targets: 3 images of 4 have other names, 1 is a new image each time.
    assert len(encoded) == (6 if named else 12)
    assert {name: score.value for name, score in outcome.scores.items()} == {
        "PCK": 0.5,
        "PCK, viewpoint difference 0": 1.0,
        "PCK, viewpoint difference 1": 0.5,
        "PCK, viewpoint difference 2": 0.5,
    }
    assert [score.num_items for score in outcome.scores.values()] == [6, 2, 2, 2]
    # A resample without the class of cats.
    counts = torch.tensor([1, 1, 1, 1, 0, 0]).double()
    assert outcome.scores["PCK"].resampled(counts) == 1
    assert outcome.details["PCK by class"] == {"bus": 1.0, "cat": 0.0}
    assert outcome.details["key points"] == 18
    assert len(outcome.figures["correspondences"].axes) == 2


def test_command_limits(monkeypatch):
    monkeypatch.setattr(correspondence, "_IMAGES_KEPT", 1)
    pairs = Pairs()
    outcome = evaluate(subject(pairs, limits={"test": 3}), Options(image_size=48, num_shown=0))
    assert pairs.asked == [0, 2, 4]
    assert outcome.details["pairs"] == 3
    assert not outcome.figures
    with pytest.raises(Unsuitable, match="no pair"):
        evaluate(subject([pairs.pair(0)]), Options())


FEATURES = noise(3, 4, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: match_keypoints(FEATURES, noise(3, 4, 6), noise(2, 2), view_size=(9, 9)),
            r"same D, got \[3, 4, 5\] and \[3, 4, 6\]",
        ),
        (
            lambda: match_keypoints(FEATURES, FEATURES, noise(2, 3), view_size=(9, 9)),
            r"keypoints must be \[n, 2\] .* got \[2, 3\]",
        ),
        (
            lambda: match_keypoints(
                FEATURES, FEATURES, torch.tensor([[3.0, 9.1]]), view_size=(9, 20)
            ),
            "outside of the view of 9 by 20",
        ),
        (
            lambda: match_keypoints(FEATURES, FEATURES / 0, noise(2, 2).abs(), view_size=(9, 9)),
            "target holds NaN or infinite",
        ),
        (
            lambda: correct_keypoints(noise(2, 2), noise(3, 2), torch.tensor([0, 0, 1, 1])),
            r"got \[2, 2\] and \[3, 2\]",
        ),
        (
            lambda: correct_keypoints(noise(2, 2), noise(2, 2), torch.tensor([4, 0, 1, 1])),
            "x0 < x1",
        ),
        (
            lambda: class_pck(noise(2), noise(2), torch.zeros(3).long()),
            r"must be \[P\], got \[2\], \[2\] and \[3\]",
        ),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_view_is_of_uint8():
    with pytest.raises(TypeError, match=r"uint8 \[C, h, w\], got torch.float32"):
        SquareView(8)(noise(3, 4, 4))

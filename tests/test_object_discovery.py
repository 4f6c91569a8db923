"""LOST and TokenCut: planted objects are found exactly, and each step is that of the equations."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.linalg import eigh

from sslkit import backbones
from sslkit.data.scenes import Scenes
from sslkit.evaluation import tokencut as tokencut_module
from sslkit.evaluation.encoders import as_encoder
from sslkit.evaluation.lost import lost_box, lost_mask
from sslkit.evaluation.protocols import lost, tokencut
from sslkit.evaluation.subject import Subject
from sslkit.evaluation.tokencut import cut_vector, tokencut_box, tokencut_mask
from sslkit.evaluation.tokens import Unsuitable
from sslkit.testing.references import objects as oracle
from tests.noise import noise

FIND = {"lost": lost_box, "tokencut": tokencut_box}


def planted(grid, cells, noise_scale=0.0, seed=0):
    """Keys of a background and, in the given (rows, columns), of an object."""
    keys = torch.zeros(*grid, 8)
    keys[..., 0], keys[..., 1] = 1.0, -0.2
    for rows, columns in cells:
        keys[rows, columns, 0], keys[rows, columns, 1] = -0.2, 1.0
    return keys + noise_scale * noise(*grid, 8, seed=seed)


OBJECTS = {
    "inside": ((7, 11), (slice(2, 5), slice(3, 9)), (48, 32, 144, 80)),
    "at the border": ((6, 9), (slice(0, 3), slice(0, 2)), (0, 0, 32, 48)),
    "at the padded border": ((6, 9), (slice(4, 6), slice(5, 9)), (80, 64, 137, 91)),
    "one patch": ((4, 5), (slice(1, 2), slice(3, 4)), (48, 16, 64, 32)),
    "a row": ((5, 40), (slice(2, 3), slice(1, 30)), (16, 32, 480, 48)),
}


@pytest.mark.parametrize("method", FIND)
@pytest.mark.parametrize("noise_scale", [0.0, 0.05])
@pytest.mark.parametrize("name", OBJECTS)
def test_a_planted_object_is_found_exactly(name, method, noise_scale):
    (H, W), cells, expected = OBJECTS[name]
    size = (H * 16 - 5, W * 16 - 7) if "padded" in name else (H * 16, W * 16)
    keys = planted((H, W), [cells], noise_scale)
    box = FIND[method](keys, patch_size=16, image_size=size)
    assert tuple(box.tolist()) == expected
    assert box.dtype == torch.float32


@pytest.mark.parametrize("method", FIND)
def test_of_several_objects_one_is_boxed(method):
    cells = [(slice(1, 3), slice(1, 4)), (slice(5, 8), slice(6, 10))]
    box = FIND[method](planted((9, 12), cells), patch_size=(8, 4), image_size=(72, 48))
    assert tuple(box.tolist()) in {(4, 8, 16, 24), (24, 40, 40, 64)}


@pytest.mark.parametrize("method", FIND)
def test_half_precision_and_scale_change_nothing(method):
    (H, W), cells, expected = OBJECTS["inside"]
    keys = planted((H, W), [cells], 0.05)
    for changed in (keys.half(), keys.double(), 7 * keys, 1e30 * keys, 1e-30 * keys):
        box = FIND[method](changed, patch_size=16, image_size=(H * 16, W * 16))
        assert tuple(box.tolist()) == expected


@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 6)),
    k=st.integers(1, 40),
    shift=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 999),
)
def test_lost_is_that_of_the_loop(grid, k, shift, seed):
    keys = noise(*grid, 4, seed=seed) + shift
    mask, seed_cell = lost_mask(keys, num_candidates=k)
    expected, expected_seed = oracle.lost(keys.double().flatten(0, 1).tolist(), k)
    assert mask.flatten().tolist() == expected
    assert seed_cell == divmod(expected_seed, grid[1])
    assert mask[seed_cell]


def test_a_key_of_zeros_is_no_seed():
    keys = planted((4, 5), [(slice(1, 3), slice(1, 3))])
    keys[0, 4] = 0
    mask, seed = lost_mask(keys)
    assert seed == (1, 1)
    assert not mask[0, 4]


@settings(deadline=None)
@given(
    grid=st.tuples(st.integers(2, 5), st.integers(2, 6)),
    threshold=st.sampled_from([0.0, 0.2]),
    eps=st.sampled_from([1e-5, 1e-2]),
    seed=st.integers(0, 999),
)
@example(grid=(2, 2), threshold=0.0, eps=1e-5, seed=258)  # all edges are of weight 1
def test_the_cut_solves_the_generalised_problem(grid, threshold, eps, seed):
    keys = noise(*grid, 3, seed=seed)
    weights = np.array(oracle.cut_weights(keys.double().flatten(0, 1).tolist(), threshold, eps))
    edges = weights[~np.eye(len(weights), dtype=bool)]
    if (edges == edges[0]).all():
        with pytest.raises(ValueError, match="no cut is better than another"):
            cut_vector(keys, threshold=threshold, eps=eps)
        return
    degrees = np.diag(weights.sum(1))
    values = eigh(degrees - weights, degrees, eigvals_only=True)
    v = cut_vector(keys, threshold=threshold, eps=eps).flatten().numpy()
    residual = (degrees - weights) @ v - values[1] * degrees @ v
    assert np.abs(residual).max() < 1e-9 * degrees.max()
    assert np.linalg.norm(v) == pytest.approx(1)
    largest = (np.abs(v) > np.abs(v).max() - 1e-10).argmax()  # the first of equal ones
    assert v[largest] > 0
    assert abs(v @ degrees.sum(1)) < 1e-8 * degrees.max()  # not the first eigenvector
    mask, cell = tokencut_mask(keys, threshold=threshold, eps=eps)
    assert mask.flatten().tolist() == [x > sum(v) / len(v) for x in v]
    assert cell == divmod(largest, grid[1])


def test_both_solvers_agree(monkeypatch):
    keys = planted((24, 30), [(slice(3, 15), slice(8, 20))], 0.5)
    dense = cut_vector(keys)
    monkeypatch.setattr(tokencut_module, "_DENSE", 100)
    torch.testing.assert_close(cut_vector(keys), dense, atol=1e-9, rtol=0)


def test_the_side_of_the_seed_is_the_object():
    mask, seed = tokencut_mask(planted((6, 8), [(slice(1, 3), slice(2, 6))]))
    expected = torch.zeros(6, 8, dtype=torch.bool)
    expected[1:3, 2:6] = True
    assert torch.equal(mask, expected)
    assert mask[seed]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lost_mask(noise(4, 5)), r"\[H, W, D\], got \[4, 5\]"),
        (lambda: lost_mask(noise(4, 5, 6), num_candidates=0), "at least 1, got 0"),
        (lambda: lost_mask(torch.zeros(4, 5, 6)), "all keys are zero"),
        (lambda: lost_mask(noise(4, 5, 6) / 0), "NaN or infinite"),
        (lambda: cut_vector(noise(1, 1, 6)), "one patch alone"),
        (lambda: cut_vector(noise(2, 2, 0)), "at least one patch"),
        (lambda: cut_vector(noise(4, 6)), r"got \[4, 6\]"),
        (lambda: cut_vector(noise(2, 2, 6), eps=0.0), "eps must be between 0 and 1"),
        (lambda: cut_vector(noise(2, 2, 6) * torch.nan), "NaN or infinite"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ----------------------------------------------------------------------------------- the commands


class Planted(torch.nn.Module):
    """An encoder whose keys are the colours of its patches."""

    patch_size = (4, 6)

    def forward(self, images):
        raise AssertionError("only keys are asked for")

    def queries_keys_values(self, images, block):
        rows = torch.nn.functional.avg_pool2d(images, (4, 6)).flatten(2).transpose(1, 2)
        rows = torch.cat([rows[:, :1], rows], 1)[:, None]
        return rows, rows, rows


class Pictures:
    """Images of several sizes: a bright object on a dark ground; the third has no box."""

    places = ((6, 8, 18, 16), (0, 4, 24, 12), (0, 0, 6, 4), (24, 12, 40, 21))
    sizes = ((30, 41), (30, 41), (24, 24), (22, 42))

    def __len__(self):
        return len(self.places)

    def __getitem__(self, index):
        image = torch.full((3, *self.sizes[index]), 60, dtype=torch.uint8)
        x0, y0, x1, y1 = self.places[index]
        image[:, y0:y1, x0:x1] = 250
        return image, -1

    def boxes(self, index):
        return torch.tensor([self.places[index]] * (index != 2), dtype=torch.float32).view(-1, 4)


@pytest.mark.parametrize("module", [lost, tokencut])
def test_command(module):
    subject = Subject("planted", Planted(), {"test": Pictures()}, {})
    outcome = module.evaluate(subject, module.Options(num_shown=3))
    score = outcome.scores["CorLoc"]
    assert score.num_items == 3
    assert outcome.details == {"images": 3, "images_without_boxes": 1}
    if module is lost:  # the colours' signs differ; their cosines are all near 1 or -1
        assert score.value == 1
    assert len(outcome.figures["boxes"].axes) == 3
    assert not module.evaluate(subject, module.Options(num_shown=0)).figures


def test_command_with_a_network():
    scenes = Scenes(4, size=(20, 32))
    encoder = backbones.create("sslkit_vit_micro", img_size=16)
    subject = Subject("micro", encoder, {"test": scenes}, {})
    outcome = lost.evaluate(subject, lost.Options(num_candidates=5, block=0, num_shown=0))
    assert 0 <= outcome.scores["CorLoc"].value <= 1
    other = lost.evaluate(subject, lost.Options(block=1, num_shown=0)).scores["CorLoc"]
    assert other.num_items == 4
    plain = Subject("micro", encoder, {"test": [scenes[0]]}, {})
    with pytest.raises(Unsuitable, match="has no boxes"):
        lost.evaluate(plain, lost.Options())
    colours = as_encoder(lambda x: (x.mean((2, 3)), x.movedim(1, -1)), patch_size=1)
    keyless = Subject("colours", colours, {"test": scenes}, {})
    with pytest.raises(Unsuitable, match="queries_keys_values"):
        lost.evaluate(keyless, lost.Options())


@pytest.mark.parametrize("grid", [(6, 7), (33, 34)])
@pytest.mark.parametrize("value", [1.0, 0.0])
def test_nothing_to_cut_is_the_whole_image(grid, value):
    keys = torch.full((*grid, 4), value)
    H, W = grid
    sizes = {"patch_size": 8, "image_size": (8 * H - 3, 8 * W)}
    assert tokencut_box(keys, **sizes).tolist() == [0, 0, 8 * W, 8 * H - 3]
    with pytest.raises(ValueError, match="no cut is better than another"):
        cut_vector(keys)
    if value:
        assert lost_box(keys, **sizes).tolist() == [0, 0, 8 * W, 8 * H - 3]


@pytest.mark.parametrize("kinds", [3, 5])
def test_few_different_keys_are_cut_in_the_same_way_each_time(kinds):
    keys = noise(kinds, 6)[(torch.arange(36 * 40) * 7919 % 1009 % kinds).view(36, 40)]
    first, *others = (cut_vector(keys) for _ in range(3))
    assert all(torch.equal(first, other) for other in others)
    assert tokencut_mask(keys)[0].any()


def test_iterations_find_the_dense_solvers_vector(monkeypatch):
    keys = noise(33, 35, 8) + 0.5
    by_iterations = cut_vector(keys)
    monkeypatch.setattr(tokencut_module, "_DENSE", 2000)
    torch.testing.assert_close(by_iterations, cut_vector(keys), rtol=0, atol=1e-10)


def test_an_image_of_one_patch_is_its_object():
    for box in (tokencut_box, lost_box):
        found = box(noise(1, 1, 6), patch_size=16, image_size=(12, 16))
        assert found.tolist() == [0.0, 0.0, 16.0, 12.0]

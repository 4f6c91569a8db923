"""RankMe and LiDAR against their loops, known spectra, and what must not change them."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sslkit import backbones
from sslkit.data.crops import MultiCrop
from sslkit.data.image_array import ImageArray
from sslkit.data.scenes import Scenes
from sslkit.data.seeds import sample_seed
from sslkit.data.sources import UnreadableImage
from sslkit.evaluation import options
from sslkit.evaluation.augmented import AugmentedImages, view_features
from sslkit.evaluation.effective_rank import EPS, lidar, rankme
from sslkit.evaluation.protocols import PROTOCOLS
from sslkit.evaluation.subject import Subject
from sslkit.evaluation.views import EvalTransform
from sslkit.testing.references import effective_rank as oracle
from tests.noise import noise

SHAPES = [(12, 5), (4, 7), (6, 6), (1, 3), (9, 1)]
VIEWS = [(12, 3, 5), (4, 5, 7), (2, 2, 3), (9, 2, 1)]
COMMON = settings(max_examples=25, deadline=None)


def views_of(n: int, q: int, D: int, *, within: float = 1.0, seed: int = 0) -> torch.Tensor:
    return (noise(n, 1, D, seed=seed) + within * noise(n, q, D, seed=seed + 1)).double()


def rotation(D: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(noise(D, D, seed=seed).double())[0]


# --- against the loops ---------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", [EPS, 1e-3])
def test_rankme_is_the_loop(shape, eps):
    x = noise(*shape).double() * torch.logspace(0, -3, shape[1])
    assert rankme(x, eps=eps) == pytest.approx(oracle.rankme(x.tolist(), eps), rel=1e-9)


@pytest.mark.parametrize("shape", VIEWS)
@pytest.mark.parametrize(("delta", "eps"), [(1e-4, EPS), (0.3, 1e-3)])
def test_lidar_is_the_loop(shape, delta, eps):
    x = views_of(*shape) * torch.logspace(0, -2, shape[2])
    expected = oracle.lidar(x.tolist(), delta, eps)
    assert lidar(x, delta=delta, eps=eps) == pytest.approx(expected, rel=1e-7)


# --- known spectra -------------------------------------------------------------------------------


@pytest.mark.parametrize("spectrum", [[1.0], [1.0, 1.0, 1.0], [8.0, 4.0, 2.0, 1.0], [5.0, 0.0]])
def test_rankme_of_a_known_spectrum(spectrum):
    D = len(spectrum)
    x = torch.linalg.qr(noise(10, D).double())[0] * torch.tensor(spectrum) @ rotation(D)
    entropy = -sum(s / sum(spectrum) * math.log(s / sum(spectrum)) for s in spectrum if s)
    assert rankme(x) == pytest.approx(math.exp(entropy), rel=1e-5)


@pytest.mark.parametrize("spectrum", [[3.0, 3.0, 3.0], [4.0, 2.0, 1.0]])
def test_lidar_of_a_known_spectrum(spectrum):
    """Two views c_i + u and c_i - u, of which S_b and S_w are diagonal."""
    D, delta = len(spectrum), 1e-3
    signs = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]).double()
    centres = signs * torch.tensor(spectrum)  # columns are orthogonal and sum to 0
    widths = torch.tensor([0.5, 1.0, 2.0]).double()
    x = torch.stack([centres + signs * widths, centres - signs * widths], dim=1)
    between = [4 * s**2 / 3 for s in spectrum]
    within = [8 * w**2 / 4 + delta for w in widths.tolist()]
    eigenvalues = [b / w for b, w in zip(between, within, strict=True)]
    entropy = -sum(e / sum(eigenvalues) * math.log(e / sum(eigenvalues)) for e in eigenvalues)
    assert lidar(x @ rotation(D), delta=delta) == pytest.approx(math.exp(entropy), rel=1e-5)


def test_a_direction_of_noise_counts_for_rankme_and_not_for_lidar():
    images = noise(200, 1, 8).double() * torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0])
    x = images + noise(200, 50, 8, seed=1).double() * torch.tensor([0.01] * 4 + [1.0] * 4)
    assert rankme(x.flatten(0, 1)) > 7.5
    assert lidar(x) == pytest.approx(4, abs=0.1)


def test_collapsed_features():
    assert rankme(torch.full((50, 6), 0.3)) == pytest.approx(1, rel=1e-4)
    assert math.isnan(rankme(torch.zeros(5, 3)))
    assert math.isnan(lidar(torch.full((7, 3, 4), 0.1, dtype=torch.float64)))
    one_direction = noise(20, 1, 1) * torch.ones(6) + 1e-3 * noise(20, 40, 6, seed=1)
    assert lidar(one_direction) == pytest.approx(1, abs=1e-2)


# --- properties ----------------------------------------------------------------------------------


@COMMON
@given(N=st.integers(1, 12), D=st.integers(1, 12), seed=st.integers(0, 99))
def test_rankme_is_between_1_and_the_smaller_side(N, D, seed):
    found = rankme(noise(N, D, seed=seed))
    slack = 1 + 1e-6 + EPS * min(N, D) * math.log(1 / EPS)
    assert 1 - 1e-6 <= found <= min(N, D) * slack


@COMMON
@given(n=st.integers(2, 9), q=st.integers(2, 5), D=st.integers(1, 9), seed=st.integers(0, 99))
def test_lidar_is_between_1_and_the_ranks_of_the_means(n, q, D, seed):
    found = lidar(views_of(n, q, D, seed=seed))
    assert 1 - 1e-6 <= found <= min(n - 1, D) * (1 + 1e-6 + EPS * D * math.log(1 / EPS))


@COMMON
@given(seed=st.integers(0, 99), scale=st.floats(1e-6, 1e6))
def test_rotation_scale_and_order_do_not_matter_to_rankme(seed, scale):
    x = noise(11, 5, seed=seed).double()
    expected = rankme(x)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(seed))
    for changed in (x @ rotation(5, seed), scale * x, x[order], x[:, order[order < 5]]):
        assert rankme(changed) == pytest.approx(expected, rel=1e-9)
    assert rankme(x + 10) != pytest.approx(expected, rel=1e-2)  # it is not centred


@COMMON
@given(seed=st.integers(0, 99), scale=st.floats(1e-3, 1e3))
def test_rotation_shift_scale_and_order_do_not_matter_to_lidar(seed, scale):
    x = views_of(8, 4, 5, seed=seed)
    expected = lidar(x)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    for changed in (x @ rotation(5, seed), x + 10, x[order], x[:, order[order < 4]]):
        assert lidar(changed) == pytest.approx(expected, rel=1e-6)
    assert lidar(scale * x, delta=scale**2 * 1e-4) == pytest.approx(expected, rel=1e-6)
    # Without delta, any linear map of the features would do.
    stretched = x * torch.tensor([1.0, 2, 3, 4, 5])
    assert lidar(stretched, delta=1e-12) == pytest.approx(lidar(x, delta=1e-12), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_type_of_the_features_changes_nothing_but_their_rounding(dtype):
    x, v = noise(20, 6).to(dtype), views_of(8, 3, 4).to(dtype)
    assert rankme(x) == rankme(x.double())
    assert lidar(v) == lidar(v.double())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rankme(torch.zeros(3)), r"floats \[N, D\], not empty, got torch.float32 \[3\]"),
        (lambda: rankme(torch.zeros(0, 3)), r"not empty, got torch.float32 \[0, 3\]"),
        (lambda: rankme(torch.ones(3, 3).long()), "got torch.int64"),
        (lambda: rankme(torch.full((3, 3), math.nan)), "NaN or infinite"),
        (lambda: lidar(torch.zeros(3, 3)), r"floats \[n, q, D\]"),
        (lambda: lidar(torch.zeros(1, 3, 3)), "at least 2 images of 2 views each, got 1 of 3"),
        (lambda: lidar(torch.zeros(3, 1, 3)), "at least 2 images of 2 views each, got 3 of 1"),
        (lambda: lidar(torch.ones(3, 2, 3), delta=0), "delta must be positive, got 0"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- augmented views, and the protocols ----------------------------------------------------------

CROPS = MultiCrop(global_size=16, local_size=8)


def test_augmented_views_are_those_of_the_training():
    source = Scenes(6, size=(20, 32))
    views = AugmentedImages(source, [4, 1], CROPS, num_views=5, seed=3)
    assert (len(views), views.num_classes, views.name(7)) == (
        (10, source.num_classes, f"{source.name(1)}, view 2")
    )
    plain = replace(CROPS, num_local=0, mean=(0.0,) * 3, std=(1.0,) * 3)
    for place, index in enumerate([4, 1]):
        generator = torch.Generator().manual_seed(sample_seed(3, index))
        expected = torch.cat([plain(source[index][0], generator=generator).globals_ for _ in "abc"])
        found = [views[5 * place + v] for v in range(5)]
        for (pixels, label), view in zip(found, expected, strict=False):
            assert (pixels.dtype, label) == (torch.uint8, source[index][1])
            torch.testing.assert_close(pixels / 255, view, atol=0.51 / 255, rtol=0)
    assert torch.equal(views[8][0], AugmentedImages(source, [1], CROPS, num_views=5, seed=3)[3][0])
    assert not torch.equal(views[0][0], views[2][0])


def test_views_that_are_made_otherwise_are_told_apart():
    source = Scenes(6, size=(20, 32))
    others = [
        AugmentedImages(source, [0, 1], CROPS, num_views=2, seed=1),
        AugmentedImages(source, [0, 2], CROPS, num_views=2),
        AugmentedImages(source, [0, 1], CROPS, num_views=3),
        AugmentedImages(source, [0, 1], replace(CROPS, global_size=12), num_views=2),
        AugmentedImages(Scenes(6, size=(20, 32), seed=1), [0, 1], CROPS, num_views=2),
    ]
    own = AugmentedImages(source, [0, 1], replace(CROPS, num_local=3), num_views=2).names_digest()
    assert own == AugmentedImages(source, range(2), CROPS, num_views=2).names_digest()
    assert own not in {other.names_digest() for other in others}


@pytest.fixture(scope="module")
def subject() -> Subject:
    torch.manual_seed(0)
    return Subject(
        "micro",
        backbones.create("sslkit_vit_micro", img_size=16),
        {"train": Scenes(24, size=(20, 32)), "test": Scenes(9, size=(20, 32), seed=1)},
        {"weights": "random", "data": "scenes"},
        global_size=16,
        batch_size=7,
    )


def test_view_features_are_of_the_views_image_by_image(subject):
    found = view_features(subject, CROPS, num_images=6, num_views=3)
    assert found.shape == (6, 3, 32)
    views = AugmentedImages(subject.train, [0, 4, 8, 12, 16, 20], CROPS, num_views=3)
    for i, v in ((0, 0), (2, 1), (5, 2)):
        pixels = EvalTransform(16, resize=16)(views[3 * i + v][0])
        with torch.no_grad():
            expected = subject.encoder.eval()(pixels[None]).cls[0]
        torch.testing.assert_close(found[i, v], expected, atol=1e-4, rtol=1e-4)


def test_an_image_that_cannot_be_read_is_left_out_with_all_its_views(subject):
    class Broken(ImageArray):
        def __getitem__(self, index):
            if index == 1:
                raise UnreadableImage("1.png", "no image")
            return super().__getitem__(index)

    images = noise(4, 20, 20, 3).mul(40).add(128).clamp(0, 255).to(torch.uint8).numpy()
    broken = subject.with_source("train", Broken(images, None))
    with pytest.warns(UserWarning, match="3 of 12 images could not be read"):
        found = view_features(broken, CROPS, num_images=4, num_views=3)
    assert found.shape == (3, 3, 32)


def test_protocols_score_training_images_without_labels(subject, tmp_path):
    unlabelled = replace(subject, cache=tmp_path)
    outcome = PROTOCOLS["rankme"].evaluate(unlabelled, options.RankMe(num_images=20))
    score = outcome.scores["RankMe"]
    features = subject.limited("train", 20).features("train", "cls").cls
    assert score.value == pytest.approx(rankme(features), rel=1e-3)  # the cache is float16
    assert (score.percent, score.resampled) == (False, None)
    assert outcome.details == {"images": 20, "largest possible": 20}
    chosen = options.LiDAR(num_images=10, num_views=3, token="mean_patch")
    outcome = PROTOCOLS["lidar"].evaluate(unlabelled, chosen)
    crops = MultiCrop(global_size=16)
    views = view_features(subject, crops, num_images=10, num_views=3, token="mean_patch")
    assert outcome.scores["LiDAR"].value == pytest.approx(lidar(views), rel=2e-2)
    assert outcome.details == {"images": 10, "views": 3, "largest possible": 9}
    first_only = replace(unlabelled, nesting=4)
    assert PROTOCOLS["lidar"].evaluate(first_only, chosen).details["largest possible"] == 4

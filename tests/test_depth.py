"""Depth probe: losses and metrics against loops, and depths planted in features."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from sslkit.evaluation.depth import DepthHead, fit_depth_head, predict_depth
from sslkit.evaluation.depth_errors import (
    aligned,
    depth_errors,
    gradient_loss,
    scale_invariant_loss,
)
from sslkit.testing.references import dense as oracle
from tests.noise import noise, seeded


def depths(*shape, unknown=0.3, seed=0):
    """Depths of 0.5 to 5.5 m, some unknown."""
    depth = 5 * torch.rand(*shape, generator=seeded(seed), dtype=torch.float64) + 0.5
    return depth * (torch.rand(*shape, generator=seeded(seed + 1)) >= unknown)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(2, 11)),
    unknown=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 99),
)
def test_losses_are_those_of_the_loop(shape, unknown, seed):
    predicted, truth = depths(*shape, unknown=0, seed=seed + 7), depths(*shape, unknown=unknown)
    found = gradient_loss(predicted, truth)
    expected = oracle.gradient_matching(predicted.tolist(), truth.tolist(), (1, 2, 4, 8), 1)
    assert found.item() == pytest.approx(expected)
    if (truth > 0).sum() > 1:
        for shift_weight in (0.0, 0.85):
            found = scale_invariant_loss(predicted, truth, shift_weight=shift_weight)
            expected = oracle.scale_invariant(predicted.tolist(), truth.tolist(), shift_weight)
            assert found.item() == pytest.approx(expected, abs=1e-6)


def test_scale_does_not_matter_to_the_scale_invariant_loss():
    truth = depths(2, 4, 5)
    predicted = truth.clamp(min=1)
    once, thrice = (scale_invariant_loss(s * predicted, truth, shift_weight=1.0) for s in (1, 3))
    torch.testing.assert_close(once, thrice)


def test_a_perfect_prediction_has_finite_gradients():
    truth = depths(1, 4, 5)
    predicted = truth.clamp(min=1).where(truth == 0, truth).requires_grad_()
    loss = scale_invariant_loss(predicted, truth) + gradient_loss(predicted, truth)
    loss.backward()
    assert loss < 2e-3
    assert predicted.grad.isfinite().all()


def test_gradient_loss_quirk_compares_the_images_of_a_batch():
    predicted, truth = depths(7, 3, 4, unknown=0, seed=5), depths(7, 3, 4)
    # Each pixel is a map of B rows and one column.
    columns = [x.flatten(1).T.unsqueeze(-1).tolist() for x in (predicted, truth)]
    expected = oracle.gradient_matching(*columns, (1, 2, 4, 6), 2)
    found = gradient_loss(predicted, truth, reference_quirks=True)
    assert found.item() == pytest.approx(expected)
    assert gradient_loss(predicted[:2], truth[:2], reference_quirks=True) == 0


def test_head_is_that_of_the_loop():
    head = DepthHead(6, 6, num_bins=5, min_depth=1, max_depth=3, generator=seeded()).double()
    head.bins = torch.linspace(1, 3, 5, dtype=torch.float64)
    patches, cls = 4 * noise(2, 2, 3, 2, 3).double(), 4 * noise(2, 2, 3, seed=1).double()
    found = head(patches, cls)
    assert found.shape == (2, 8, 12)
    # Features with the class token appended, resized, and one linear layer.
    joined = torch.cat([patches, cls[:, None, None].expand_as(patches)], dim=-1)  # [B, H, W, n, 2D]
    weight = torch.cat(
        [head.of_patch.weight.view(5, 2, 3), head.of_image.weight.view(5, 2, 3)], dim=-1
    ).flatten(1)
    resized = F.interpolate(joined.flatten(-2).movedim(-1, 1), (8, 12), mode="bilinear")
    scores = torch.einsum("kd,bdhw->bhwk", weight, resized) + head.of_patch.bias
    for depth, score in zip(found.flatten().tolist(), scores.flatten(0, 2).tolist(), strict=True):
        assert depth == pytest.approx(oracle.expected_depth(score, 1, 3))
    assert head.of_patch.weight.abs().max() <= 12**-0.5


def test_planted_depths_are_found():
    depth = F.interpolate(noise(60, 1, 2, 3).clamp(-1.5, 1.5), (3, 5), mode="bilinear")[:, 0]
    patches = torch.cat(
        [depth[..., None, None].expand(60, 3, 5, 2, 1), 0.3 * noise(60, 3, 5, 2, 2)], dim=-1
    )
    truth = 2 + F.interpolate(depth[:, None], (12, 20), mode="bilinear")[:, 0]
    truth[:, :2] = 0
    cls = 0.3 * noise(60, 2, 3)
    settings = {"num_bins": 32, "lr": 0.05, "epochs": 40, "batch_size": 10}
    head = fit_depth_head(patches[:40], cls[:40], truth[:40], generator=seeded(), **settings)
    errors = depth_errors(predict_depth(head, patches[40:], cls[40:], (12, 20)), truth[40:])
    baseline = depth_errors(torch.full_like(truth[40:], 2.0), truth[40:])
    assert errors.rmse.mean() < 0.4 * baseline.rmse.mean()
    assert errors.aligned_rmse.mean() < 0.15 * baseline.aligned_rmse.mean()
    assert errors.delta1.mean() > 0.95


def test_half_precision_features_and_the_generator():
    patches, cls, truth = noise(6, 2, 3, 1, 4), noise(6, 1, 4), depths(6, 8, 12).float()
    first, again, half, other = (
        fit_depth_head(x, c, truth, epochs=3, generator=seeded(seed))
        for x, c, seed in (
            (patches, cls, 0),
            (patches, cls, 0),
            (patches.half(), cls.half(), 0),
            (patches, cls, 1),
        )
    )
    weights = [head.of_patch.weight for head in (first, again, half, other)]
    assert torch.equal(weights[0], weights[1])
    torch.testing.assert_close(weights[0], weights[2], atol=1e-3, rtol=0)
    assert not torch.allclose(weights[0], weights[3], atol=1e-2)


def test_unknown_and_too_large_depths_do_not_count():
    patches, cls, truth = noise(6, 2, 3, 1, 4), noise(6, 1, 4), depths(6, 8, 12, unknown=0).float()
    far = truth.clone()
    truth[:, :3], far[:, :3] = 0, 11
    truth[3], far[3] = 0, 99  # nothing known: no step for this image
    heads = [
        fit_depth_head(patches, cls, x, epochs=2, batch_size=1, generator=seeded())
        for x in (truth, far)
    ]
    assert torch.equal(heads[0].of_patch.weight, heads[1].of_patch.weight)
    assert heads[0].of_patch.weight.isfinite().all()
    head = fit_depth_head(patches, cls, torch.zeros(6, 8, 12), epochs=2, generator=seeded())
    assert torch.equal(head.of_patch.weight, DepthHead(4, 4, generator=seeded()).of_patch.weight)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (0.1, 7.0), (-3.0, 9.0)])
def test_affine_depths_have_no_error_after_alignment(scale, shift):
    truth = depths(3, 6, 8)
    errors = depth_errors(scale * truth + shift, truth)
    torch.testing.assert_close(errors.aligned_rmse, torch.zeros(3).double(), atol=1e-9, rtol=0)
    perfect = depth_errors(truth, truth)
    assert perfect.rmse.tolist() == perfect.abs_rel.tolist() == [0, 0, 0]
    assert perfect.delta1.tolist() == [1, 1, 1]


def test_errors_are_those_of_the_loop():
    predicted, truth = depths(3, 4, 5, unknown=0, seed=9), depths(3, 4, 5)
    errors = depth_errors(predicted, truth)
    for i in range(3):
        pairs = [
            (p, t)
            for p, t in zip(
                predicted[i].flatten().tolist(), truth[i].flatten().tolist(), strict=True
            )
            if t > 0
        ]
        n = len(pairs)
        assert errors.rmse[i] == pytest.approx((sum((p - t) ** 2 for p, t in pairs) / n) ** 0.5)
        assert errors.abs_rel[i] == pytest.approx(sum(abs(p - t) / t for p, t in pairs) / n)
        near = sum(max(p / t, t / p) < 1.25 for p, t in pairs) / n
        assert errors.delta1[i] == pytest.approx(near)
        expected = oracle.aligned_rmse(predicted[i].tolist(), truth[i].tolist())
        assert errors.aligned_rmse[i] == pytest.approx(expected)


def test_errors_of_images_without_contrast_or_depth():
    truth = depths(2, 4, 5)
    truth[1] = 0
    errors = depth_errors(torch.full_like(truth, 1.1), truth)
    known = truth[0][truth[0] > 0]
    assert errors.aligned_rmse[0] == pytest.approx(known.std(correction=0).item())
    assert errors.rmse[1].isnan()
    assert errors.aligned_rmse[1].isnan()
    torch.testing.assert_close(aligned(truth * 0 + 1, truth)[0, 0, 0], known.mean())


def test_a_depth_of_zero_or_less_is_not_near():
    truth = torch.ones(1, 1, 2)
    assert depth_errors(torch.tensor([[[-1.0, 1.0]]]), truth).delta1.tolist() == [0.5]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: depth_errors(torch.ones(2, 3, 4), torch.ones(2, 4, 3)),
            r"both be \[Q, h, w\], got \[2, 3, 4\] and \[2, 4, 3\]",
        ),
        (
            lambda: fit_depth_head(
                noise(2, 3, 4, 1, 5), noise(2, 2, 5), torch.ones(2, 6, 8), generator=seeded()
            ),
            r"\[B, n, D'\] and \[B, h, w\], got \[2, 3, 4, 1, 5\], \[2, 2, 5\]",
        ),
        (
            lambda: fit_depth_head(
                noise(2, 3, 4, 1, 5),
                noise(2, 1, 5),
                torch.ones(2, 6, 8),
                epochs=1,
                generator=seeded(),
            ),
            "warmup_epochs=1.5 must be below epochs=1",
        ),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""Feat2GS: the PCA against scikit-learn, files read back, image metrics against torchmetrics."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from sslkit.evaluation.feat2gs import (
    masked_psnr,
    masked_ssim,
    pca_features,
    read_pca_features,
    write_pca_features,
)
from sslkit.testing.references import dense as oracle
from tests.noise import noise


def pictures(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_components_are_those_of_scikit_learn():
    patches = noise(3, 4, 5, 6) @ noise(6, 10, seed=1) + 4
    found = pca_features(patches, dim=5)
    expected = PCA(5, svd_solver="full").fit(patches.flatten(0, 2).double().numpy())
    projected = torch.from_numpy(expected.transform(patches.flatten(0, 2).double().numpy())).float()
    sign = (found.features.flatten(0, 2) * projected).sum(0).sign()
    torch.testing.assert_close(found.features.flatten(0, 2) * sign, projected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.components @ found.components.T, torch.eye(5))
    torch.testing.assert_close(found.variances, found.features.flatten(0, 2).var(0, correction=0))
    centred = patches - found.mean
    torch.testing.assert_close(centred @ found.components.T, found.features, atol=1e-4, rtol=1e-4)
    assert (found.components.gather(1, found.components.abs().argmax(1, keepdim=True)) > 0).all()


def test_views_are_read_back(tmp_path):
    scene = pca_features(noise(3, 4, 6, 20), dim=16)
    write_pca_features(tmp_path / "scene", scene, ["b", "a.x", "c"])
    files = {path.name for path in (tmp_path / "scene").iterdir()}
    assert files == {"a.x.npy", "b.npy", "c.npy", "pca.npz"}
    found = read_pca_features(tmp_path / "scene")
    assert list(found) == ["a.x", "b", "c"]
    assert torch.equal(found["b"], scene.features[0])
    assert np.load(tmp_path / "scene" / "a.x.npy").shape == (4, 6, 16)
    large = read_pca_features(tmp_path / "scene", size=(8, 18))
    expected = F.interpolate(scene.features[2].permute(2, 0, 1)[None], (8, 18), mode="bilinear")
    torch.testing.assert_close(large["c"], expected[0].permute(1, 2, 0))
    with np.load(tmp_path / "scene" / "pca.npz") as parts:
        assert torch.equal(torch.from_numpy(parts["components"]), scene.components)


@pytest.mark.parametrize("reference_quirks", [False, True])
def test_metrics_are_those_of_the_loop(reference_quirks):
    p, t = pictures(2, 2, 7, 9), pictures(2, 2, 7, 9, seed=1)
    masks = pictures(2, 7, 9, seed=2) > 0.4
    arguments = {"window": 5, "sigma": 0.9}
    ssim = masked_ssim(p, t, masks, **arguments, reference_quirks=reference_quirks)
    psnr = masked_psnr(p, t, masks, reference_quirks=reference_quirks)
    for i in range(2):
        used = torch.ones(7, 9) if reference_quirks else masks[i]
        one, true = ((x[i] * masks[i] if reference_quirks else x[i]).tolist() for x in (p, t))
        at = used.nonzero().tolist()
        values = [
            oracle.ssim_at(a, b, row, column, **arguments, reflect=not reference_quirks)
            for a, b in zip(one, true, strict=True)
            for row, column in at
        ]
        assert ssim[i].item() == pytest.approx(sum(values) / len(values))
        squared = [
            (a[row][column] - b[row][column]) ** 2
            for a, b in zip(one, true, strict=True)
            for row, column in at
        ]
        expected = -10 * np.log10(sum(squared) / len(squared))
        assert psnr[i].item() == pytest.approx(expected)


def test_metrics_are_those_of_torchmetrics():
    t = F.interpolate(pictures(3, 3, 6, 8), (40, 56), mode="bicubic").clamp(0, 1)
    p = (t + 0.1 * noise(3, 3, 40, 56)).clamp(0, 1)
    whole = torch.ones(3, 40, 56, dtype=torch.bool)
    expected = peak_signal_noise_ratio(p, t, 1.0, reduction="none", dim=(1, 2, 3))
    torch.testing.assert_close(masked_psnr(p, t, whole), expected)
    _, maps = structural_similarity_index_measure(
        p, t, data_range=1.0, sigma=1.5, reduction="none", return_full_image=True
    )
    for masks in (whole, noise(3, 40, 56) > 1):
        expected = torch.stack([x.mean(0)[m].mean() for x, m in zip(maps, masks, strict=True)])
        torch.testing.assert_close(masked_ssim(p, t, masks), expected.double(), atol=1e-6, rtol=0)


def test_what_lies_outside_the_mask_does_not_matter_to_psnr():
    t, mask = pictures(1, 3, 12, 14), torch.zeros(1, 12, 14, dtype=torch.bool)
    mask[:, 2:6, 3:9] = True
    p = t + 0.01
    wild = torch.where(mask[:, None], p, torch.zeros_like(p))
    assert masked_psnr(wild, t, mask).item() == pytest.approx(40)
    assert masked_psnr(wild, t, mask, reference_quirks=True).item() == pytest.approx(
        40 - 10 * np.log10(24 / 168)
    )
    assert masked_psnr(t, t, mask).item() == float("inf")
    assert masked_psnr(p, t, mask & False).isnan().all()
    assert masked_ssim(p, t, mask & False).isnan().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda _: pca_features(noise(2, 3, 4, 5), dim=6), "dim=6 must be between 1 and .* D=5"),
        (lambda _: pca_features(noise(1, 1, 4, 5), dim=5), "and 4 patches"),
        (
            lambda path: write_pca_features(path, pca_features(noise(2, 3, 4, 5), dim=2), ["a"]),
            "names must be 2 different ones",
        ),
        (
            lambda path: write_pca_features(
                path, pca_features(noise(2, 3, 4, 5), dim=2), ["a", "b/c"]
            ),
            "names must be file names other than 'pca', got 'b/c'",
        ),
        (
            lambda _: masked_psnr(pictures(1, 3, 4, 5), pictures(1, 3, 4, 5), torch.ones(1, 4, 5)),
            r"masks bool \[B, h, w\], got .* torch.float32 \[1, 4, 5\]",
        ),
        (
            lambda _: masked_ssim(
                pictures(1, 3, 4, 5), pictures(1, 3, 4, 5), torch.ones(1, 4, 5).bool()
            ),
            "window=11 must be odd, and its half less than the image",
        ),
    ],
)
def test_refused(call, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        call(tmp_path)


def test_a_folder_without_features(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must hold NAME.npy of each view and pca.npz"):
        read_pca_features(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-4], "cannot open the array file .*a.npy"),
        (lambda content: content.replace(b"(3, 4, 2)", b"(3, 4000000000000, 2)"), "a.npy"),
        (lambda content: b"PK" + content, "cannot open the array file .*a.npy"),
        (lambda content: content.replace(b"<f4", b"<i4"), r"a.npy must be float \[H, W, d\]"),
    ],
)
def test_damaged_views_are_named(tmp_path, damage, message):
    np.save(tmp_path / "a.npy", np.ones((3, 4, 2), np.float32))
    np.savez(tmp_path / "pca.npz", mean=np.ones(2))
    assert read_pca_features(tmp_path)["a"].shape == (3, 4, 2)
    path = tmp_path / "a.npy"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        read_pca_features(tmp_path)

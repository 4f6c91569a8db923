import io
import random

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sslkit import backbones
from sslkit.evaluation.position import position_probe
from sslkit.rasa import RASAProjector, patch_positions
from sslkit.testing.references import rasa as oracle

D = 24
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def planted(
    count: int,
    *,
    seed: int = 0,
    grid: tuple[int, int] = (4, 6),
    mean: float = 0.0,
    forms: int = 3,
) -> tuple[Tensor, Tensor]:
    """Patches [B, H, W, D] = position signal + content in orthogonal subspaces.

    Also the orthonormal rows [2 * forms, D] that span the signal. In more than one form, position
    is not held by two directions.
    """
    axes = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(1))).Q
    generator = torch.Generator().manual_seed(2 + seed)
    p = patch_positions(*grid) - 0.5
    signal = torch.cat([3 * p, (6 * p).sin(), 8 * p**3][:forms], dim=-1)  # [H, W, 2 * forms]
    S = signal.shape[-1]
    content = torch.randn(count, *grid, D - S, generator=generator)
    return signal @ axes[:S] + content @ axes[S:] + mean, axes[:S]


def with_planes(num_iterations: int = 3, *, dim: int = D) -> RASAProjector:
    """A projector with random orthonormal planes."""
    rasa = RASAProjector(dim, num_iterations=num_iterations)
    directions = torch.randn(dim, 2 * num_iterations, dtype=torch.float64)
    rasa.basis.copy_(torch.linalg.qr(directions).Q.T)
    return rasa


# ------------------------------------------------------------------------------ the projection


@pytest.mark.filterwarnings("ignore:the first head learned nothing")
@pytest.mark.parametrize("solver", ["auto", "adamw"])
@pytest.mark.parametrize("num_iterations", [1, 4])
def test_basis_is_orthonormal_over_all_iterations(solver, num_iterations):
    x, _ = planted(100)
    rasa = RASAProjector(D, num_iterations=num_iterations)
    errors = rasa.fit(x.split(10), solver=solver, tolerance=0.0)
    T = num_iterations
    assert len(errors) == T
    identity = torch.eye(2 * T, dtype=torch.float64)
    torch.testing.assert_close(rasa.basis @ rasa.basis.T, identity, rtol=0, atol=1e-14)
    P = rasa.matrix()
    torch.testing.assert_close(P, P.T, rtol=0, atol=1e-15)
    torch.testing.assert_close(P @ P, P, rtol=0, atol=1e-14)
    assert torch.linalg.matrix_rank(P, atol=1e-3) == D - 2 * T


@given(st.integers(1, 5), st.sampled_from([(), (1,), (2, 3, 4), (0, 5)]), st.sampled_from(FLOATS))
def test_forward_and_matrix_are_the_oracles(num_iterations, shape, dtype):
    rasa = with_planes(num_iterations)
    x = torch.randn(*shape, D).to(dtype)
    y = rasa(x)
    assert y.dtype == dtype
    basis = rasa.basis.double().tolist()
    rows = [oracle.remove(row, basis) for row in x.double().reshape(-1, D).tolist()]
    expected = torch.tensor(rows, dtype=torch.float64).view(*shape, D)
    atol = max(5e-6, 4 * torch.finfo(dtype).eps)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=atol)
    planes = [basis[i : i + 2] for i in range(0, len(basis), 2)]
    P = torch.tensor(oracle.removal_matrix(planes, D), dtype=torch.float64)
    torch.testing.assert_close(rasa.matrix(), P, rtol=0, atol=1e-14)
    assert torch.equal(rasa.matrix(dtype=torch.float32), rasa.matrix().float())


def test_forward_keeps_its_precision_under_autocast():
    rasa, x = with_planes(), torch.randn(5, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = rasa(x)
    assert torch.equal(inside, rasa(x))


def test_state_dict_goes_into_a_fresh_module():
    rasa, file = with_planes(), io.BytesIO()
    torch.save(rasa.state_dict(), file)
    file.seek(0)
    fresh = RASAProjector(D, num_iterations=3)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh.basis, rasa.basis)


# ------------------------------------------------------------------------------------- the fit


@pytest.mark.parametrize(("grid", "mean"), [((4, 6), 0.0), ((7, 3), 100.0)])
def test_planted_position_is_removed_and_orthogonal_content_kept(grid, mean):
    train, signal = planted(400, grid=grid, mean=mean, forms=1)
    test, _ = planted(400, seed=1, grid=grid, mean=mean, forms=1)
    assert position_probe(train, test).r2 > 0.9
    rasa = RASAProjector(D)
    errors = rasa.fit(train.split(50))
    assert errors == sorted(errors)
    assert abs(position_probe(rasa(train), rasa(test)).r2) < 0.01
    assert (rasa(signal).square().sum()) < 1e-3 * signal.square().sum()
    kept = torch.eye(D) - signal.T @ signal  # onto the content
    assert (kept - kept @ rasa.matrix().float()).square().sum() < 1e-2 * kept.square().sum()


def test_position_in_several_forms_is_removed():
    (train, _), (test, _) = planted(400), planted(400, seed=1)
    rasa = RASAProjector(D, num_iterations=4)
    errors = rasa.fit([train])
    assert len(errors) > 2
    assert errors == sorted(errors)
    assert abs(position_probe(rasa(train), rasa(test)).r2) < 0.02


@pytest.mark.parametrize("ridge", [0.0, 0.01])
@pytest.mark.parametrize("num_iterations", [1, 2])
def test_the_last_plane_takes_what_the_others_left(num_iterations, ridge):
    (train, _), (test, _) = planted(400), planted(400, seed=1)
    rasa = RASAProjector(D, num_iterations=num_iterations)
    errors = rasa.fit([train], ridge=ridge, tolerance=0.0)
    assert position_probe(rasa(train), rasa(test)).r2 > 0.1
    assert rasa.fit([train], ridge=ridge) == errors  # of the heads before the ridge is raised
    assert position_probe(rasa(train), rasa(test)).r2 < 0.02


def test_heads_minimise_the_oracles_loss():
    """No small change of the fitted head, in any direction tried, has a lower loss."""
    x, _ = planted(2, grid=(2, 3))
    rasa, ridge = RASAProjector(D, num_iterations=1), 0.5
    (error,) = rasa.fit([x], ridge=ridge, tolerance=0.0)
    features, targets = x.double().reshape(-1, D).tolist(), oracle.positions(2, 3) * 2
    penalty = ridge * oracle.mean_variance(features) / 16
    # The head itself is not kept, but its rows span the basis: the best head in that plane must
    # reach the reported error, and its gradient must vanish off the plane too.
    coordinates = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    basis = rasa.basis.double()
    z, p = torch.tensor(features, dtype=torch.float64), torch.tensor(targets, dtype=torch.float64)
    optimizer = torch.optim.LBFGS(
        [coordinates], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def loss(weight: Tensor, intercept: Tensor) -> Tensor:
        residual = ((z - z.mean(0)) @ weight.T + intercept).sigmoid() - p
        return residual.square().sum(1).mean() + penalty * weight.square().sum()

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(coordinates[:, :2] @ basis, coordinates[:, 2])
        value.backward()
        return value

    optimizer.step(closure)
    weight = (coordinates[:, :2] @ basis).detach()
    intercept = coordinates[:, 2].detach() - weight @ z.mean(0)
    best = oracle.head_loss(weight.tolist(), intercept.tolist(), features, targets, penalty)
    norm = penalty * weight.square().sum().item()
    assert best - norm == pytest.approx(2 * error, rel=1e-5)
    rng = random.Random(0)
    for _ in range(40):
        step = [[1e-3 * rng.gauss(0, 1) for _ in range(D)] for _ in range(2)]
        moved = weight + torch.tensor(step, dtype=torch.float64)
        other = oracle.head_loss(moved.tolist(), intercept.tolist(), features, targets, penalty)
        assert other > best
    # The plane is what Gram-Schmidt makes of the head.
    plane = torch.tensor(oracle.gram_schmidt(weight.tolist()), dtype=torch.float64)
    torch.testing.assert_close(plane.T @ plane, basis.T @ basis, rtol=0, atol=1e-5)


def test_default_fit_does_not_depend_on_the_batching():
    x, _ = planted(60)
    wide, _ = planted(30, seed=5, grid=(2, 9))
    reference, other = (RASAProjector(D, num_iterations=3) for _ in range(2))
    errors = reference.fit([x, wide])
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    batches = [*wide.split(7), *x[order].split((1, 0, 40, 19))]
    assert other.fit(batches) == pytest.approx(errors, rel=1e-7)
    torch.testing.assert_close(other.matrix(), reference.matrix(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_any_float_type(dtype):
    x, _ = planted(100)
    rasa = RASAProjector(D, num_iterations=4)
    rasa.fit(x.to(dtype).split(30))
    assert rasa.basis.dtype == torch.float64
    # the tolerance, and on the patches of the fit a chance of D / 2400
    assert position_probe(rasa(x), rasa(x)).r2 < 0.03


@pytest.mark.filterwarnings("ignore:the first head learned nothing")
@pytest.mark.parametrize("solver", ["auto", "adamw"])
def test_fit_leaves_the_global_generator_alone_and_replaces_the_last_fit(solver):
    x, _ = planted(100)
    rasa = RASAProjector(D, num_iterations=2)
    state = torch.random.get_rng_state()
    first = rasa.fit(x.split(10), solver=solver)
    basis = rasa.basis.clone()
    assert rasa.fit(x.split(10), solver=solver) == first
    assert torch.equal(rasa.basis, basis)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore:the first head learned nothing")
def test_adamw_draws_its_heads_from_the_generator():
    x, _ = planted(100)
    rasa = RASAProjector(D, num_iterations=1)
    bases = []
    for seed in (0, 0, 1):
        rasa.fit(x.split(20), solver="adamw", generator=torch.Generator().manual_seed(seed))
        bases.append(rasa.basis.clone())
    assert torch.equal(bases[0], bases[1])
    assert not torch.equal(bases[0], bases[2])


def test_adamw_removes_position_when_it_has_time_to(monkeypatch):
    monkeypatch.setattr(
        "sslkit.rasa.solvers._ADAMW_LEARNING_RATE", 2e-2
    )  # in place of 100 times the data
    x, _ = planted(120)
    rasa = RASAProjector(D, num_iterations=5)
    errors = rasa.fit(x.split(3), solver="adamw")
    assert errors[0] < 0.01
    assert position_probe(x, x).r2 > 0.99
    assert position_probe(rasa(x), rasa(x)).r2 < 0.1


def test_adamw_says_when_it_learned_nothing():
    x, _ = planted(4)
    with pytest.warns(UserWarning, match="learned nothing in 5 epochs of 1 batches"):
        RASAProjector(D, num_iterations=1).fit([20 * x], solver="adamw")


def test_iterations_end_when_nothing_is_left():
    x, _ = planted(400)
    rasa = RASAProjector(D)
    errors = rasa.fit([x])
    assert len(errors) < 9
    chance = patch_positions(4, 6).var((0, 1), correction=0).mean().item()
    assert errors[-1] == pytest.approx(chance, rel=0.02)
    removed = rasa.basis.norm(dim=1)
    planes = len(errors) - 1  # the last head found nothing to remove
    assert removed[: 2 * planes].tolist() == pytest.approx([1.0] * (2 * planes))
    assert (removed[2 * planes :] == 0).all()


@pytest.mark.parametrize("ridge", [0.0, 0.1])
@pytest.mark.parametrize(
    "x",
    [
        pytest.param(torch.ones(3, 2, 2, D), id="constant"),
        pytest.param(torch.zeros(3, 2, 2, D), id="zero"),
        pytest.param(torch.randn(1, 1, 1, D), id="one patch"),
        pytest.param(planted(1, grid=(2, 3))[0], id="fewer patches than D"),
        pytest.param(planted(50)[0].repeat(1, 1, 1, 2)[..., ::2], id="rank-deficient"),
        pytest.param(planted(50, grid=(1, 8))[0], id="one row"),
        pytest.param(1e-20 * planted(50)[0].double(), id="tiny"),
        pytest.param(1e12 * planted(50)[0].double(), id="huge"),
    ],
)
def test_degenerate_features(x, ridge):
    rasa = RASAProjector(D, num_iterations=4)
    errors = rasa.fit([x], ridge=ridge)
    assert torch.tensor(errors).isfinite().all()
    gram = rasa.basis @ rasa.basis.T
    used = gram.diagonal().round()
    torch.testing.assert_close(gram, used.diag(), rtol=0, atol=1e-6)
    if x.std() == 0:
        assert used.sum() == 0
    if x.shape[1] == 1:
        assert used.sum() <= len(errors)  # no direction for the row, which does not vary


# ------------------------------------------------------------------------------------- folding


@given(
    st.integers(1, 4),
    st.integers(1, 30),
    st.booleans(),
    st.sampled_from(FLOATS[2:]),
    st.sampled_from(["output", "input"]),
)
def test_fold_is_exact(num_iterations, other, bias, dtype, side):
    rasa = with_planes(num_iterations)
    sizes = (other, D) if side == "output" else (D, other)
    linear = nn.Linear(*sizes, bias=bias, dtype=dtype)
    before = linear.weight.clone()
    x = torch.randn(2, 3, sizes[0], dtype=dtype)
    folded = rasa.fold(linear, side=side)
    expected = rasa(linear(x)) if side == "output" else linear(rasa(x))
    torch.testing.assert_close(folded(x), expected, rtol=0, atol=3e-6)
    if other != D:  # otherwise the side has to be named; see the next test
        torch.testing.assert_close(rasa.fold(linear)(x), expected, rtol=0, atol=3e-6)
    assert torch.equal(linear.weight, before)
    assert (folded.bias is not None) == bias


def test_fold_takes_the_output_side_when_both_have_D_features():
    rasa, linear, x = with_planes(2), nn.Linear(D, D), torch.randn(5, D)
    torch.testing.assert_close(rasa.fold(linear)(x), rasa(linear(x)), rtol=0, atol=3e-6)


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=(32, 48), embed_dim=48, depth=2, num_heads=2
    ).eval()
    nn.init.normal_(vit.norm.weight, 1.0, 0.3)
    nn.init.normal_(vit.norm.bias)
    return vit


def test_fold_into_vit_gives_the_projected_tokens(vit):
    rasa, images = with_planes(dim=48), torch.randn(2, 3, 32, 48)
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    folded = rasa.fold_into_vit(vit)
    tokens = vit.forward_features(images)
    projected = folded.forward_features(images)
    assert (projected - tokens).abs().max() > 0.1
    torch.testing.assert_close(projected, rasa(tokens), rtol=0, atol=1e-5)
    assert all(torch.equal(before[name], x) for name, x in vit.state_dict().items())
    twin = RASAProjector(48).fold_into_vit(vit)
    twin.load_state_dict(folded.state_dict())
    assert torch.equal(twin.forward_features(images), projected)


def test_a_folded_encoder_is_saved_and_loaded(tmp_path):
    encoder = backbones.create("sslkit_vit_micro", img_size=(16, 24)).eval()
    rasa, images = with_planes(dim=32), torch.randn(2, 3, 16, 24)
    expected = rasa(encoder(images).patches)
    encoder.vit = rasa.fold_into_vit(encoder.vit)
    backbones.save(encoder, tmp_path / "rasa.safetensors")
    patches = backbones.load(tmp_path / "rasa.safetensors").eval()(images).patches
    assert torch.equal(patches, encoder(images).patches)
    torch.testing.assert_close(patches, expected, rtol=0, atol=1e-5)


def test_fold_into_vit_of_a_norm_without_affine_and_of_half_weights(vit):
    rasa = with_planes(dim=48)
    vit = rasa.fold_into_vit(vit).bfloat16()
    vit.norm = nn.LayerNorm(48, elementwise_affine=False)
    folded = rasa.fold_into_vit(vit)
    torch.testing.assert_close(folded.norm[1].weight, rasa.matrix().float(), rtol=0, atol=0)
    vit.norm = nn.LayerNorm(48, bias=False, dtype=torch.bfloat16)
    assert rasa.fold_into_vit(vit).norm[1].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("norm", [nn.Identity(), nn.LayerNorm(24), None])
def test_fold_into_vit_needs_a_final_layer_norm(norm):
    vit = nn.Module()
    vit.norm = norm
    with pytest.raises(ValueError, match=r"final LayerNorm over D=48 .* at vit\.norm"):
        with_planes(dim=48).fold_into_vit(vit)


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("batches", "error", "match"),
    [
        (iter([torch.zeros(1, 2, 2, D)]), TypeError, "re-iterable, a list"),
        ([], ValueError, "no patches"),
        ([torch.zeros(0, 2, 2, D)], ValueError, "no patches"),
        ([torch.zeros(1, 2, 2, D), torch.zeros(1, 2, 2, 5)], ValueError, r"batch 1 .* 2, 2, 5\]"),
        (torch.zeros(3, 2, 2, D), ValueError, r"batch 0 .*\(one tensor .* passed as \[x\]\)"),
        (
            [torch.zeros(1, 2, 2, D, dtype=torch.int64)],
            ValueError,
            "must hold float .* is torch.int64",
        ),
        ([torch.full((1, 2, 2, D), torch.nan)], ValueError, "NaN or infinite"),
        (
            [torch.tensor([1.0, torch.inf]).expand(1, 2, 12, 2).reshape(1, 1, 2, D)],
            ValueError,
            "NaN or",
        ),
    ],
)
def test_bad_batches(batches, error, match):
    rasa = with_planes()
    before = rasa.basis.clone()
    with pytest.raises(error, match=match):
        rasa.fit(batches)
    assert torch.equal(rasa.basis, before)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: RASAProjector(D, num_iterations=0), "num_iterations must be at least 1"),
        (lambda: RASAProjector(18), "dim must exceed .* 18"),
        (lambda: with_planes()(torch.zeros(2, 5)), r"D=24\], got torch.float32 \[2, 5\]"),
        (lambda: with_planes().fold(nn.Linear(5, 2)), "input side, got in_features=5"),
        (lambda: with_planes().fit([], solver="sgd"), "solver must be one of .*'adamw'.*'sgd'"),
        (lambda: with_planes().fit([], ridge=-1.0), "ridge must be"),
        (lambda: with_planes().fit([], tolerance=1.0), "tolerance must lie"),
        (lambda: patch_positions(0, 3), "at least one cell, got 0 x 3"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()


# -------------------------------------------------------- what exact least squares finds afterwards


def least_squares_r2(features: Tensor) -> float:
    """R² of the positions on all directions of [B, H, W, D], adjusted: 0 is chance."""
    B, H, W, _ = features.shape
    rows = features.double().flatten(0, 2)
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
    p = patch_positions(H, W, dtype=torch.float64).expand(B, H, W, 2).reshape(-1, 2)
    fit = rows @ torch.linalg.lstsq(rows, p, driver="gelsd").solution
    r2 = 1 - (p - fit).square().sum() / (p - p.mean(0)).square().sum()
    return 1 - (1 - r2.item()) * (len(rows) - 1) / (len(rows) - rows.shape[1])


def rotated(dim: int, planes: int, *, share: float, scale: float) -> tuple[Tensor, Tensor]:
    """Float64 features [40, 12, 12, D] with a large share of position, in no special directions.

    Also the orthonormal rows [2 * planes, D] that hold it.
    """
    generator = torch.Generator().manual_seed(dim)
    x = torch.randn(40, 12, 12, dim, generator=generator, dtype=torch.float64)
    p = patch_positions(12, 12, dtype=torch.float64)
    for t in range(planes):
        x[..., 2 * t : 2 * t + 2] += share * p ** (t + 1)
    axes = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q
    return scale * x @ axes, axes[: 2 * planes]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("dim", "planes", "share", "scale"),
    [(32, 1, 3.0, 1.0), (64, 4, 300.0, 1e-3), (96, 9, 30.0, 1e2)],
)
def test_exact_least_squares_finds_nothing(dim, planes, share, scale, dtype):
    x, basis = rotated(dim, planes, share=share, scale=scale)
    rasa = RASAProjector(dim, num_iterations=planes)
    rasa.basis.copy_(basis)
    assert least_squares_r2(x.to(dtype)) > 0.4
    assert abs(least_squares_r2(rasa(x.to(dtype)))) < 0.01
    assert abs(least_squares_r2(rasa.half()(x.to(dtype)))) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_least_squares_finds_nothing_after_a_fit(dtype):
    x, _ = rotated(32, 1, share=3.0, scale=1.0)
    rasa = RASAProjector(32, num_iterations=5)
    rasa.fit(x.float().split(10))
    assert least_squares_r2(x) > 0.4
    assert abs(least_squares_r2(rasa(x.to(dtype)))) < 0.02
    if dtype == torch.float64:
        assert abs(least_squares_r2(x @ rasa.matrix())) < 0.02


def test_the_probe_sees_what_a_float32_basis_leaves_in_float64():
    x, basis = rotated(32, 1, share=30.0, scale=1.0)
    rasa = RASAProjector(32, num_iterations=1)
    rasa.basis.copy_(basis)
    low = basis.float().double()
    assert position_probe(x[:20] - (x[:20] @ low.T) @ low, x[20:] - (x[20:] @ low.T) @ low).r2 > 0.5
    assert abs(position_probe(rasa(x[:20]), rasa(x[20:])).r2) < 0.02


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_basis_of_any_type_is_loaded_orthonormal(stored):
    rasa, fresh = with_planes(), nn.Sequential(RASAProjector(D, num_iterations=3))
    fresh.load_state_dict({"0.basis": rasa.basis.to(stored)})
    gram = fresh[0].basis @ fresh[0].basis.T
    torch.testing.assert_close(gram, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-14)
    atol = 4 * torch.finfo(stored).eps
    torch.testing.assert_close(fresh[0].basis, rasa.basis, rtol=0, atol=atol)


def test_a_skewed_basis_is_not_loaded():
    skewed = with_planes().basis.clone()
    skewed[1] += 1e-3 * skewed[0]
    fresh = RASAProjector(D, num_iterations=3)
    with pytest.raises(RuntimeError, match="rows of basis are not orthonormal"):
        fresh.load_state_dict({"basis": skewed})
    assert not fresh.basis.any()

"""MatryoshkaProjector against an oracle of single numbers, its norms, sizes and errors."""

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sslkit.factored_logits import written
from sslkit.matryoshka import CosineLinear, MatryoshkaProjector
from sslkit.testing.references.matryoshka import scores

NESTINGS = ["slice", "slice_linear", "linear"]
SMALL = {"nesting_dims": (2, 5, 7), "hidden_dim": 6, "bottleneck_dim": 4}


def projector(**settings) -> MatryoshkaProjector:
    """Seven features in, (3, 7, 11) prototypes, with weights large enough to matter."""
    torch.manual_seed(0)
    module = MatryoshkaProjector(7, 11, **{**SMALL, **settings})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


@given(
    st.sampled_from(NESTINGS),
    st.booleans(),
    st.integers(1, 4),
    st.sampled_from([(7,), (3,), (1, 2, 3, 4, 5, 6, 7), (2, 5, 7), (1, 6)]),
    st.sampled_from([1e-4, 1.0, 1e4]),
)
def test_scores_are_the_oracles(nesting, normalize, num_layers, nesting_dims, scale):
    module = projector(
        nesting=nesting, normalize=normalize, num_layers=num_layers, nesting_dims=nesting_dims
    ).double()
    x = scale * torch.randn(2, 3, 7, dtype=torch.float64)
    levels = module(x)
    assert len(levels) == len(nesting_dims)
    for level, (dim, head, prototypes) in enumerate(
        zip(nesting_dims, module.heads, module.prototypes, strict=True)
    ):
        linears = [layer for layer in head if isinstance(layer, nn.Linear)]
        expected = [
            scores(
                row,
                dim=dim,
                nesting=nesting,
                layers=[(layer.weight.tolist(), layer.bias.tolist()) for layer in linears],
                prototypes=prototypes.weight.tolist(),
                normalize=normalize,
            )
            for row in x.reshape(6, 7).tolist()
        ]
        expected = torch.tensor(expected, dtype=torch.float64).view(2, 3, -1)
        torch.testing.assert_close(levels[level], expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("nesting", NESTINGS)
def test_a_level_sees_its_prefix_only(nesting):
    module = projector(nesting=nesting)
    x = torch.randn(4, 7, requires_grad=True)
    for dim, level in zip(module.nesting_dims, module(x), strict=True):
        (gradient,) = torch.autograd.grad(level.square().sum(), x, retain_graph=True)
        assert (gradient[:, :dim] != 0).all()
        outside = gradient[:, dim:]
        assert (outside != 0).all() if nesting == "linear" else (outside == 0).all()


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalized_scores_are_bounded_and_finite(scale, dtype):
    module = projector().to(dtype)
    with torch.no_grad():
        module.prototypes[0].weight *= 1e4
        module.prototypes[1].weight *= 1e-4
    x = (scale * torch.randn(8, 7)).to(dtype).requires_grad_()
    levels = module(x)
    torch.cat([level.float() for level in levels], dim=-1).sum().backward()
    slack = {torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
    assert all(level.dtype == dtype and level.abs().max() <= 1 + slack for level in levels)
    assert all(torch.isfinite(p.grad).all() for p in [x, *module.parameters()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("length", "score"), [(1.0, 1.0), (1e-7, 1.0), (1e-30, 1.0), (1e30, 1.0), (0.0, 0.0)]
)
def test_the_length_of_vectors_does_not_count(length, score, dtype):
    layer = CosineLinear(2, 1, bias=False).to(dtype)
    nn.init.constant_(layer.weight, 1e25)
    x = torch.full((1, 2), length / 2**0.5, dtype=dtype)
    assert layer(x).item() == pytest.approx(score, rel=1e-6)


def test_norms_of_half_precision_are_taken_in_float32():
    layer = CosineLinear(256, 1, bias=False).half()
    nn.init.constant_(layer.weight, 3e4)  # of length 4.8e5, where float16 ends at 6.5e4
    assert layer(torch.full((1, 256), 3e4).half()).item() == pytest.approx(1, abs=2**-10)


def test_zero_bottleneck_scores_zero():
    module = projector()
    with torch.no_grad():
        for parameter in module.heads.parameters():
            parameter.zero_()
    levels = module(torch.randn(2, 7))
    assert all((level == 0).all() for level in levels)
    sum(level.sum() for level in levels).backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


def test_length_of_prototypes_does_not_count_and_gets_no_gradient():
    module = projector()
    longer = copy.deepcopy(module)
    with torch.no_grad():
        longer.prototypes[2].weight *= 16  # a power of two: exact
    x = torch.randn(5, 7)
    before, after = module(x)[2], longer(x)[2]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    after.square().sum().backward()
    weight = longer.prototypes[2].weight
    along = (weight.grad * weight).sum(-1)
    assert weight.grad.norm() > 0
    torch.testing.assert_close(along, torch.zeros(11), rtol=0, atol=1e-5)


def test_released_head_is_unbounded_and_ends_in_gelu():
    module = projector(normalize=False)
    levels = module(100 * torch.randn(8, 7))
    assert max(level.abs().max() for level in levels) > 100
    assert all(isinstance(head[-1], nn.GELU) for head in module.heads)


def test_prototypes_of_the_released_head_start_at_length_one():
    """Its weight norm sets every length to 1; a normal of deviation 0.02 gave 0.02 sqrt(b)."""
    for b in (4, 96):
        module = MatryoshkaProjector(32, 64, hidden_dim=8, bottleneck_dim=b, normalize=False)
        for layer in module.prototypes:
            torch.testing.assert_close(layer.weight.norm(dim=-1), torch.ones(len(layer.weight)))


def test_the_length_of_normalised_prototypes_at_the_start():
    module = MatryoshkaProjector(32, 4096, hidden_dim=8, bottleneck_dim=384)
    lengths = module.prototypes[-1].weight.norm(dim=-1)
    assert lengths.mean().item() == pytest.approx(0.02 * 384**0.5, rel=0.01)  # 0.39


def test_bf16_autocast():
    module = projector()
    x = torch.randn(64, 7)
    exact = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = module(x)
    for a, b in zip(exact, rough, strict=True):
        assert b.dtype == torch.bfloat16
        # 0.062 at most over 50 seeds: three layers in bf16, precise to 2^-9, before the cosine
        assert (a - b.float()).abs().max() < 0.1
        assert b.abs().max() <= 1 + 2**-7


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_sizes_follow_the_formula(nesting, num_layers):
    module = projector(nesting=nesting, num_layers=num_layers)
    assert module.num_prototypes_per_level == (3, 7, 11)
    h, b = 6, 4
    for m, k, head, prototypes in zip(
        (2, 5, 7), (3, 7, 11), module.heads, module.prototypes, strict=True
    ):
        mlp = (m + 1) * h + (num_layers - 2) * (h + 1) * h + (h + 1) * b
        if num_layers == 1:
            mlp = (m + 1) * b
        nest = {"slice": 0, "slice_linear": (m + 1) * m, "linear": (7 + 1) * m}[nesting]
        assert sum(p.numel() for p in head.parameters()) == nest + mlp
        assert prototypes.weight.shape == (k, b)
        assert prototypes.bias is None


def test_initial_weights():
    module = MatryoshkaProjector(256, 512, nesting_dims=(256,), hidden_dim=256)
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all()
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.02)
            assert abs(parameter.mean().item()) < 4e-4


def test_sizes_of_the_paper():
    with torch.device("meta"):
        module = MatryoshkaProjector(768, 131072)
        levels = module(torch.empty(2, 5, 768))
    assert module.nesting_dims == (48, 96, 192, 384, 768)
    assert module.num_prototypes_per_level == (8192, 16384, 32768, 65536, 131072)
    assert [tuple(level.shape) for level in levels] == [
        (2, 5, k) for k in module.num_prototypes_per_level
    ]


def test_the_number_of_prototypes_must_be_given():
    with pytest.raises(TypeError, match="num_prototypes"):
        MatryoshkaProjector(768)


def test_state_dict_round_trip():
    module = projector(nesting="slice_linear")
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    torch.manual_seed(1)
    other = MatryoshkaProjector(7, 11, nesting="slice_linear", **SMALL)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(3, 7)
    assert all(torch.equal(a, b) for a, b in zip(module(x), other(x), strict=True))


def test_prototypes_can_be_frozen_alone():
    module = projector()
    module.prototypes.requires_grad_(False)
    sum(level.sum() for level in module(torch.randn(2, 7))).backward()
    assert all(p.grad is None for p in module.prototypes.parameters())
    assert all(p.grad is not None for p in module.heads.parameters())


@pytest.mark.parametrize("shape", [(7,), (0, 7), (2, 3, 4, 7)])
def test_any_leading_shape(shape):
    levels = projector()(torch.randn(shape))
    assert [tuple(level.shape) for level in levels] == [(*shape[:-1], k) for k in (3, 7, 11)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nesting_dims": (4, 2, 7)}, r"rise strictly .* in_dim=7, got \(4, 2, 7\)$"),
        ({"nesting_dims": (2, 2)}, "rise strictly"),
        ({"nesting_dims": (2, 8)}, "at most in_dim=7"),
        ({"nesting_dims": (0, 7)}, "at least 1"),
        ({"nesting_dims": ()}, r"got \(\)$"),
        ({"nesting_dims": None}, r"got \(0, 0, 1, 3, 7\), the default; pass nesting_dims"),
        ({"num_prototypes": 3}, r"level 0 \(m=2\) .* = 0 prototypes; .* at least 4"),
        ({"num_prototypes": 0}, "num_prototypes must be at least 1, got 0"),
        ({"hidden_dim": 0}, "hidden_dim must be at least 1"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"nesting": "prefix"}, "nesting must be one of .*'slice_linear'.* got 'prefix'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        MatryoshkaProjector(7, **{"num_prototypes": 11, **SMALL, **settings})


@pytest.mark.parametrize("shape", [(2, 6), ()])
def test_bad_features(shape):
    with pytest.raises(ValueError, match=r"x must be \[..., D=7\] features, got "):
        projector()(torch.zeros(shape))


@pytest.mark.parametrize("factored", [False, True])
def test_float32_logits_leave_autocast_after_the_mlps(factored: bool) -> None:
    arguments = {"hidden_dim": 32, "bottleneck_dim": 16}
    head = MatryoshkaProjector(64, 128, float32_logits=True, **arguments)
    plain = MatryoshkaProjector(64, 128, **arguments)
    plain.load_state_dict(head.state_dict())
    x = torch.randn(10, 64)
    with torch.autocast("cpu", torch.bfloat16):
        levels = [written(logits) for logits in head(x, factored=factored)]
        rounded = plain(x)
    exact = copy.deepcopy(plain).double()(x.double())
    for logits, low, right in zip(levels, rounded, exact, strict=True):
        assert (logits.dtype, low.dtype) == (torch.float32, torch.bfloat16)
        assert (logits - right).norm() < (low - right).norm()
        assert (logits - right).abs().max() < 0.02  # the MLPs are rounded


def test_a_layer_of_the_users_own_is_called() -> None:
    head = MatryoshkaProjector(16, 32, nesting_dims=(8, 16), hidden_dim=8, bottleneck_dim=4)
    x = torch.randn(5, 16)
    before = head(x)
    head.heads[1][3] = nn.Sequential(head.heads[1][3], nn.Dropout(1.0))  # zeros
    after = head(x)
    assert torch.allclose(before[0], after[0], atol=1e-6)
    assert not torch.allclose(before[1], after[1], atol=1e-2)

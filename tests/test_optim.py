import copy
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from sslkit import MatryoshkaProjector
from sslkit.backbones import create
from sslkit.testing.references.training import (
    clipped,
    dinov2_decays,
    dinov2_lr_scale,
    first_adamw_step,
    total_norm,
)
from sslkit.training.optim import (
    clip_gradients,
    moments,
    parameter_groups,
    set_hyperparameters,
)

DEPTH = 2  # of sslkit_vit_micro


def make_student(**vit_settings) -> nn.ModuleDict:
    heads = {"num_prototypes": 32, "hidden_dim": 8, "bottleneck_dim": 8}
    return nn.ModuleDict(
        {
            "backbone": create("sslkit_vit_micro", init_values=1e-5, **vit_settings),
            "dino_head": MatryoshkaProjector(32, **heads),
            "ibot_head": MatryoshkaProjector(32, nesting="slice_linear", **heads),
        }
    )


def settings_by_name(groups) -> dict[str, tuple[float, float, bool]]:
    return {
        name: (group["lr_scale"], group["weight_decay_scale"], group["is_last_layer"])
        for group in groups
        for name in group["names"]
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("backbone.mask_token", (0.125, 1.0, False)),
        ("backbone.vit.cls_token", (0.125, 1.0, False)),
        ("backbone.vit.reg_token", (0.125, 1.0, False)),
        ("backbone.vit.pos_embed", (0.125, 1.0, False)),
        ("backbone.vit.patch_embed.proj.weight", (0.025, 1.0, False)),
        ("backbone.vit.patch_embed.proj.bias", (0.025, 0.0, False)),
        ("backbone.vit.blocks.0.attn.qkv.weight", (0.25, 1.0, False)),
        ("backbone.vit.blocks.0.attn.qkv.bias", (0.25, 0.0, False)),
        ("backbone.vit.blocks.1.norm1.weight", (0.5, 0.0, False)),
        ("backbone.vit.blocks.1.ls2.gamma", (0.5, 0.0, False)),
        ("backbone.vit.norm.weight", (1.0, 0.0, False)),
        ("dino_head.heads.0.1.weight", (1.0, 1.0, False)),
        ("dino_head.heads.4.3.bias", (1.0, 0.0, False)),
        ("dino_head.prototypes.0.weight", (1.0, 1.0, True)),
        ("ibot_head.prototypes.4.weight", (1.0, 1.0, True)),
    ],
)
def test_rules(name, expected):
    groups = parameter_groups(make_student(reg_tokens=1), layer_decay=0.5)
    assert settings_by_name(groups)[name] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mask_token", (0.125, 1.0, False)),
        ("vit.cls_token", (0.125, 1.0, False)),
        ("vit.reg_token", (0.125, 1.0, False)),
        ("vit.patch_embed.proj.weight", (0.025, 1.0, False)),
        ("vit.patch_embed.proj.bias", (0.025, 0.0, False)),
        ("vit.blocks.0.attn.qkv.weight", (0.25, 1.0, False)),
        ("vit.blocks.0.attn.q_bias", (0.25, 0.0, False)),
        ("vit.blocks.0.attn.v_bias", (0.25, 0.0, False)),
        ("vit.blocks.1.gamma_1", (0.5, 0.0, False)),
        ("vit.blocks.1.gamma_2", (0.5, 0.0, False)),
        ("vit.blocks.1.mlp.fc1_g.weight", (0.5, 1.0, False)),
        ("vit.blocks.1.mlp.fc1_x.bias", (0.5, 0.0, False)),
        ("vit.norm.weight", (1.0, 0.0, False)),
    ],
)
def test_rules_of_dinov3s_names(name, expected):
    student = create(
        "vit_small_plus_patch16_dinov3_qkvb", embed_dim=32, depth=2, num_heads=2, num_reg_tokens=1
    )
    assert settings_by_name(parameter_groups(student, layer_decay=0.5))[name] == (
        pytest.approx(expected)
    )


def test_the_tokens_of_dinov3s_own_code_are_embeddings():
    student = nn.ParameterDict({"storage_tokens": torch.zeros(1, 4, 8)})
    blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    groups = parameter_groups(nn.ModuleDict({"blocks": blocks, "x": student}), layer_decay=0.5)
    assert settings_by_name(groups)["x.storage_tokens"] == (0.125, 1.0, False)


@pytest.mark.parametrize("vit_settings", [{}, {"reg_tokens": 2, "qk_norm": True}])
@pytest.mark.parametrize("layer_decay", [1.0, 0.75])
def test_rules_are_those_of_dinov2(vit_settings, layer_decay):
    groups = parameter_groups(
        make_student(**vit_settings), layer_decay=layer_decay, patch_embed_lr_scale=0.3
    )
    for name, (lr_scale, weight_decay_scale, _) in settings_by_name(groups).items():
        assert lr_scale == pytest.approx(dinov2_lr_scale(name, DEPTH, layer_decay, 0.3)), name
        assert weight_decay_scale == dinov2_decays(name), name


def test_each_trainable_parameter_is_in_one_group_with_its_name():
    student = make_student()
    student["backbone"].vit.pos_embed.requires_grad_(False)
    groups = parameter_groups(student)
    assert len(groups) == 5  # rest, undecayed, patch embedding twice, prototypes: few foreach calls
    names = Counter(name for group in groups for name in group["names"])
    trainable = {name: p for name, p in student.named_parameters() if p.requires_grad}
    assert names == Counter(trainable.keys())
    for group in groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            assert parameter is trainable[name]


def test_a_norm_of_any_name_is_not_decayed():
    """The `use_bn` of DINO's head: a norm inside a Sequential, which a rule by name misses."""
    groups = parameter_groups(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    assert settings_by_name(groups)["1.weight"][1] == 0.0


@pytest.mark.parametrize("last_layer_lr", [0.01, 0.003, 0.0])
def test_every_setting_reaches_its_parameters(last_layer_lr):
    """One step of AdamW moves each parameter by its own rate and decay, and no other."""
    student = make_student().double()
    optimizer = torch.optim.AdamW(parameter_groups(student, layer_decay=0.5))
    set_hyperparameters(optimizer, lr=0.01, weight_decay=0.3, last_layer_lr=last_layer_lr)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    for parameter in student.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for name, parameter in student.named_parameters():
        rate = last_layer_lr if ".prototypes." in name else 0.01
        expected = first_adamw_step(
            before[name].flatten().tolist(),
            parameter.grad.flatten().tolist(),
            lr=rate * dinov2_lr_scale(name, DEPTH, 0.5, 0.2),
            weight_decay=0.3 * dinov2_decays(name),
        )
        assert parameter.flatten().tolist() == pytest.approx(expected, rel=1e-12, abs=1e-14), name
        frozen = last_layer_lr == 0 and ".prototypes." in name
        assert torch.equal(parameter, before[name]) == frozen, name


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: parameter_groups(nn.Linear(2, 2), layer_decay=0.0), "layer_decay .* got 0.0"),
        (lambda: parameter_groups(nn.Linear(2, 2), layer_decay=1.5), "layer_decay .* got 1.5"),
        (lambda: parameter_groups(nn.Linear(2, 2), layer_decay=0.9), "found none; pass layer_dec"),
        (
            lambda: parameter_groups(
                nn.ModuleDict(
                    {k: nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(1, 1))}) for k in "ab"}
                ),
                layer_decay=0.9,
            ),
            r"one stack .* found \['a.blocks.', 'b.blocks.'\]",
        ),
        (lambda: parameter_groups(nn.Linear(2, 2), patch_embed_lr_scale=-1), "got -1"),
        (lambda: parameter_groups(nn.ReLU()), "no parameter with requires_grad=True"),
    ],
)
def test_bad_models(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_settings_that_cannot_fire_are_refused():
    plain = torch.optim.AdamW(nn.Linear(2, 2).parameters())
    with pytest.raises(
        ValueError, match=r"group 0 .* no names, lr_scale.*build the optimizer from"
    ):
        set_hyperparameters(plain, lr=1e-3, weight_decay=0.1, last_layer_lr=1e-3)
    headless = torch.optim.AdamW(parameter_groups(nn.Linear(2, 2)))
    set_hyperparameters(headless, lr=1e-3, weight_decay=0.1, last_layer_lr=1e-3)
    with pytest.raises(ValueError, match=r"last_layer_lr=0\.0 would have no effect"):
        set_hyperparameters(headless, lr=1e-3, weight_decay=0.1, last_layer_lr=0.0)


# ------------------------------------------------------------------------------- saved optimizers


def trained(student: nn.Module, **settings) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(parameter_groups(student, **settings), betas=(0.5, 0.5))
    for parameter in student.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


def fill_(optimizer: torch.optim.Optimizer, saved: dict[str, dict[str, torch.Tensor]]) -> None:
    """What a checkpoint does."""
    own = moments(optimizer)
    assert own.keys() == saved.keys()
    for name, state in own.items():
        assert state.keys() == saved[name].keys()
        for key, tensor in state.items():
            tensor.copy_(saved[name][key])


def test_moments_are_named_and_settings_are_no_part_of_them():
    old, new = make_student(), make_student()
    saved = copy.deepcopy(moments(trained(old)))
    assert saved.keys() == dict(old.named_parameters()).keys()
    optimizer = torch.optim.AdamW(parameter_groups(new, layer_decay=0.5), betas=(0.9, 0.999))
    fill_(optimizer, saved)
    for name, parameter in new.named_parameters():
        assert torch.equal(optimizer.state[parameter]["exp_avg_sq"], saved[name]["exp_avg_sq"])
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.999)}
    assert settings_by_name(optimizer.param_groups) == settings_by_name(
        parameter_groups(new, layer_decay=0.5)
    )


@pytest.mark.parametrize("settings", [{}, {"fused": True}])
def test_moments_before_the_first_step_are_those_it_starts_from(settings):
    asked, fresh = make_student(), make_student()
    fresh.load_state_dict(asked.state_dict())
    for parameter in (*asked.parameters(), *fresh.parameters()):
        parameter.grad = torch.ones_like(parameter)
    for student, ask in ((asked, True), (fresh, False)):
        optimizer = torch.optim.AdamW(parameter_groups(student), **settings)
        if ask:
            moments(optimizer)
        optimizer.step()
    for a, b in zip(asked.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)


def test_resumed_steps_are_bit_identical():
    straight = make_student()
    optimizer = trained(straight)
    resumed = make_student()
    resumed.load_state_dict(straight.state_dict())
    other = torch.optim.AdamW(parameter_groups(resumed), betas=(0.5, 0.5))
    fill_(other, copy.deepcopy(moments(optimizer)))
    for step in range(3):
        for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for one in (optimizer, other):
            set_hyperparameters(one, lr=0.1 / (step + 1), weight_decay=0.1, last_layer_lr=0.0)
            one.step()
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_moments_need_named_groups():
    with pytest.raises(ValueError, match="build the optimizer from parameter_groups"):
        moments(torch.optim.AdamW(nn.Linear(2, 2).parameters()))


# --------------------------------------------------------------------------------------- clipping


@given(
    st.integers(0, 2**31),
    st.sampled_from([1e-8, 0.1, 1.0, 100.0, 1e8]),
    st.sampled_from([0.5, 3.0]),
)
def test_clipping_is_per_module(seed, size, max_norm):
    generator = torch.Generator().manual_seed(seed)
    modules = {"backbone": nn.Linear(3, 5).double(), "head": nn.Linear(2, 1).double()}
    for module, factor in zip(modules.values(), (size, 1e-3), strict=True):
        for p in module.parameters():
            p.grad = factor * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    before = {
        name: [p.grad.flatten().tolist() for p in m.parameters()] for name, m in modules.items()
    }
    norms = clip_gradients(modules, max_norm)
    for name, module in modules.items():
        assert norms[name].item() == pytest.approx(total_norm(before[name]), rel=1e-12)
        for p, expected in zip(module.parameters(), clipped(before[name], max_norm), strict=True):
            # torch divides by norm + 1e-6: at most 2e-6 too small for norms above .5
            assert p.grad.flatten().tolist() == pytest.approx(expected, rel=2e-6)


def test_clipping_without_gradients_and_with_nan():
    bare, broken = nn.Linear(2, 2), nn.Linear(2, 2)
    broken.weight.grad = torch.full((2, 2), torch.nan)
    norms = clip_gradients({"bare": bare, "broken": broken}, 1.0)
    assert norms["bare"] == 0
    assert norms["broken"].isnan()
    with pytest.raises(ValueError, match="max_norm must be positive, got 0"):
        clip_gradients({"bare": bare}, 0)


def test_clipping_reads_nothing_back():
    """Fake tensors raise where a value would be copied to the host."""
    with FakeTensorMode():
        module = nn.Linear(3, 4)
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        assert clip_gradients({"backbone": module}, 3.0)["backbone"].shape == ()
        with pytest.raises(DataDependentOutputException):
            module.weight.grad.norm().item()


def test_a_part_has_a_rate_of_its_own():
    student = make_student()
    apart = parameter_groups(student, layer_decay=0.5, parts=("backbone",))
    assert settings_by_name(apart) == settings_by_name(parameter_groups(student, layer_decay=0.5))
    optimizer = torch.optim.AdamW(apart)
    scales = {"backbone": 0.25}
    set_hyperparameters(
        optimizer, lr=1.0, weight_decay=0.1, last_layer_lr=0.5, part_lr_scales=scales
    )
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    assert rates["backbone.vit.norm.weight"] == 0.25
    assert rates["backbone.vit.blocks.1.norm1.weight"] == 0.125
    assert rates["dino_head.heads.0.1.weight"] == 1.0
    assert rates["ibot_head.prototypes.4.weight"] == 0.5


def test_parts_that_are_not_there():
    with pytest.raises(ValueError, match="no trainable parameter under 'trunk'"):
        parameter_groups(make_student(), parts=("trunk",))
    optimizer = torch.optim.AdamW(parameter_groups(make_student()))
    with pytest.raises(ValueError, match="part_lr_scales: no group is of backbone"):
        set_hyperparameters(
            optimizer, lr=1.0, weight_decay=0.1, last_layer_lr=1.0, part_lr_scales={"backbone": 0.0}
        )

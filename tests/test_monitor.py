import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sslkit import Assignments
from sslkit.testing.references.training import mean_cosine, mean_deviation
from sslkit.training.monitor import CollapseMonitor, feature_std

# ----------------------------------------------------------------------------------------- spread


@given(st.integers(2, 7), st.integers(2, 9), st.integers(0, 2**31), st.floats(0, 50))
def test_feature_std_is_the_scaled_deviation_and_tells_the_mean_cosine(B, D, seed, offset):
    generator = torch.Generator().manual_seed(seed)
    x = offset + torch.randn(B, D, generator=generator, dtype=torch.float64)
    spread = feature_std(x).item()
    assert spread == pytest.approx(math.sqrt(D) * mean_deviation(x.tolist()), rel=1e-9)
    assert spread**2 == pytest.approx(1 - mean_cosine(x.tolist()), abs=1e-12)


def test_feature_std_of_uniform_directions_one_direction_and_one_sample():
    generator = torch.Generator().manual_seed(0)
    uniform = torch.randn(4096, 64, generator=generator)
    assert feature_std(uniform) == pytest.approx(1, abs=1e-3)
    lengths = torch.rand(8, 1, generator=generator) + 1
    assert feature_std(lengths * torch.ones(8, 64)) < 1e-3
    assert feature_std(torch.ones(8, 64, dtype=torch.bfloat16)).dtype == torch.float32
    assert feature_std(torch.ones(1, 64)).isnan()
    with pytest.raises(ValueError, match=r"features must be \[B, D\], got shape \(2, 3, 4\)"):
        feature_std(torch.ones(2, 3, 4))


# --------------------------------------------------------------------------------------- collapse

LEVELS = {"dino/level0": 16, "ibot/level0": 1024}
HEALTHY = {
    "target_entropy": {"dino/level0": 1.4, "ibot/level0": 0.0},  # sharp targets are no collapse
    "mean_entropy": {"dino/level0": math.log(16), "ibot/level0": 6.0},
    "losses": {"dino/level0": 2.0, "ibot/level0": 5.0},
    "spread": 0.6,
}
LIMIT = math.log(1024)
COLLAPSED = {
    "uniform targets": {"target_entropy": {"ibot/level0": 0.999 * LIMIT}},
    "one prototype": {"mean_entropy": {"ibot/level0": 0.01}},
    "uniform student": {"losses": {"ibot/level0": 0.9999 * LIMIT}},
    "one feature": {"spread": 0.001},
}


def make_monitor(**settings) -> CollapseMonitor:
    return CollapseMonitor(LEVELS, **{"grace_steps": 0, "patience": 1, **settings})


def test_a_healthy_run_is_silent():
    monitor = make_monitor()
    assert [monitor.update(step, **HEALTHY) for step in range(5)] == [[]] * 5


@pytest.mark.parametrize("sign", COLLAPSED)
def test_each_sign_is_told_once_and_shortly(sign):
    monitor = make_monitor()
    collapsed = {**HEALTHY, **COLLAPSED[sign]}
    (first,) = monitor.update(1_000_000, **collapsed)
    assert first.startswith(f"step 1000000: {sign}: ")
    assert first.endswith("See docs/recipe.md, Reading the curves")
    assert len(f"warning: {first}") <= 150
    if sign != "one feature":
        assert "ibot/level0" in first
        assert "ln K = 6.931" in first
    assert "dino" not in first
    assert monitor.update(1_000_001, **collapsed) == []
    assert monitor.update(1_000_002, **HEALTHY) == []
    assert monitor.update(1_000_003, **collapsed) == []


@pytest.mark.parametrize("loss", [2.106, 1.4, 1.37])
def test_a_loss_beyond_or_below_ln_K_is_not_that_of_a_uniform_student(loss):
    monitor = CollapseMonitor({"level": 4}, grace_steps=0, patience=1)  # ln 4 = 1.386
    nothing = {"target_entropy": {}, "mean_entropy": {}, "spread": 0.6}
    assert monitor.update(0, losses={"level": loss}, **nothing) == []
    (warning,) = monitor.update(1, losses={"level": 1.3863}, **nothing)
    assert warning.startswith("step 1: uniform student: loss 1.386 stays at ln K = 1.386 in level.")


def test_a_loss_on_its_way_past_ln_K_is_not_judged():
    monitor = make_monitor(loss_grace_steps=5)
    uniform = {**HEALTHY, **COLLAPSED["uniform student"]}
    assert [len(monitor.update(step, **uniform)) for step in range(7)] == [0, 0, 0, 0, 0, 1, 0]


@pytest.mark.parametrize("sign", COLLAPSED)
def test_grace_and_patience(sign):
    monitor = make_monitor(grace_steps=4, patience=3)
    collapsed = {**HEALTHY, **COLLAPSED[sign]}
    seen = [len(monitor.update(step, **collapsed)) for step in range(9)]
    assert seen == [0, 0, 0, 0, 0, 0, 1, 0, 0]
    monitor = make_monitor(patience=3)
    assert [len(monitor.update(s, **collapsed)) for s in (10, 11)] == [0, 0]
    assert monitor.update(12, **HEALTHY) == []  # gone before the patience was over
    assert [len(monitor.update(s, **collapsed)) for s in (13, 14, 15)] == [0, 0, 1]


def test_levels_that_collapse_share_one_warning():
    monitor = make_monitor()
    dino, both = {"dino/level0": math.log(16)}, {"dino/level0": math.log(16), "ibot/level0": LIMIT}
    (first,) = monitor.update(0, **{**HEALTHY, "losses": dino})
    assert "loss 2.773 stays at ln K = 2.773 in dino/level0." in first
    assert monitor.update(1, **{**HEALTHY, "losses": both}) == []
    (together,) = make_monitor().update(0, **{**HEALTHY, "losses": both})
    assert "ln K = 2.773 in dino/level0 and 1 more." in together


@pytest.mark.parametrize(
    ("setting", "sign", "values"),
    [
        (
            "uniform_targets",
            "uniform targets",
            lambda f: {"target_entropy": {"ibot/level0": f * LIMIT}},
        ),
        ("few_prototypes", "one prototype", lambda f: {"mean_entropy": {"ibot/level0": f * LIMIT}}),
        ("uniform_loss", "uniform student", lambda f: {"losses": {"ibot/level0": f * LIMIT}}),
        ("one_feature", "one feature", lambda f: {"spread": f}),
    ],
)
def test_thresholds_are_the_stated_fractions(setting, sign, values):
    worse = -1 if setting in ("few_prototypes", "one_feature") else 1
    for threshold in (0.3, 0.7):
        beyond = {**HEALTHY, "losses": {}, "target_entropy": {}, **values(threshold + worse * 0.01)}
        before = {**HEALTHY, "losses": {}, "target_entropy": {}, **values(threshold - worse * 0.01)}
        assert make_monitor(**{setting: threshold}).update(0, **before) == []
        (warning,) = make_monitor(**{setting: threshold}).update(0, **beyond)
        assert sign in warning


def test_nan_shows_no_sign():
    nothing = {
        name: {"dino/level0": math.nan} for name in ("target_entropy", "mean_entropy", "losses")
    }
    assert make_monitor().update(0, **nothing, spread=math.nan) == []


@pytest.mark.parametrize(
    ("logits", "sign"),
    [
        (torch.zeros(32, 1024), "uniform targets"),
        (100.0 * torch.eye(1024)[:1].expand(32, -1), "one prototype"),
        (100.0 * torch.eye(1024)[:32], None),
    ],
)
def test_the_usage_of_assignments_is_what_it_reads(logits, sign):
    usage = Assignments(logits, torch.zeros(1024), temperature=1.0).usage()
    warnings = make_monitor().update(
        0,
        target_entropy={"ibot/level0": usage.target_entropy.item()},
        mean_entropy={"ibot/level0": usage.entropy.item()},
        losses={},
        spread=0.5,
    )
    assert [sign in warning for warning in warnings] == ([] if sign is None else [True])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: CollapseMonitor({"a": 1}, grace_steps=0),
            r"at least 2, which is not so for \['a'\]",
        ),
        (lambda: make_monitor(patience=0), "patience must be at least 1, got 0"),
        (lambda: make_monitor(uniform_loss=1.0), "uniform_loss is a fraction .* got 1.0"),
        (
            lambda: make_monitor().update(0, **{**HEALTHY, "losses": {"dino/level9": 1.0}}),
            r"unknown levels \['dino/level9'\]; num_prototypes has \['dino/level0', 'ibot",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""The plan against the recipe itself: its networks, its memory, its products, its settings."""

import subprocess
import sys
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sslkit.commands.main import run as sslkit_command
from sslkit.training.plan import (
    HARDWARE,
    PRESETS,
    Strategy,
    Workload,
    between_steps,
    duration,
    flops,
    parameters,
    peak,
    phases,
    state_bytes,
    traffic,
)
from tests.recipe import batches, recipe, tiny, trainer


def main(words: list[str]) -> int:
    return sslkit_command(["plan", *words])


ALONE = Strategy("none")
# 15 % are promised and 3 % are measured; between them, so that a term left out is noticed.
TOLERANCE = 0.05
QKV_BIASES = {"qkv.bias", "q_bias", "v_bias"}


def network(settings: Any, global_size: int | None = None) -> Any:
    with torch.device("meta"):
        return recipe.FrancaNetwork(settings.model, global_size or settings.crops.global_size)


def workload(settings: Any, stage: Any = None) -> Workload:
    """What the plan has to know of a stage of the recipe, pretraining by default."""
    stage = stage or recipe.pretraining(settings)
    model, backbone = settings.model, network(settings).backbone
    block = backbone.vit.blocks[0]
    mlp, biases = block.mlp, [n for n, _ in block.attn.named_parameters() if n in QKV_BIASES]
    gated = hasattr(mlp, "w12") or hasattr(mlp, "fc1_g")
    return Workload(
        width=backbone.embed_dim,
        depth=backbone.depth,
        heads=backbone.num_heads,
        mlp_hidden=(mlp.w3 if hasattr(mlp, "w3") else mlp.fc2).in_features,
        mlp="swiglu" if gated else "gelu",
        qkv_biases=3 if biases == ["qkv.bias"] else len(biases),
        positions="rotary" if backbone.vit.pos_embed is None else "learned",
        patch_size=backbone.patch_size[0],
        in_chans=model.in_chans,
        registers=backbone.num_prefix_tokens - 1,
        global_size=stage.global_size,
        local_size=stage.local_size,
        num_local=settings.crops.num_local,
        batch_size=stage.batch_size,
        accumulation=settings.accumulation,
        num_prototypes=model.num_prototypes,
        nesting_dims=model.nesting_dims,
        nesting=model.nesting,
        head_hidden_dim=model.head_hidden_dim,
        head_layers=model.head_layers,
        dino_bottleneck=model.dino_bottleneck,
        ibot_bottleneck=model.ibot_bottleneck,
        normalize=model.normalize,
        mask_ratio=settings.masks.ratio,
        mask_probability=settings.masks.probability,
        sinkhorn_iterations=settings.targets.sinkhorn_iterations,
        factored_scores=model.factored_scores,
        activation_checkpointing=model.activation_checkpointing,
        precision="float32" if settings.precision == "float32" else "bfloat16",
    )


# -------------------------------------------------------------------------- presets and counts


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_recipes(name):
    settings = recipe.PRESETS[name]
    assert workload(settings) == PRESETS[name]
    highres = replace(PRESETS[name], global_size=518)
    assert workload(settings, recipe.high_resolution(settings)) == highres


@pytest.mark.parametrize("size", [224, 518])
@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_counted_exactly(name, size):
    real = network(recipe.PRESETS[name], size)
    counted = parameters(replace(PRESETS[name], global_size=size))
    parts = {"backbone": real.backbone, "dino_head": real.dino_head, "ibot_head": real.ibot_head}
    for part, module in parts.items():
        assert getattr(counted, part) == sum(p.numel() for p in module.parameters()), part
    assert counted.total == sum(p.numel() for p in real.parameters())


@pytest.mark.parametrize("nesting", ["slice", "slice_linear", "linear"])
def test_parameters_of_other_networks(nesting):
    settings = tiny(model={"backbone": "vit_small_patch14_reg4_dinov2", "nesting": nesting})
    settings = replace(settings, crops=recipe.Crops(global_size=42, local_size=28))
    real = network(settings)
    assert parameters(workload(settings)).total == sum(p.numel() for p in real.parameters())


@pytest.mark.parametrize(
    "name",
    [f"vit_small{plus}_patch16_dinov3{bias}" for plus in ("", "_plus") for bias in ("", "_qkvb")],
)
def test_parameters_of_networks_with_rotary_positions(name):
    settings = tiny(model={"backbone": name})
    settings = replace(settings, crops=recipe.Crops(global_size=48, local_size=32))
    real = network(settings)
    assert parameters(workload(settings)).total == sum(p.numel() for p in real.parameters())


# -------------------------------------------------------------------------------------- memory

CASES = {
    "blocks": {"batch_size": 32},
    "scores": {"batch_size": 16, "num_prototypes": 8192},
    "prototypes": {"batch_size": 8, "num_prototypes": 65536},
    "checkpoints": {"batch_size": 32, "activation_checkpointing": True},
    "checkpoints-scores": {
        "batch_size": 16,
        "num_prototypes": 4096,
        "activation_checkpointing": True,
    },
    "factored": {"batch_size": 32, "num_prototypes": 4096, "factored_scores": True},
    "factored-prototypes": {"batch_size": 8, "num_prototypes": 32768, "factored_scores": True},
    "accumulation": {"batch_size": 16, "num_prototypes": 8192, "accumulation": 2},
    "accumulation-factored": {
        "batch_size": 64,  # few images have another number of masked patches than expected
        "num_prototypes": 8192,
        "accumulation": 4,
        "factored_scores": True,
    },
    "narrow": {"batch_size": 64, "num_prototypes": 4096, "backbone": "sslkit_vit_micro"},
    "drop-path": {"batch_size": 64, "drop_path": 0.1, "backbone": "sslkit_vit_micro"},
    "unbounded": {"batch_size": 16, "num_prototypes": 1024, "normalize": False},
    "half": {"batch_size": 32, "num_prototypes": 1024, "precision": "bfloat16"},
    "registers": {
        "batch_size": 8,
        "backbone": "vit_small_patch14_reg4_dinov2",
        "global_size": 42,
        "local_size": 14,
    },
    "rotary": {
        "batch_size": 8,
        "backbone": "vit_small_plus_patch16_dinov3_qkvb",
        "global_size": 48,
        "local_size": 32,
    },
}


def case_settings(case: dict[str, Any]) -> Any:
    model = {"backbone": "sslkit_vit_tiny", "num_prototypes": 64}
    of_model = {f for f in recipe.Model.__dataclass_fields__ if f in case}
    of_crops = {f for f in ("global_size", "local_size") if f in case}
    rest = {k: v for k, v in case.items() if k not in of_model | of_crops}
    return tiny(
        model={**model, **{k: case[k] for k in of_model}},
        crops={"num_local": 2, **{k: case[k] for k in of_crops}},
        **rest,
    )


class Measured(NamedTuple):
    """Bytes that PyTorch has allocated on the CPU since before the trainer was made."""

    made: int
    """By the trainer alone: student and teacher."""
    before: int
    """When the second step begins."""
    peak: int
    """In the second step."""


def measure(settings: Any) -> Measured:
    """The running sum of the allocations and releases that the profiler records."""
    crops = settings.crops
    views = batches(settings.batch_size, global_size=crops.global_size, local_size=crops.local_size)
    batch = next(views)
    label = torch.profiler.record_function
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profiler:
        own = trainer(settings)
        with label("first"):
            own.step(0, batch)
        with label("second"):
            own.step(1, batch)
    events = list(profiler.profiler.kineto_results.events())
    starts = {e.name(): e.start_ns() for e in events if e.name() in ("first", "second")}
    made = before = now = top = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        if event.start_ns() < starts["first"]:
            made = now + event.nbytes()
        if event.start_ns() < starts["second"]:
            before = now + event.nbytes()
        now += event.nbytes()
        if event.start_ns() >= starts["second"]:
            top = max(top, now)
    return Measured(made, before, top)


@pytest.mark.parametrize("name", CASES)
def test_memory_is_what_a_step_allocates(name):
    """State, what lies there between steps, and the peak of a step, alone and beyond that."""
    settings = case_settings(CASES[name])
    work, measured = workload(settings), measure(settings)
    between, fullest = between_steps(work, ALONE), peak(work, ALONE, "cpu").total
    print(f"{name}: {measured.peak / 1e6:.1f} MB measured, {fullest / 1e6:.1f} MB planned")
    assert state_bytes(work, ALONE) / 2 == pytest.approx(measured.made, rel=0.01)  # no moments yet
    assert between == pytest.approx(measured.before, rel=TOLERANCE)
    assert fullest == pytest.approx(measured.peak, rel=TOLERANCE)
    assert fullest - between == pytest.approx(measured.peak - measured.before, rel=TOLERANCE)


def test_cases_reach_the_phases_that_can_be_fullest():
    """Or a wrong one of them would go unnoticed."""
    reached = {peak(workload(case_settings(c)), ALONE, "cpu").phase for c in CASES.values()}
    assert reached >= {
        "end of the student's forward",
        "losses",
        "backward of the iBOT head",
        "backward of the last block",
    }


def test_state_is_cut_among_the_shards():
    work = PRESETS["vitg14_laion"]
    whole = 16 * parameters(work).total
    assert state_bytes(work, Strategy("ddp", 64)) == whole
    assert state_bytes(work, Strategy("fsdp", 64)) == whole / 64
    assert state_bytes(work, Strategy("fsdp", 64, replicas=8)) == whole / 8


def test_buckets_and_gathered_parameters():
    """DDP has the gradients twice; FSDP gathers float32 heads and two bfloat16 blocks."""
    work = PRESETS["vitl14_in21k"]
    p = parameters(work)
    copies = {m.phase: m.copies for m in phases(work, Strategy("ddp", 64))}
    assert copies["optimizer"] == 4 * p.total
    assert copies["losses"] == 4 * p.total + 2 * p.backbone
    copies = {m.phase: m.copies for m in phases(work, Strategy("fsdp", 64))}
    assert copies["teacher's last block"] == 4 * p.heads + 2 * 2 * p.block
    assert copies["optimizer"] == 0


# ------------------------------------------------------------------- products, traffic and time


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True}])
def test_flops_are_what_pytorch_counts(options):
    """All masks of one size, so that there is nothing to average over.

    Attention runs as plain products, which every version of PyTorch counts alike; which kernels of
    attention its counter knows changes from one version to the next.
    """
    settings = tiny(
        model={"num_prototypes": 512, **options}, masks={"ratio": (0.5, 0.5), "probability": 1.0}
    )
    own, work = trainer(settings), workload(settings)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        own.step(0, next(batches(settings.batch_size)))
    D, B = work.width, work.batch_size
    # KoLeo's similarities of B x B class tokens of each view are not part of the plan.
    koleo = recipe.NUM_GLOBAL * 2 * B * B * D
    # The plan's attention is flash attention, whose backward computes q k^T once more.
    flash = B * work.depth * sum(count * 2 * n * n * D for count, n in work.crops)
    assert flops(work).total == pytest.approx(counter.get_total_flops() - koleo + flash)


def test_factored_scores_are_multiplied_again():
    work = PRESETS["vitb14_in21k"]
    rows = {384: (10, 2), 256: (work.masked, work.masked)}  # student, teacher, of an image

    def products(student: int, teacher: int) -> float:
        scores = sum((student * s + teacher * t) * b for b, (s, t) in rows.items())
        return 2 * work.batch_size * work.all_prototypes * scores

    assert flops(work).prototypes == pytest.approx(products(3, 1))
    factored = flops(replace(work, factored_scores=True))
    assert factored.prototypes == pytest.approx(products(4, 3 + 2))


def test_traffic():
    """Rings, written out for numbers that can be done by hand."""
    work = replace(PRESETS["vitb14_in21k"], accumulation=2)
    p = parameters(work)
    assert traffic(replace(work, accumulation=1), ALONE).total == 0
    ddp = traffic(work, Strategy("ddp", 4))
    assert ddp.gradients == 2 * 3 / 4 * 4 * p.total
    assert ddp.gathers == ddp.replicas == 0
    fsdp = traffic(work, Strategy("fsdp", 4))
    assert fsdp.gathers == pytest.approx(2 * 3 / 4 * (3 * 2 * p.backbone + 2 * 4 * p.heads))
    assert fsdp.gradients == 2 * 3 / 4 * 4 * p.total
    hsdp = traffic(work, Strategy("fsdp", 4, replicas=2))
    assert hsdp.gradients == 2 * 1 / 2 * 4 * p.total
    assert hsdp.replicas == 2 * 2 * 1 / 2 * 4 * p.total / 2
    prototypes = 2 * (8192 + 16384 + 32768 + 65536 + 131072)
    assert ddp.sinkhorn == 3 * 2 * 3 / 4 * 4 * prototypes
    assert ddp.koleo == 3 * 3 * 2 * 512 * 768 * 4


def test_duration():
    work, strategy, h100 = PRESETS["vitg14_laion"], Strategy("fsdp", 128), HARDWARE["h100"]
    expected = duration(work, strategy, h100)
    assert expected.compute > expected.overlapped  # hidden
    assert expected.total == expected.compute + expected.memory + expected.exposed
    slow = duration(work, strategy, replace(h100, inter_bandwidth=1e9))
    assert slow.overlapped > slow.compute
    assert slow.total == slow.overlapped + slow.memory + slow.exposed
    fast = duration(work, strategy, replace(h100, utilisation=0.8))
    assert fast.compute < 0.6 * expected.compute


# ------------------------------------------------------------------------------------- command


def test_command():
    """As it is typed, and without the packages of the recipe's extra."""
    forbidden = "import sys; sys.modules['sklearn'] = sys.modules['matplotlib'] = None; "
    run = "import runpy; runpy.run_module('sslkit', run_name='__main__')"
    arguments = ["plan", "--preset", "vitg14_laion", "--gpus", "128"]
    done = subprocess.run(
        [sys.executable, "-c", forbidden + run, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "vitg14_laion on 128 H100" in done.stdout
    for word in ("teacher", "activations", "scores", "TFLOP", "sinkhorn", "images/s", "Assumed"):
        assert word in done.stdout
    assert "does not fit" not in done.stdout


def test_command_says_what_would_fit(capsys):
    main(["--preset", "vitb14_in21k", "--gpus", "8"])
    out = capsys.readouterr().out
    assert "does not fit: " in out
    advice = out.split("it fits with ")[1].split(" (")[0]
    main(["--preset", "vitb14_in21k", "--gpus", "8", *advice.split()])
    assert "does not fit" not in capsys.readouterr().out
    gpus = out.split("as it is, on --gpus ")[1].split()[0]
    main(["--preset", "vitb14_in21k", "--gpus", gpus])
    assert "does not fit" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("--gpus 7", "--batch-size 3072 does not divide into --gpus 7"),
        ("--gpus 0", "--gpus must be at least 1, got 0"),
        ("--gpus 128 --accumulation 5", "--accumulation 5"),
        ("--gpus 8 --hsdp-replicas 3", "--hsdp-replicas 3 does not divide --gpus 8"),
        ("--gpus 8 --hsdp-replicas 2 --parallel ddp", "--hsdp-replicas needs --parallel fsdp"),
        ("--gpus 2 --parallel none", "--parallel none is for one GPU"),
        ("--utilisation 1.5", "--utilisation"),
        ("--flops 0", "--flops must be above 0"),
        ("--memory 2", "--reserve must be at least 0 and below --memory"),
        ("--preset vitb14", "did you mean vitb14_in21k?"),
    ],
)
def test_command_refuses_what_is_impossible(arguments, problem, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments.split())
    assert exit_.value.code == 2
    assert problem in capsys.readouterr().err

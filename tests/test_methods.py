"""Several methods on one engine: each trains, resumes, shares its work, takes a new loss term."""

import importlib.util
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import DTensor

from sslkit import MatryoshkaProjector, backbones
from sslkit.data import Batch
from sslkit.data.batch_masks import sharded_masks
from sslkit.evaluation.models import open_model
from sslkit.recipes import dinov2, dinov3, distill, lejepa, swav
from sslkit.recipes.franca import recipe as franca
from sslkit.sigreg import draw_slices
from sslkit.testing import textbook
from sslkit.testing.references import dinov2 as oracle
from sslkit.testing.references.sinkhorn import sinkhorn_in_exp_domain
from sslkit.training import Run, command, micro_batches
from sslkit.training.batch_norm import standardise
from sslkit.training.checkpoint import Checkpoints
from sslkit.training.metrics import read_metrics
from sslkit.training.parallel import Parallel
from tests.recipe import ALONE, SCRIPT, batches, saved_tensors

RECIPES = {
    "franca": franca.RECIPE,
    "dinov2": dinov2.RECIPE,
    "dinov3": dinov3.RECIPE,
    "distill": distill.RECIPE,
    "lejepa": lejepa.RECIPE,
    "swav": swav.RECIPE,
}
METHODS: dict[str, Any] = {
    "franca": franca.Franca,
    "dinov2": dinov2.DINOv2,
    "dinov3": dinov3.DINOv3,
    "distill": distill.Distill,
    "lejepa": lejepa.LeJEPA,
    "swav": swav.SwAV,
}
# What a method exports, by the name that its state has for it; of the others it is the teacher.
EXPORTED = {"distill": "average", "lejepa": "student", "swav": "student"}
SHORT = "--preset smoke --device cpu --workers 0 --steps 5 --batch-size 8 --scene-size 32"
SHORT += " --num-scenes 60 --crops.num-local 2 --log-every 1 --checkpoint-every 2"
SHORT += " --evaluation.num-train 20 --evaluation.num-test 10 --evaluation.knn 5"
SHORT += " --evaluation.online-every 0 --precision float32"
MICRO = ["--backbone", "sslkit_vit_micro"]
ROTARY = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "rope_rescale_coords": 2}
ROTARY["init_values"] = 1.0  # with 1e-5 the class tokens of all images are equal up to rounding
SMALL = {
    "dinov2": MICRO,
    "distill": MICRO,
    "lejepa": MICRO,
    "dinov3": [
        *("--backbone-settings", json.dumps(ROTARY), "--keep-every", "2"),
        *("--gram.teacher", "2", "--gram.steps", "4"),
    ],
}
OTHERS = [name for name in RECIPES if name != "franca"]


def words(name: str, output: Path, *more: str) -> list[str]:
    return [*SHORT.split(), *SMALL.get(name, []), "--output", str(output), *more]


def train(name: str, output: Path, *more: str) -> Path:
    command.main(RECIPES[name], words(name, output, "--stages", "pretrain", *more))
    return output


def settings_of(name: str, *more: str) -> Any:
    return command.parse(RECIPES[name], words(name, Path("no run here"), *more))


def method(name: str, settings: Any, parallel: Parallel = ALONE) -> Any:
    run = Run(settings, parallel)
    if name == "franca":
        return franca.Franca(run)
    return METHODS[name](run)


def trained_network(own: Any) -> Any:
    return own.network if hasattr(own, "network") else own.student


@pytest.mark.parametrize("name", RECIPES)
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        command.main(RECIPES[name], ["--help-all"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    own = {
        "franca": "--rasa.solver",
        "dinov2": "--mask-ratio",
        "dinov3": "--gram.teacher",
        "distill": "--teacher",
        "lejepa": "--sigreg",
        "swav": "--queue",
    }
    for flag in ("--steps", "--crops.num-local", "--evaluation.knn", own[name]):
        assert flag in printed, flag


@pytest.mark.parametrize(
    ("name", "flags", "problem"),
    [
        (
            "swav",
            "--accumulation 2",
            "--accumulation must be 1: SwAV has no teacher that assigns first",
        ),
        ("swav", "--queue -1", "--queue must be at least 0, got -1"),
        ("swav", "--temperature 0", "--temperature must be above 0"),
        ("swav", "--backbone resnet17", "network: unknown backbone 'resnet17'"),
        ("dinov2", "--momentum 0.9 1.1", "--momentum is a share"),
        ("dinov2", "--backbone resnet18", "network: timm cannot build 'resnet18'"),
        ("dinov2", "--crops.global-scale 2 3", "--crops: "),
        ("dinov2", "--evaluation.knn 0", "--evaluation.knn must be at least 1"),
        ("dinov3", "--gram.teacher 3", "--gram.teacher 3: no checkpoint of that step is kept"),
        ("dinov3", "--gram.teacher 6", "--gram.teacher 6: no checkpoint of that step is kept"),
        ("dinov3", "--keep-every 0", "--gram.teacher 2: no checkpoint of that step is kept"),
        ("dinov3", "--gram.every 0", "--gram.every must be at least 1"),
        ("dinov3", "--accumulation 2", "--accumulation must be 1"),
        ("distill", "--teacher /nowhere", "--teacher /nowhere: "),
        ("distill", "--preset demo", "--teacher is missing: the weights of the encoder to distill"),
        ("distill", "--temperature 0", "--temperature must be above 0"),
        ("lejepa", "--sigreg 1.5", "--sigreg is a share"),
        ("lejepa", "--num-slices 0", "--num-slices must be at least 1"),
        ("lejepa", "--accumulation 2", "--accumulation must be 1: SIGReg compares the whole batch"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    name: str, flags: str, problem: str, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=f"error: .*{problem}"):
        train(name, tmp_path / "run", *flags.split())
    assert not (tmp_path / "run" / "settings.json").exists()


# ----------------------------------------------------------------------------- resuming


class Killed(BaseException):
    """What nobody catches."""


@pytest.mark.parametrize("name", RECIPES)
def test_a_resumed_run_ends_like_an_uninterrupted_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(name, tmp_path / "whole")
    step_as_it_is = METHODS[name].step

    def killed(self: Any, step: int, images: Batch, *, watch: bool) -> Any:
        if step == 3:  # after the checkpoint of two steps
            raise Killed
        return step_as_it_is(self, step, images, watch=watch)

    with monkeypatch.context() as patch:
        patch.setattr(METHODS[name], "step", killed)
        with pytest.raises(Killed):
            train(name, tmp_path / "cut")
    assert not (tmp_path / "cut" / "pretrain.safetensors").exists()
    command.main(RECIPES[name], ["--output", str(tmp_path / "cut"), "--resume"])
    whole, cut = (
        saved_tensors(Checkpoints(tmp_path / run / "pretrain" / "checkpoints").latest())
        for run in ("whole", "cut")
    )
    assert whole.keys() == cut.keys()
    assert any("queues" in key for key in whole) == (name == "swav")
    for key, value in whole.items():
        assert torch.equal(value, cut[key]), key
    losses = [
        [row["loss"] for row in read_metrics(tmp_path / run / "pretrain" / "metrics.jsonl")]
        for run in ("whole", "cut")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 5


# ----------------------------------------------------------------------------- scores


@pytest.mark.parametrize("name", OTHERS)
def test_the_encoder_is_scored_and_can_be_read_again(name: str, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command.main(RECIPES[name], words(name, output, "--evaluation.online-every", "5"))
    results = json.loads((output / "results.json").read_text())
    encoders = {"raw pixels", "standardised pixels", "random init", "pretrain"}
    encoders |= {"anchor"} if name == "dinov3" else set()
    for kind in ("knn", "linear"):
        assert set(results[kind]) == set(results["intervals"][kind]) == encoders
        for encoder, (low, high) in results["intervals"][kind].items():
            assert 0 <= low <= results[kind][encoder] <= high <= 1
    assert results["test_images"] == {"knn": 10, "linear": 10}
    assert results["chance"] == dict.fromkeys(("knn", "linear"), pytest.approx(1 / 12))
    last = read_metrics(output / "pretrain" / "metrics.jsonl")[-1]
    assert {"knn/5", "rankme", "lidar"} <= set(last)

    model = open_model(str(output / "pretrain.safetensors"))
    assert model.name == "pretrain"
    own = method(name, command.parse(RECIPES[name], ["--output", str(output), "--resume"]))
    state = saved_tensors(Checkpoints(output / "pretrain" / "checkpoints").latest())
    trained = f"{EXPORTED.get(name, 'teacher')}."
    network = trained_network(own)
    network.load_state_dict(
        {k.removeprefix(trained): x for k, x in state.items() if k.startswith(trained)}
    )
    images = torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        found, expected = model.encoder.eval()(images), network.backbone.eval()(images)
    assert torch.equal(found.cls, expected.cls)
    assert torch.equal(found.patches, expected.patches)


# ----------------------------------------------------------------------------- several processes

IMAGES = 16
STEPS = (2, 3)  # the second has a queue to be balanced with


def shared_settings(name: str) -> Any:
    """Without clipping, so that gradients can be compared."""
    settings = replace(settings_of(name), batch_size=IMAGES)
    if name == "franca":
        return replace(settings, optim=replace(settings.optim, max_norm=1e9))
    return replace(settings, max_norm=1e9)


def outcome(name: str, parallel: Parallel, kind: str = "auto") -> dict[str, Tensor]:
    """Losses and gradients of two steps, all gradients as one vector."""
    own = method(name, replace(shared_settings(name), parallel=kind), parallel)
    network = trained_network(own)
    stream, found = batches(IMAGES), {}
    for step in STEPS:
        report = own.step(step, share(next(stream), parallel), watch=True)
        trained = [p for p in network.parameters() if p.requires_grad]
        gradients = torch.cat([whole(p.grad).flatten() for p in trained])
        found |= {f"step {step}: {term}": loss for term, loss in report.losses.items()}
        found |= {f"step {step}: gradients": gradients}
    return found


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share(images: Batch, parallel: Parallel) -> Batch:
    """Every ``world_size``-th image, as the loader deals them out."""
    own = slice(parallel.rank, None, parallel.world_size)
    return images._replace(
        global_crops=images.global_crops[:, own],
        local_crops=images.local_crops[:, own],
        labels=images.labels[own],
        epochs=images.epochs[own],
        indices=images.indices[own],
    )


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    parallel = Parallel(rank, 2, torch.device("cpu"), dist.group.WORLD)
    for name in RECIPES:
        expected = torch.load(folder / f"{name}.pt")
        for kind in ("ddp", "fsdp") if name in OTHERS else ("ddp",):
            for key, value in outcome(name, parallel, kind).items():
                error = (value - expected[key]).norm() / expected[key].norm()
                # AdamW enlarges the rounding of small gradients, which the second step shows.
                most = 1e-3 if key == f"step {STEPS[1]}: gradients" else 1e-4
                assert error < most, (name, kind, key, error)
    rows = torch.arange(12.0).reshape(6, 2).square()
    expected = standardise(rows)
    torch.testing.assert_close(
        standardise(rows[rank::2], group=dist.group.WORLD), expected[rank::2]
    )
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    for name in RECIPES:
        torch.save(outcome(name, ALONE), tmp_path / f"{name}.pt")
    mp.set_forkserver_preload([__name__])
    mp.start_processes(run_rank, (tmp_path,), nprocs=2, start_method="forkserver")


# ----------------------------------------------------------------------------- losses


@pytest.mark.parametrize("kind", ["sinkhorn", "centering"])
def test_the_terms_of_dinov2_are_the_released_ones(kind: str) -> None:
    K, B = 6, 3
    own = method("dinov2", settings_of("dinov2", "--num-prototypes", "6", "--targets", kind))
    with torch.no_grad():
        for parameter in own.teacher.module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    dino, ibot = oracle.DINOLoss(K), oracle.iBOTPatchLoss(K)
    stream = batches(B)
    for step, temperature in ((0, 0.5), (1, 0.6)):  # the second step has a centre
        images = next(stream)
        masks = sharded_masks(
            own.draw, images, step=step, seed=partial(own.run.seed, "masks"), ranks=ALONE
        )
        [[*crops, masks]] = micro_batches(*images.views, masks, count=1, device=ALONE.device)
        with torch.no_grad():
            teacher = own.teacher(crops[:1], masks, hide=False)
            student = own.student(crops, masks, hide=True)
        [targets] = own.targets([{"dino": teacher.dino, "ibot": teacher.ibot}], temperature)
        terms = own.losses(student, targets, masks)

        swapped = teacher.dino.unflatten(0, (2, B)).flip(0).flatten(0, 1)
        if kind == "centering":
            cls_targets = dino.softmax_center_teacher(swapped, temperature)
            dino.update_center(swapped)
            patches = ibot.softmax_center_teacher(teacher.ibot, temperature)
            ibot.update_center(teacher.ibot)
        else:
            count = torch.tensor([len(teacher.ibot)])
            cls_targets = dino.sinkhorn_knopp_teacher(swapped, temperature)
            patches = ibot.sinkhorn_knopp_teacher(teacher.ibot, temperature, count)
        views = list(student.dino.unflatten(0, (4, B)))  # two global, two local
        expected = dino.forward(views[2:], list(cls_targets.unflatten(0, (2, B))))
        expected += 2 * dino.forward([torch.cat(views[:2])], [cls_targets])
        assert terms["dino"].item() == pytest.approx(expected / 6, rel=1e-5)
        expected = ibot.forward_masked(student.ibot, patches, masks.flatten(1))
        assert terms["ibot"].item() == pytest.approx(expected, rel=1e-5)
        koleo = sum(oracle.KoLeoLoss().forward(x) for x in student.cls.chunk(2))
        assert terms["koleo"].item() == pytest.approx(koleo, rel=1e-5)


def test_the_loss_of_swav_is_that_of_swapped_prediction() -> None:
    """Equation 1 and 2 of the paper, in loops; the second step is balanced with the queue."""
    B, V = 4, 4  # two global, two local crops
    settings = settings_of("swav", "--num-prototypes", "5", "--queue", "8", "--batch-size", "4")
    own = method("swav", replace(settings, lr=0.0, freeze_prototypes=0.0))  # the network stays
    past = torch.empty(0, 5, dtype=torch.float64)
    stream = batches(B)
    for step in range(2):
        images = next(stream)
        [crops] = micro_batches(*images.views, count=1, device=ALONE.device)
        with torch.no_grad():
            logits = own.network(crops, None)[1].written().double().unflatten(0, (V, B))
        rows = torch.cat([logits[:2].flatten(0, 1), past])
        codes = sinkhorn_in_exp_domain(rows, settings.temperature, 3)[: 2 * B].unflatten(0, (2, B))
        total = 0.0
        for t in range(2):
            others = [v for v in range(V) if v != t]
            for v in others:
                log_probs = (logits[v] / 0.1).log_softmax(-1)
                total -= (codes[t] * log_probs).sum(-1).mean().item() / len(others) / 2
        assert own.step(step, images).loss.item() == pytest.approx(total, rel=1e-4)
        past = logits[:2].flatten(0, 1)


def test_the_loss_of_lejepa_is_that_of_its_algorithm() -> None:
    """Algorithm 2 of the paper, on projections with two global views."""
    own = method("lejepa", settings_of("lejepa"))
    views = torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(0))
    terms = own.losses(views, 3)
    centre = views[:2].mean(0)
    expected = torch.stack([(view - centre).square().mean() for view in views]).mean()
    assert terms["predict"].item() == pytest.approx(expected.item(), rel=1e-5)
    slices = draw_slices(6, own.run.settings.num_slices, own.run.generator("slices", 3))
    expected = torch.stack([textbook.sigreg(view, slices) for view in views]).mean()
    assert terms["sigreg"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert own.losses(views, 4)["sigreg"] != terms["sigreg"]  # new slices each step


@pytest.mark.parametrize("name", ["distill", "lejepa"])
def test_presets_freeze_no_last_layer_where_there_is_none(name: str) -> None:
    assert {preset.freeze_prototypes for preset in RECIPES[name].presets.values()} == {0.0}


# ----------------------------------------------------------------------------- Gram anchoring

ANCHORED = "--steps 4 --gram.every 2 --gram.updates 1 --checkpoint-every 1 --keep-every 1"


def checkpoint(output: Path, stage: str, step: int) -> dict[str, Tensor]:
    return saved_tensors(output / stage / "checkpoints" / f"step_{step:08d}")


def part(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{name}."): x for k, x in state.items() if k.startswith(f"{name}.")}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[key], other[key]) for key in one)


def test_the_gram_teacher_is_an_early_checkpoint_and_then_refreshed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = ["--stages", "pretrain", "anchor", *ANCHORED.split()]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command.main(RECIPES["dinov3"], words("dinov3", whole, *stages))
    early = part(checkpoint(whole, "pretrain", 2), "teacher")
    states = {step: checkpoint(whole, "anchor", step) for step in (1, 2, 4)}
    assert same(part(states[1], "gram_teacher"), early)
    assert same(part(states[2], "gram_teacher"), part(states[2], "teacher"))  # refreshed
    assert same(part(states[4], "gram_teacher"), part(states[2], "gram_teacher"))  # but once
    assert not same(part(states[4], "teacher"), part(states[2], "teacher"))

    rows = read_metrics(whole / "anchor" / "metrics.jsonl")
    assert all(row["loss/gram"] > 0 for row in rows)
    constant = ("lr", "last_layer_lr", "weight_decay", "teacher_temperature")
    assert {tuple(row[name] for name in constant) for row in rows} == {(1.5e-3, 1.5e-3, 0.04, 0.07)}
    assert all("loss/gram" not in row for row in read_metrics(whole / "pretrain/metrics.jsonl"))

    step_as_it_is = dinov3.DINOv3.step

    def killed(self: Any, step: int, images: Batch, *, watch: bool) -> Any:
        if self.stage == "anchor" and step == 3:
            raise Killed
        return step_as_it_is(self, step, images, watch=watch)

    with monkeypatch.context() as patch:
        patch.setattr(dinov3.DINOv3, "step", killed)
        with pytest.raises(Killed):
            command.main(RECIPES["dinov3"], words("dinov3", cut, *stages))
    command.main(RECIPES["dinov3"], ["--output", str(cut), "--resume"])
    assert same(checkpoint(cut, "anchor", 4), states[4])

    own = dinov3.DINOv3(
        Run(settings_of("dinov3", *stages, "--output", str(whole)), ALONE), "anchor"
    )
    assert same(own.student.state_dict(), part(checkpoint(whole, "pretrain", 4), "student"))
    assert same(own.gram_teacher.module.state_dict(), early)
    images = next(batches(2))
    masks = sharded_masks(
        own.draw, images, step=0, seed=partial(own.run.seed, "anchor", "masks"), ranks=ALONE
    )
    [[*crops, masks]] = micro_batches(*images.views, masks, count=1, device=ALONE.device)
    torch.manual_seed(own.run.seed("anchor", "rope", 0))
    with torch.no_grad():
        student = own.student(crops, masks, hide=True)["patches"]  # [V * B, H, W, D]
        large = torch.nn.functional.interpolate(crops[0], scale_factor=2, mode="bicubic")
        anchor = own.gram_teacher.module.backbone(large).patches
    assert anchor.shape[1:3] == tuple(2 * side for side in student.shape[1:3])
    resized = torch.nn.functional.interpolate(
        anchor.permute(0, 3, 1, 2), size=student.shape[1:3], mode="bicubic"
    ).permute(0, 2, 3, 1)
    expected = textbook.gram(student.flatten(1, 2), resized.flatten(1, 2))
    found = own.step(0, images).losses["gram"]
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)


# ----------------------------------------------------------------------------- distillation


@pytest.fixture
def teacher_file(tmp_path: Path) -> Path:
    """An encoder of another patch size and width, with heads of two levels."""
    torch.manual_seed(0)
    encoder = backbones.create("sslkit_vit_micro", img_size=48, patch_size=6, embed_dim=48)
    sizes: dict[str, Any] = {"nesting_dims": (24, 48), "hidden_dim": 8, "bottleneck_dim": 4}
    heads = {name: MatryoshkaProjector(48, 10, **sizes) for name in ("dino_head", "ibot_head")}
    path = tmp_path / "teacher.safetensors"
    backbones.save(encoder, path, heads=heads)
    return path


def test_a_student_matches_the_heads_of_its_teacher(teacher_file: Path, tmp_path: Path) -> None:
    own = method("distill", settings_of("distill", "--teacher", str(teacher_file)))
    assert own.num_prototypes == {"cls": 10, "patches": 10}
    B = 3
    images = next(batches(B))
    [crops] = micro_batches(*images.views, count=1, device=ALONE.device)
    with torch.no_grad():
        student = own.student(crops)
        terms, _ = own.losses(student, crops[0])
        (H, W), read = own.student.backbone.grid_size, backbones.load_pretrained(teacher_file)
        large = torch.nn.functional.interpolate(crops[0], (6 * H, 6 * W), mode="bicubic")
        tokens = read.encoder.eval()(large)
        logits = {
            "cls": read.heads["dino_head"](tokens.cls)[-1],
            "patches": read.heads["ibot_head"](tokens.patches.flatten(0, 2))[-1],
        }
    assert tokens.patches.shape[:3] == (2 * B, H, W)
    probs = {k: sinkhorn_in_exp_domain(x.double(), 0.07, 3) for k, x in logits.items()}
    cls, patches = student["cls"][0].unflatten(0, (-1, B)), student["patches"][0]
    expected = textbook.dino(cls, probs["cls"].unflatten(0, (2, B)), ignore_diagonal=False)
    assert terms["cls"].item() == pytest.approx(expected.item(), rel=1e-4)
    expected = textbook.cross_entropy(patches, probs["patches"], 0.1).mean()
    assert terms["patches"].item() == pytest.approx(expected.item(), rel=1e-4)

    before = {name: x.clone() for name, x in own.teacher.state_dict().items()}
    assert own.step(0, images, watch=True).usage.keys() == {"cls", "patches"}
    assert same(dict(own.teacher.state_dict()), before)
    output = train("distill", tmp_path / "run", "--teacher", str(teacher_file))
    assert open_model(str(output / "pretrain.safetensors")).encoder.embed_dim == 32


def test_a_student_takes_the_directions_of_a_teacher_without_heads() -> None:
    own = method("distill", settings_of("distill"))
    assert own.num_prototypes == {}
    B, images = 3, next(batches(3))
    [crops] = micro_batches(*images.views, count=1, device=ALONE.device)
    with torch.no_grad():
        student = own.student(crops)
        terms, _ = own.losses(student, crops[0])
        tokens = own.teacher(crops[0])

    def cosines(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))

    cls, patches = standardise(tokens.cls), standardise(tokens.patches.flatten(0, 2))
    views = student["cls"].unflatten(0, (-1, B))
    pairs = [cosines(own_view, view).mean() for own_view in views for view in cls.split(B)]
    assert terms["cls"].item() == pytest.approx(1 - torch.stack(pairs).mean().item(), abs=1e-5)
    expected = 1 - cosines(student["patches"], patches).mean().item()
    assert terms["patches"].item() == pytest.approx(expected, abs=1e-5)


# ----------------------------------------------------------------------------- a new loss term


def test_a_new_loss_term_is_two_places(tmp_path: Path) -> None:
    """A term without levels that penalises correlated features, in a copy of Franca's script."""
    text = SCRIPT.read_text()
    changes = {
        '        terms["koleo"] = ': '        terms["whitening"] = whitening(student.cls)\n',
        "    weight = vars(weights)\n": "    weight = {**vars(weights), 'whitening': 0.5}\n",
    }
    for place, line in changes.items():
        assert text.count(place) == 1
        text = text.replace(place, line if place.startswith("    weight") else line + place)
    text = text.replace("class FrancaLoss(", WHITENING + "class FrancaLoss(")  # the term itself
    script = tmp_path / "whitened.py"
    script.write_text(text)
    spec = importlib.util.spec_from_file_location("whitened", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["whitened"] = module
    spec.loader.exec_module(module)

    output = tmp_path / "run"
    short = ["--stages", "pretrain", "evaluate", "report", "--steps", "3"]
    dense = ["--evaluation.num-dense", "10"]
    command.main(module.RECIPE, words("franca", output, *short, *dense))
    rows = read_metrics(output / "pretrain" / "metrics.jsonl")
    for row in rows:
        terms = {name[5:]: value for name, value in row.items() if name.startswith("loss/")}
        weights = {"dino": 1.0, "ibot": 0.2, "koleo": 0.1, "whitening": 0.5}
        total = sum(weights[name.split("/")[0]] * value for name, value in terms.items())
        assert terms["whitening"] > 0
        assert row["loss"] == pytest.approx(total, rel=1e-5)
    assert "loss/whitening" in tensorboard_tags(output / "pretrain" / "tensorboard")
    drawn = module.report.draw.loss_curves(rows)
    assert "whitening" in {axes.get_title(loc="left") for axes in drawn.axes}
    assert (output / "figures" / "losses.png").exists()


WHITENING = '''
def whitening(features: Tensor) -> Tensor:
    """Mean squared correlation of two different features."""
    z = (features - features.mean(0)) / (features.std(0) + 1e-4)
    correlations = z.T @ z / len(z)
    return (correlations - correlations.diag().diag()).square().mean()


'''


def tensorboard_tags(folder: Path) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return set(events.Tags()["scalars"])

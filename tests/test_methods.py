"""Three methods on one engine: each trains, resumes, shares its work, and takes a new loss term."""

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

from sslkit.data import Batch
from sslkit.data.batch_masks import sharded_masks
from sslkit.evaluation.models import open_model
from sslkit.recipes import dinov2, swav
from sslkit.recipes.franca import recipe as franca
from sslkit.testing.references import dinov2 as oracle
from sslkit.testing.references.sinkhorn import sinkhorn_in_exp_domain
from sslkit.training import Run, command, micro_batches
from sslkit.training.batch_norm import standardise
from sslkit.training.checkpoint import Checkpoints
from sslkit.training.metrics import read_metrics
from sslkit.training.parallel import Parallel
from tests.recipe import ALONE, SCRIPT, batches, saved_tensors

RECIPES = {"franca": franca.RECIPE, "dinov2": dinov2.RECIPE, "swav": swav.RECIPE}
METHODS: dict[str, Any] = {
    "franca": franca.Franca,
    "dinov2": dinov2.DINOv2,
    "swav": swav.SwAV,
}
SHORT = "--preset smoke --device cpu --workers 0 --steps 5 --batch-size 8 --scene-size 32"
SHORT += " --num-scenes 60 --crops.num-local 2 --log-every 1 --checkpoint-every 2"
SHORT += " --evaluation.num-train 20 --evaluation.num-test 10 --evaluation.knn 5"
SHORT += " --evaluation.online-every 0 --precision float32"
ONE_BLOCK = {"dinov2": ["--backbone", "sslkit_vit_micro"]}
BOTH = ["dinov2", "swav"]


def words(name: str, output: Path, *more: str) -> list[str]:
    return [*SHORT.split(), *ONE_BLOCK.get(name, []), "--output", str(output), *more]


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


@pytest.mark.parametrize("name", RECIPES)
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        command.main(RECIPES[name], ["--help-all"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    own = {"franca": "--rasa.solver", "dinov2": "--mask-ratio", "swav": "--queue"}
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


@pytest.mark.parametrize("name", BOTH)
def test_the_encoder_is_scored_and_can_be_read_again(name: str, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command.main(RECIPES[name], words(name, output, "--evaluation.online-every", "5"))
    results = json.loads((output / "results.json").read_text())
    encoders = {"raw pixels", "standardised pixels", "random init", "pretrain"}
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
    trained = "student" if name == "swav" else "teacher"
    network = own.network if name == "swav" else own.student
    network.load_state_dict(
        {k.removeprefix(f"{trained}."): x for k, x in state.items() if k.startswith(trained)}
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
    network = own.network if name == "swav" else own.student
    stream, found = batches(IMAGES), {}
    for step in STEPS:
        report = own.step(step, share(next(stream), parallel), watch=True)
        gradients = torch.cat([whole(p.grad).flatten() for p in network.parameters()])
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
        for kind in ("ddp", "fsdp") if name in BOTH else ("ddp",):
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

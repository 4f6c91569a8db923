"""The recipe that continues from weights: what it takes from a file, and how it begins."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from sslkit import backbones
from sslkit.files import file_digest
from sslkit.recipes.franca.initial import _defaults
from sslkit.recipes.franca.presets import PRESETS
from sslkit.training.checkpoint import Checkpoints
from sslkit.training.metrics import read_metrics
from sslkit.training.run_files import write_settings
from tests.recipe import (
    RECIPE,
    batches,
    main,
    method,
    parse,
    saved_tensors,
    smoke,
    stored_settings,
    tiny,
)

FRESH = {"heads": "fresh", "head_warmup": 0.25}  # 3 of 12 steps
TRAINING = "--stages pretrain --checkpoint-every 1 --keep-last 9 --steps 4 --optim.lr-warmup 0.25"
HEADS = ("dino_head", "ibot_head")


def weights(network: torch.nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in network.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor], part: str) -> list[bool]:
    names = [name for name in a if name.startswith(f"{part}.")]
    assert names
    return [torch.equal(a[name], b[name]) for name in names]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a pretraining of two steps, from scratch."""
    output = tmp_path_factory.mktemp("finished") / "run"
    main(smoke(output, "--stages", "pretrain", "--steps", "2"))
    return output


@pytest.fixture
def file(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(finished / "pretrain.safetensors", tmp_path / "weights.safetensors"))


def begin(output: Path, file: Path | str, *arguments: str) -> dict[str, Tensor]:
    """Train from weights to the end; what is exported as ``init``, heads included."""
    main(smoke(output, *TRAINING.split(), "--init-from", str(file), *arguments))
    return exported(output / "init.safetensors")


def exported(path: Path) -> dict[str, Tensor]:
    loaded = backbones.load_pretrained(path)
    found = {f"backbone.{name}": x for name, x in loaded.encoder.state_dict().items()}
    for name, head in loaded.heads.items():
        found |= {f"{name}.{key}": x for key, x in head.state_dict().items()}
    return found


def checkpoint(output: Path, step: int) -> dict[str, dict[str, Tensor]]:
    """Student and teacher after a step."""
    state = saved_tensors(output / "pretrain" / "checkpoints" / f"step_{step:08d}")
    return {
        part: {n.removeprefix(f"{part}."): x for n, x in state.items() if n.startswith(f"{part}.")}
        for part in ("student", "teacher")
    }


# ------------------------------------------------------------------------------ what is taken


def test_own_export_continues_with_its_heads(finished: Path, file: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    initial = begin(output, file)
    last = checkpoint(finished, 2)["teacher"]
    assert initial.keys() == last.keys()
    assert all(torch.equal(x, last[name]) for name, x in initial.items())
    settings = stored_settings(output)
    assert (settings.init.heads, settings.init.sha256) == ("file", file_digest(file))
    assert settings.frozen_steps == 0
    first = checkpoint(output, 2)["student"]  # the very first step has a learning rate of 0
    for part in ("backbone", *HEADS):
        assert not all(same(first, initial, part)), part
    described = backbones.read_metadata(output / "pretrain.safetensors")
    assert json.loads(described["settings"])["init_from"] == str(file)


def test_fresh_heads_learn_alone_then_the_backbone_joins(file: Path, tmp_path: Path) -> None:
    words = ["--init.heads", "fresh", "--init.head-warmup", "0.5", "--model.num-prototypes", "32"]
    initial = begin(tmp_path / "run", file, *words)
    fresh = backbones.load_pretrained(file).heads["dino_head"].state_dict()
    assert initial["dino_head.prototypes.4.weight"].shape != fresh["prototypes.4.weight"].shape
    for step, resting in ((2, True), (3, True), (4, False)):  # the third step has a rate of 0
        for name, network in checkpoint(tmp_path / "run", step).items():
            assert all(same(network, initial, "backbone")) == resting, (step, name)
            for head in HEADS:
                assert not all(same(network, initial, head)), (step, name, head)


def test_a_timm_vit_has_no_heads(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0, depth=2)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224"}))
    path = tmp_path / "vit.safetensors"
    save_file(vit.state_dict(), path)
    initial = begin(tmp_path / "run", path, "--crops.local-size", "16")
    settings = stored_settings(tmp_path / "run")
    assert settings.init.heads == "fresh"
    assert settings.model.backbone.startswith("vit_tiny_patch16_224")
    assert torch.equal(
        initial["backbone.vit.blocks.1.attn.qkv.weight"], vit.blocks[1].attn.qkv.weight
    )
    assert initial["backbone.vit.pos_embed"].shape == (1, 1 + 2 * 2, 192)  # 32 px
    assert {"dino_head", "ibot_head"} <= {name.split(".")[0] for name in initial}


def test_student_and_teacher_begin_equal_and_drop_path_is_the_settings(file: Path) -> None:
    model = replace(tiny().model, drop_path_rate=0.3)
    settings = replace(tiny(init=FRESH, init_from=str(file)), model=model)
    loaded = backbones.load_pretrained(file)
    own = method(settings)
    student, teacher = weights(own.student), weights(own.teacher.module)
    assert all(torch.equal(x, teacher[name]) for name, x in student.items())
    assert all(
        same(
            student,
            {f"backbone.{n}": x for n, x in loaded.encoder.state_dict().items()},
            "backbone",
        )
    )
    assert own.student.backbone.vit.blocks[0].drop_path1.drop_prob == 0.3


# ------------------------------------------------------------------------------ how it begins


def test_the_backbone_rests_without_gradients_and_decay() -> None:
    settings = tiny(init=FRESH, optim={"lr_warmup": 0.25})
    own, stream = method(settings), batches(8)
    before = weights(own.student)
    scales = []
    for step in range(6):
        seen = own.step(step, next(stream))
        scales.append(seen.hyperparameters["backbone_lr_scale"])
        gradients = {p.grad is not None for p in own.student.backbone.parameters()}
        assert gradients == {step >= 3}
        assert (seen.gradient_norms["backbone"] > 0) == (step >= 3)
        assert all(same(weights(own.student), before, "backbone")) == (step <= 3)
        assert all(same(weights(own.teacher.module), before, "backbone")) == (step <= 3)
    assert scales == [0, 0, 0, 0, 0.5, 1]


def test_the_queue_balances_with_past_rows() -> None:
    alone, queued = (method(tiny(targets={"queue": rows})) for rows in (0, 64))
    assert {name.split(".")[0] for name in queued.state()["targets"]} == {"queues"}
    first, second = batches(8), batches(8)
    for step, differs in ((3, False), (4, True)):
        a, b = alone.step(step, next(first)), queued.step(step, next(second))
        assert torch.equal(a.loss, b.loss) != differs
    stamps = queued.targets.queues["dino/level_0"].stamps
    assert stamps.max() == 32  # two steps of 16


def test_the_queue_of_factored_keeps_features() -> None:
    settings = tiny(targets={"queue": 64}, losses={"koleo": 0.0}, model={"factored": True})
    plain = method(replace(settings, model=replace(settings.model, factored=False)))
    factored = method(settings)
    assert [queue.rows.shape[1] for queue in factored.targets.queues.values()] == [32] * 10
    first, second = batches(8), batches(8)
    for step in (3, 4):
        a, b = plain.step(step, next(first)), factored.step(step, next(second))
        # After a step of the teacher the prototypes differ by a little.
        assert b.loss.item() == pytest.approx(a.loss.item(), rel=1e-3)


# ------------------------------------------------------------------------------------- resuming


RESTING = ["--init.heads", "fresh", "--init.head-warmup", "0.5", "--targets.queue", "64"]
RESTING += ["--model.drop-path-rate", "0.3"]


@pytest.fixture(scope="module")
def uninterrupted(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from weights that are gone afterwards: heads alone, then all, with queues."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    shutil.copy(finished / "pretrain.safetensors", folder / "gone.safetensors")
    begin(folder / "run", folder / "gone.safetensors", *RESTING)
    (folder / "gone.safetensors").unlink()
    return folder / "run"


@pytest.mark.parametrize("stop", [1, 2, 3])  # in the warm-up, at its end, after it
def test_resuming_is_bit_identical_and_needs_no_file(
    stop: int, uninterrupted: Path, tmp_path: Path
) -> None:
    halves = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    (halves / "pretrain.safetensors").unlink()
    for later in range(stop + 1, 5):
        shutil.rmtree(halves / "pretrain" / "checkpoints" / f"step_{later:08d}")
    gone = str(uninterrupted.parent / "gone.safetensors")
    same_command = smoke(halves, *TRAINING.split(), "--init-from", gone, *RESTING, "--resume")
    short_command = ["--output", str(halves), "--resume", "--stages", "pretrain"]
    main(same_command if stop == 2 else short_command)
    runs = (halves, uninterrupted)
    own, other = (
        saved_tensors(Checkpoints(run / "pretrain" / "checkpoints").latest()) for run in runs
    )
    assert own.keys() == other.keys()
    assert any(name.startswith("targets.queues.ibot/level_4.rows") for name in own)
    assert all(torch.equal(x, other[name]) for name, x in own.items())


def test_another_file_under_the_same_name_is_refused(file: Path, tmp_path: Path) -> None:
    begin(tmp_path / "run", file)
    other = backbones.create("sslkit_vit_micro")
    backbones.save(other, file)
    with pytest.raises(SystemExit, match=r"init.sha256 was '\w+', is '\w+'"):
        begin(tmp_path / "run", file, "--resume")


def test_a_file_that_changes_before_the_first_checkpoint_is_refused(
    file: Path, tmp_path: Path
) -> None:
    words = smoke(tmp_path / "run", *TRAINING.split(), "--init-from", str(file))
    write_settings(parse(words), tuple(RECIPE.stages))
    backbones.save(backbones.create("sslkit_vit_micro"), file)
    with pytest.raises(SystemExit, match=r"init.sha256 was [0-9a-f]{64}, is [0-9a-f]{64}. Bring"):
        main(["--output", str(tmp_path / "run"), "--resume"])


def test_data_may_be_corrected_before_the_first_checkpoint(file: Path, tmp_path: Path) -> None:
    """The exported first weights alone are not a run that has begun."""
    output = tmp_path / "run"
    begin(output, file)
    (output / "pretrain.safetensors").unlink()
    shutil.rmtree(output / "pretrain")
    assert (output / "init.safetensors").exists()
    assert (output / "data.json").exists()
    begin(output, file, "--num-scenes", "61")


# --------------------------------------------------------------------------------------- preset


def test_the_preset_runs_from_end_to_end_on_a_tiny_folder(file: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for i in range(24):
        pixels = torch.randint(256, (40, 48, 3), dtype=torch.uint8, generator=generator)
        (tmp_path / "images" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(tmp_path / "images" / "ab"[i % 2] / f"{i}.png")
    words = f"--preset adapt --init-from {file} --data {tmp_path}/images --output {tmp_path}/run"
    words += " --steps 4 --batch-size 8 --workers 0 --targets.queue 64 --rasa.num-iterations 2"
    words += " --crops.num-local 2 --model.hidden-dim 32 --test-fraction 0.3 --log-every 1"
    main([*words.split(), "--evaluation.knn", "3", "--checkpoint-every", "2"])
    settings = stored_settings(tmp_path / "run")
    assert (settings.crops.global_size, settings.crops.local_size) == (32, 16)  # as of the file
    assert settings.init.heads == "fresh"
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {"random init", "init", "pretrain", "rasa"} <= set(results["knn"])
    assert "highres" not in results["knn"]
    assert "init" in results["online_knn"]
    assert (tmp_path / "run" / "report.md").exists()
    rows = read_metrics(tmp_path / "run" / "pretrain" / "metrics.jsonl")
    assert rows[0]["momentum"] == pytest.approx(0.99 ** (8 / 64))


@pytest.mark.parametrize(("patch", "size", "local"), [(14, 224, 98), (16, 224, 96), (4, 24, 12)])
def test_the_presets_sizes_are_those_of_the_file(patch: int, size: int, local: int) -> None:
    large = patch > 4
    with torch.device("meta"):
        encoder = backbones.create(
            "vit_tiny_patch16_224" if large else "sslkit_vit_micro",
            patch_size=patch,
            img_size=518 // patch * patch if large else size,
        )
    settings = _defaults(PRESETS["adapt"], "no file", encoder)
    assert (settings.crops.global_size, settings.crops.local_size) == (size, local)
    other = _defaults(PRESETS["demo"], "no file", encoder)
    assert other.crops == PRESETS["demo"].crops


# --------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--init-from /nowhere.safetensors", "--init-from /nowhere.safetensors: no "),
        ("--init-from FILE --model.backbone sslkit_vit_tiny", "of --init-from .* has sslkit_vit_m"),
        ("--init-from FILE --init.sha256 abc", "--init.sha256 abc: .* has [0-9a-f]{64}"),
        (
            "--init-from FILE --init.heads file --model.num-prototypes 32",
            "--init.heads file: the file's dino_head has num_prototypes=64 instead of 32",
        ),
        ("--init-from FILE --model.nesting-dims 4 4", "--model: nesting_dims must rise strictly"),
        ("--model.backbone-settings no", "--model: "),
        ("--init-from FOLDED", "RASA is folded into this encoder"),
        ("--init-from FILE --init.head-warmup 2", "--init.head-warmup is a share, got 2"),
        ("--preset adapt", "--preset adapt continues from weights"),
        ("--init.heads fresh", "--init.heads says whether the heads of --init-from"),
        ("--targets.queue -1", "--targets.queue -1 does not divide"),
        ("--targets.queue 8 --targets.kind centering", "--targets.queue is for sinkhorn"),
        (
            "--init-from FILE --init.heads fresh --losses.dino 0 --losses.ibot 0",
            "--losses.koleo alone teaches a head nothing",
        ),
    ],
)
def test_what_cannot_work(arguments: str, message: str, file: Path, tmp_path: Path) -> None:
    if "FOLDED" in arguments:
        from sslkit import RASAProjector

        encoder = backbones.create("sslkit_vit_micro")
        encoder.vit = RASAProjector(32, num_iterations=1).fold_into_vit(encoder.vit)
        backbones.save(encoder, tmp_path / "folded.safetensors")
    words = arguments.replace("FILE", str(file)).replace("FOLDED", f"{tmp_path}/folded.safetensors")
    with pytest.raises(SystemExit, match=message):
        main(smoke(tmp_path / "run", *words.split()))
    assert not (tmp_path / "run" / "pretrain").exists()

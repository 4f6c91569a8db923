"""sslkit's parts in the loops of others: each script learns, reads a folder, is what it says."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from sslkit.data import Crops
from tests.on_disk import write_image
from tests.oracles import dinov2
from tests.recipe import load_example


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(20):
        write_image(tmp_path / "images" / f"{i}.png", (40, 52), seed=i)
    return tmp_path / "images"


def short(name: str, steps: int) -> ModuleType:
    example: Any = load_example(name)
    example.STEPS = steps
    return example


# --- lightly -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_lightly_dinov2(folder: Path) -> None:
    first, last = load_example("lightly_dinov2").main([])
    assert last < first
    assert all(torch.tensor(short("lightly_dinov2", 2).main(["--images", str(folder)])).isfinite())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_lightly_dinov2_needs_a_batch(folder: Path) -> None:
    for path in sorted(folder.iterdir())[8:]:
        path.unlink()
    with pytest.raises(SystemExit, match=r"images holds 7 images to train on, not 16"):
        short("lightly_dinov2", 2).main(["--images", str(folder)])


# --- DINOv2 --------------------------------------------------------------------------------------


def test_dinov2_step(folder: Path) -> None:
    first, last = load_example("dinov2_step").main([])
    assert last < first
    for arguments in (["--centering"], ["--images", str(folder)]):
        assert all(torch.tensor(short("dinov2_step", 2).main(arguments)).isfinite())


@pytest.mark.parametrize("centering", [False, True])
def test_the_terms_of_the_step_are_dinov2s(centering: bool) -> None:
    example: Any = load_example("dinov2_step")
    example.PROTOTYPES = K = 6
    torch.manual_seed(0)
    B, L = 3, example.N_LOCAL
    model = example.SSLMetaArch(centering=centering)
    with torch.no_grad():
        for parameter in model.teacher.module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    crops = Crops(torch.randn(2 * B, 3, 32, 32), torch.randn(L * B, 3, 16, 16))
    masks = example.CyclicMaskGenerator(8)(2 * B)
    dino, ibot = dinov2.DINOLoss(K), dinov2.iBOTPatchLoss(K)
    for temperature in (0.5, 0.6):  # the second step has a centre
        terms = model.losses(crops, masks, temperature)
        logits = head_outputs(model, crops, masks)
        swapped = logits["teacher_cls"].unflatten(0, (2, B)).flip(0).flatten(0, 1)
        count = torch.tensor([len(logits["teacher_patches"])])
        if centering:
            targets = dino.softmax_center_teacher(swapped, temperature)
            dino.update_center(swapped)
            patches = ibot.softmax_center_teacher(logits["teacher_patches"], temperature)
            ibot.update_center(logits["teacher_patches"])
        else:
            targets = dino.sinkhorn_knopp_teacher(swapped, temperature)
            patches = ibot.sinkhorn_knopp_teacher(logits["teacher_patches"], temperature, count)
        student = list(logits["student_cls"].unflatten(0, (2 + L, B)))
        expected = dino.forward(student[2:], list(targets.unflatten(0, (2, B))))
        expected += 2 * dino.forward([torch.cat(student[:2])], [targets])
        assert terms["dino"].item() == pytest.approx(expected / (2 * L + 2), rel=1e-5)
        expected = ibot.forward_masked(logits["student_patches"], patches, masks.flatten(1))
        assert terms["ibot"].item() == pytest.approx(expected, rel=1e-5)
        koleo = sum(dinov2.KoLeoLoss().forward(x) for x in logits["cls"].chunk(2))
        assert terms["koleo"].item() == pytest.approx(0.1 * koleo, rel=1e-5)


@torch.no_grad()
def head_outputs(model: Any, crops: Crops, masks: Tensor) -> dict[str, Tensor]:
    student, teacher = model.student, model.teacher.module
    seen, masked = teacher["backbone"](crops.globals_), student["backbone"](crops.globals_, masks)
    local = student["backbone"](crops.locals_)
    return {
        "teacher_cls": teacher["dino_head"](seen.cls)[0],
        "teacher_patches": teacher["dino_head"](seen.patches[masks])[0],
        "student_cls": student["dino_head"](torch.cat([masked.cls, local.cls]))[0],
        "student_patches": student["dino_head"](masked.patches[masks])[0],
        "cls": masked.cls,
    }


# --- Lightning -----------------------------------------------------------------------------------

quiet = pytest.mark.filterwarnings("ignore:::lightning", "ignore:.*LeafSpec.*")


@pytest.fixture(scope="module")
def lightning_example() -> Any:
    example: Any = load_example("lightning_module")
    example.EPOCHS = 2  # of 4 batches
    return example


def loader(example: Any) -> Any:
    source = example.open_source("scenes", scene_size=(48, 48), num_scenes=64)
    return example.DataLoader(example.Views(source), batch_size=16, drop_last=True)


@quiet
def test_lightning_resumes_to_the_bit(lightning_example: Any, tmp_path: Path) -> None:
    lightning_example.main(["--output", str(tmp_path)])
    lightning_example.L.seed_everything(0, verbose=False)
    module = lightning_example.NestedDINO(total_steps=8)
    start = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    lightning_example.trainer(tmp_path, 2).fit(module, loader(lightning_example))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 8
    assert saved["hyper_parameters"] == {"total_steps": 8}
    assert saved["state_dict"].keys() == module.state_dict().keys()
    for name, tensor in module.state_dict().items():
        assert torch.equal(saved["state_dict"][name], tensor), name
    weight = "backbone.vit.patch_embed.proj.weight"
    for name in (f"student.{weight}", f"teacher.module.{weight}"):
        assert not torch.equal(start[name], module.state_dict()[name])


@quiet
def test_the_teacher_moves_once_a_step(lightning_example: Any, tmp_path: Path) -> None:
    module = lightning_example.NestedDINO(total_steps=4)
    momenta = []
    update = module.teacher.update
    module.teacher.update = lambda student, m: (momenta.append(m), update(student, m))
    trainer = lightning_example.trainer(tmp_path, 1)
    trainer.accumulate_grad_batches = 2
    trainer.fit(module, loader(lightning_example))
    cosine = lightning_example.cosine
    assert momenta == [cosine(step, start=0.95, end=1.0, total_steps=4) for step in (0, 1)]
    assert module.training
    assert not module.teacher.module.training


@quiet
def test_lightning_module_reads_a_folder(lightning_example: Any, folder: Path) -> None:
    losses = lightning_example.main(["--images", str(folder)])
    assert all(torch.tensor(losses).isfinite())


# --- Hugging Face --------------------------------------------------------------------------------


def test_cyclic_mask_in_hugging_face(folder: Path) -> None:
    first, last = load_example("cyclic_mask_in_hugging_face").main([])
    assert last < 0.8 * first
    losses = short("cyclic_mask_in_hugging_face", 2).main(["--images", str(folder)])
    assert all(torch.tensor(losses).isfinite())


def hidden_pixels(masks: Tensor, patch: int) -> Tensor:
    """[B, H, W] patches to bool [B, 1, h, w] pixels."""
    return masks.repeat_interleave(patch, 1).repeat_interleave(patch, 2).unsqueeze(1)


@torch.no_grad()
def test_hugging_face_masks_where_we_say() -> None:
    example: Any = load_example("cyclic_mask_in_hugging_face")
    torch.manual_seed(0)
    vit = example.model().eval()
    masks = example.CyclicMaskGenerator(8, mask_probability=1.0)(2)
    hidden = hidden_pixels(masks, 4)
    images, noise = torch.randn(2, 2, 3, 32, 32)
    seen = vit(images, bool_masked_pos=masks.flatten(1)).reconstruction
    blind = vit(images + noise * hidden, bool_masked_pos=masks.flatten(1)).reconstruction
    moved = vit(images + noise * ~hidden, bool_masked_pos=masks.flatten(1)).reconstruction
    assert torch.equal(seen, blind)
    assert not torch.equal(seen, moved)


@torch.no_grad()
def test_hugging_face_averages_masked_pixels() -> None:
    example: Any = load_example("cyclic_mask_in_hugging_face")
    vit = example.model().eval()
    masks = example.CyclicMaskGenerator(8, mask_probability=0.5)(4)
    images = torch.randn(4, 3, 32, 32)
    output = vit(images, bool_masked_pos=masks.flatten(1))
    error = (output.reconstruction - images).abs()
    expected = error.movedim(1, -1)[hidden_pixels(masks, 4)[:, 0]].mean()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-4)

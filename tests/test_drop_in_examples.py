"""sslkit's parts in the loops of others: each script learns, reads a folder, is what it says."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.on_disk import write_image
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

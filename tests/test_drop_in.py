"""docs/drop_in.md is true: each name, argument and default, and each claim about values.

lightly is run, birder where it is installed (its values: tests/test_drop_in_birder.py); DINOv2,
DINOv3 and Franca, which are no packages, stand in sslkit/testing/references as float64 loops under
their released signatures.
"""

import ast
import copy
import importlib
import inspect
import math
import random
import re
from pathlib import Path
from typing import Any

import lightly.loss
import lightly.models.modules
import lightly.models.utils
import lightly.utils.scheduler
import pytest
import torch
from lightly.loss.swav_loss import sinkhorn as lightly_sinkhorn
from lightly.models.utils import random_block_mask
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import sslkit
from sslkit import (
    CyclicMaskGenerator,
    DINOLoss,
    EMACentering,
    EMATeacher,
    GramLoss,
    KoLeoLoss,
    MatryoshkaProjector,
    SinkhornKnopp,
    iBOTLoss,
    sinkhorn_many,
    sum_over_levels,
)
from sslkit.backbones.encoder import ViTEncoder
from sslkit.schedules import cosine, linear_warmup, unfreeze, warmup_cosine
from sslkit.sigreg import sigreg
from sslkit.testing.references import dinov2, dinov3, franca

PAGE = (Path(__file__).parents[1] / "docs" / "drop_in.md").read_text()
OURS = [sslkit, *map(importlib.import_module, ["sslkit.schedules", "sslkit.backbones.encoder"])]
ORACLES = {"dinov2": dinov2, "dinov3": dinov3, "franca": franca}


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the page's Python blocks define, run from top to bottom."""
    torch.manual_seed(0)
    namespace: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE):
        exec(compile(block, "docs/drop_in.md", "exec"), namespace)
    return namespace


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    random.seed(0)


# --- the tables ----------------------------------------------------------------------------------


def tables() -> list[Any]:
    """(dotted name, rows of four cells) of each heading with a table under it."""
    found = []
    for section in re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]:
        name = section.splitlines()[0].strip("`")
        rows = [
            [cell.strip().strip("`") for cell in line.strip("|").split("|")]
            for line in section.splitlines()
            if line.startswith("| `")
        ]
        found.append(pytest.param(name, rows, id=name))
    return found


def theirs(name: str) -> Any:
    """The class or function, or the oracle that stands for it."""
    module, _, last = name.rpartition(".")
    base = name.split(".")[0]
    if base == "birder":
        pytest.importorskip("birder", reason="pip install 'sslkit[peers]'")
    return getattr(ORACLES[base] if base in ORACLES else importlib.import_module(module), last)


def parameters(function: Any) -> dict[str, Any]:
    """Default of each parameter but self, "required" for none."""
    found = inspect.signature(function).parameters.values()
    return {
        p.name: "required" if p.default is p.empty else p.default
        for p in found
        if p.name not in ("self", "args", "kwargs")
    }


def split(cell: str) -> tuple[str, str]:
    """``"a.b(c)"`` to ``("a.b", "c")``, ``"c"`` to ``("", "c")``."""
    match = re.fullmatch(r"(?:([\w.]+)\()?(\w+)\)?", cell)
    assert match, cell
    return match[1] or "", match[2]


def literal(cell: str) -> Any:
    return "required" if cell == "required" else ast.literal_eval(cell)


@pytest.mark.parametrize(("name", "rows"), tables())
def test_the_table_has_their_signature(name: str, rows: list[list[str]]) -> None:
    listed: dict[str, dict[str, Any]] = {}
    for argument, default, *_ in rows:
        method, parameter = split(argument)
        listed.setdefault(method, {})[parameter] = literal(default)
    home = theirs(name)
    for method, expected in listed.items():
        found = parameters(getattr(home, method) if method else home)
        assert list(found) == list(expected), method
        assert found == expected, method


@pytest.mark.parametrize(("name", "rows"), tables())
def test_the_table_has_our_signature(name: str, rows: list[list[str]]) -> None:
    for *_, argument, default in rows:
        if argument == "—":
            assert default == ""
            continue
        path, parameter = split(argument)
        first, *rest = path.split(".")
        home = next(getattr(module, first) for module in OURS if hasattr(module, first))
        for method in rest:
            home = getattr(home, method)
        assert parameters(home)[parameter] == literal(default), argument


def test_each_claim_names_a_test() -> None:
    cited = set(re.findall(r"`(test_\w+)`", PAGE))
    files = [
        "test_drop_in.py",
        "test_drop_in_birder.py",
        "test_drop_in_examples.py",
        "test_dinov2_methods.py",
    ]
    defined = "".join((Path(__file__).parent / file).read_text() for file in files)
    assert cited <= set(re.findall(r"def (test_\w+)", defined))
    assert len(cited) > 25


def test_the_page_runs(page: dict[str, Any]) -> None:
    assert page["loss"].isfinite()


# --- lightly -------------------------------------------------------------------------------------


def logits(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def test_dino_loss_is_lightlys() -> None:
    K, B = 12, 5
    reference, dino = lightly.loss.DINOLoss(K, center_momentum=0.8), DINOLoss()
    centering = EMACentering(K, momentum=0.8)
    for step, (V_t, V_s) in enumerate([(2, 2), (2, 7), (1, 3), (3, 2)]):
        temperature = 0.04 + 0.01 * step
        teacher, student = torch.randn(V_t, B, K), logits(V_s, B, K)
        expected = reference(list(teacher), list(student.unbind()), teacher_temp=temperature)
        (expected_gradient,) = torch.autograd.grad(expected, student)
        loss = dino(student, centering(teacher.flatten(0, 1), temperature))
        centering.update(teacher.flatten(0, 1))
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, student)[0], expected_gradient)
        torch.testing.assert_close(centering.center, reference.center.flatten())


def test_epochs_of_lightlys_dino_loss_are_a_linear_warmup() -> None:
    reference = lightly.loss.DINOLoss(
        8, warmup_teacher_temp=0.02, teacher_temp=0.07, center_momentum=1.0
    )
    teacher, student = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    for epoch in (0, 1, 17, 29, 30, 99):
        temperature = linear_warmup(epoch, start=0.02, end=0.07, warmup_steps=30)
        expected = reference(list(teacher), list(student), epoch=epoch)
        found = DINOLoss()(student, EMACentering(8)(teacher.flatten(0, 1), temperature))
        torch.testing.assert_close(found, expected)


def test_lightlys_losses_have_state_ours_have_none() -> None:
    reference = lightly.loss.DINOLoss(8)
    teacher, student = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    with torch.no_grad():
        assert reference(list(teacher), list(student)) != reference(list(teacher), list(student))
    centering = EMACentering(8)
    once, twice = (DINOLoss()(student, centering(teacher.flatten(0, 1), 0.04)) for _ in range(2))
    assert once == twice
    assert not [*DINOLoss().state_dict(), *iBOTLoss().state_dict(), *SinkhornKnopp().state_dict()]


def some_masks() -> Tensor:
    """[4, 3, 5] with 6, 0, 1 and 15 masked patches."""
    masks = torch.zeros(4, 3, 5, dtype=torch.bool)
    masks[0, 1:, 2:] = True
    masks[2, 2, 4] = True
    masks[3] = True
    return masks


def test_ibot_loss_is_lightlys() -> None:
    K, masks = 9, some_masks()
    M = int(masks.sum())
    reference, ibot = lightly.loss.IBOTPatchLoss(K, center_momentum=0.7), iBOTLoss()
    centering = EMACentering(K, momentum=0.7)
    for step in range(3):
        temperature = 0.04 + 0.01 * step
        teacher, student = torch.randn(M, K), logits(M, K)
        expected = reference(teacher, student, masks, teacher_temp=temperature)
        (expected_gradient,) = torch.autograd.grad(expected, student)
        loss = ibot(student, centering(teacher, temperature), masks)
        centering.update(teacher)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, student)[0], expected_gradient)
        torch.testing.assert_close(centering.center, reference.center.value.flatten())


def test_a_batch_without_masks() -> None:
    masks, nothing = torch.zeros(2, 3, 3, dtype=torch.bool), torch.zeros(0, 4)
    reference = lightly.loss.IBOTPatchLoss(4)
    reference(nothing, nothing, masks)
    assert reference.center.value.isnan().all()
    centering = EMACentering(4)
    assert iBOTLoss()(nothing, centering(nothing, 0.04), masks) == 0
    centering.update(nothing)
    assert (centering.center == 0).all()


def test_koleo_is_lightlys() -> None:
    x = logits(32, 8)
    expected, loss = lightly.loss.KoLeoLoss()(x), KoLeoLoss()(x)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, x)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)


def test_sigreg_is_lightlys() -> None:
    """lightly draws its slices from the global generator."""
    x = logits(2, 9, 6)
    torch.manual_seed(1)
    expected = lightly.loss.SIGReg(num_vectors=20)(x)
    (expected_gradient,) = torch.autograd.grad(expected, x)
    torch.manual_seed(1)
    slices = torch.randn(6, 20)
    loss = sigreg(x, slices / slices.norm(dim=0))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected_gradient)
    found = lightly.loss.LeJEPALoss(sigreg_num_vectors=20)
    torch.manual_seed(1)
    both = found(global_proj=x[:1], local_proj=x[1:])
    predict = (x - x[:1].mean(0)).square().mean()
    torch.testing.assert_close(0.05 * loss + 0.95 * predict, both)


def test_koleo_of_equal_rows() -> None:
    D, eps = 16, 1e-6
    reference, koleo = lightly.loss.KoLeoLoss(eps=eps), KoLeoLoss(eps=eps)
    equal = torch.ones(4, D)
    assert koleo(equal).item() == pytest.approx(-math.log(eps))
    assert reference(equal).item() == pytest.approx(-math.log(eps * (1 + D**0.5)))
    assert koleo(equal[:1]) == 0
    assert reference(equal[:1]).item() == pytest.approx(-math.log(eps * (1 + D**0.5)))


def test_cosine_schedule_is_ours_one_step_shorter() -> None:
    for step in range(12):
        expected = lightly.utils.scheduler.cosine_schedule(step, 10, 0.99, 1.0) if step < 11 else 1
        assert cosine(step, start=0.99, end=1.0, total_steps=9) == pytest.approx(expected)
    assert cosine(9, start=0.99, end=1.0, total_steps=10) < 1


def test_warmup_schedules() -> None:
    scheduler = lightly.utils.scheduler
    W, T = 5, 20
    for step in range(T):
        expected = scheduler.linear_warmup_schedule(step, W, 0.04, 0.07)
        found = linear_warmup(step, start=0.04, end=0.07, warmup_steps=W + 1)
        assert found == pytest.approx(expected)
        expected = scheduler.cosine_warmup_schedule(step, T, 1.0, 0.1, W, 0.2)
        found = warmup_cosine(
            step,
            peak=1.0,
            final=0.1,
            total_steps=T - 1,
            warmup_steps=W,
            start=0.2 + (1.0 - 0.2) / W,
        )
        assert found == pytest.approx(expected)


def student_and_teachers() -> tuple[nn.Module, nn.Module, EMATeacher]:
    """A student that has moved away from lightly's teacher and ours."""
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    copied, teacher = copy.deepcopy(student), EMATeacher(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += torch.randn_like(parameter)
    student(torch.randn(8, 3))  # moves the running statistics
    with torch.no_grad():
        lightly.models.utils.update_momentum(student, copied, m=0.9)
    teacher.update(student, 0.9)
    return student, copied, teacher


def test_parameters_of_update_momentum() -> None:
    student, copied, teacher = student_and_teachers()
    for mine, expected in zip(teacher.module.parameters(), copied.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, check_stride=False)
    assert not torch.equal(copied[0].weight, student[0].weight)


def test_buffers_of_update_momentum() -> None:
    student, copied, teacher = student_and_teachers()
    assert torch.equal(teacher.module[1].running_mean, student[1].running_mean)
    assert (copied[1].running_mean == 0).all()
    assert (student[1].running_mean != 0).all()


@pytest.mark.parametrize("num_iterations", [1, 3, 10])
def test_sinkhorn_is_lightlys(num_iterations: int) -> None:
    scores = 2 * torch.rand(20, 7) - 1
    expected = lightly_sinkhorn(scores.clone(), num_iterations, epsilon=0.05)
    targets = SinkhornKnopp(num_iterations)(scores, 0.05)
    torch.testing.assert_close(targets.probs(), expected, rtol=1e-4, atol=1e-6)


def test_large_logits() -> None:
    scores = torch.tensor([[4.5, 0.0], [0.0, 4.5], [4.4, 4.5]])
    assert lightly_sinkhorn(scores - 0.2, epsilon=0.05).isfinite().all()
    assert lightly_sinkhorn(scores, epsilon=0.05).isnan().any()
    assert SinkhornKnopp()(scores, 0.05).probs().isfinite().all()


@pytest.mark.parametrize("kind", ["DINOProjectionHead", "DINOv2ProjectionHead"])
def test_heads_of_lightly_are_a_projector_of_one_level(kind: str, page: dict[str, Any]) -> None:
    head = getattr(lightly.models.modules.heads, kind)(24, 16, 8, 12)
    projector = page["projector_from"](head.state_dict(), "layers")
    x = torch.randn(5, 24)
    (scores,) = projector(x)
    torch.testing.assert_close(scores, head(x), atol=1e-6, rtol=1e-5)


def test_trained_lengths_of_prototypes_are_refused(page: dict[str, Any]) -> None:
    head = lightly.models.modules.heads.DINOv2ProjectionHead(24, 16, 8, 12)
    frozen = lightly.models.modules.heads.DINOProjectionHead(24, 16, 8, 12)
    for each in (head, frozen):
        each(torch.randn(5, 24)).square().sum().backward()
        parameters = [p for p in each.parameters() if p.grad is not None]
        torch.optim.SGD(parameters, lr=0.1).step()
    page["projector_from"](frozen.state_dict(), "layers")
    with pytest.raises(ValueError, match="weight_g was trained away from 1"):
        page["projector_from"](head.state_dict(), "layers")


def test_masked_images_and_ratios_are_stratified_in_both() -> None:
    """Image i of the n masked ones, in order, has a ratio in the i-th of n equal parts."""
    B, H, W, low, high = 16, 12, 14, 0.1, 0.5
    masking = CyclicMaskGenerator((H, W), mask_ratio=(low, high), kind="block", shift=False)
    ours = masking(B, generator=torch.Generator().manual_seed(0))
    reference = random_block_mask((B, H, W))
    n = B // 2
    for masks, exact in ((ours, True), (reference, False)):
        counts = masks.flatten(1).sum(1).sort().values
        assert (counts[: B - n] == 0).all()
        assert (counts[B - n :] > 0).all()
        for i, count in enumerate(counts[B - n :].tolist()):
            bounds = [int(H * W * (low + (high - low) * j / n)) for j in (i, i + 1)]
            assert count <= bounds[1]
            assert not exact or count >= bounds[0]


def test_numbers_of_masked_patches() -> None:
    asked = 40
    counts = [
        int(lightly.models.utils.random_block_mask_image((8, 8), asked).sum()) for _ in range(60)
    ]
    assert max(counts) <= asked
    assert min(counts) < asked
    masking = CyclicMaskGenerator(8, kind="block")
    assert {int(masking.one(asked).sum()) for _ in range(60)} == {asked}


def test_exposure_of_patches() -> None:
    """How often the mean border patch is masked, for one of the central quarter."""
    side = 8
    masking = CyclicMaskGenerator(side, mask_ratio=(0.1, 0.5), mask_probability=1.0, kind="block")
    ours = masking(3000, generator=torch.Generator().manual_seed(0)).float().mean(0)
    reference = random_block_mask((300, side, side), batch_mask_ratio=1.0).float().mean(0)

    def border_over_centre(exposure: Tensor) -> float:
        centre = exposure[2:-2, 2:-2]
        border = (exposure.sum() - exposure[1:-1, 1:-1].sum()) / (4 * side - 4)
        return (border / centre.mean()).item()

    assert border_over_centre(reference) < 0.7
    assert border_over_centre(ours) == pytest.approx(1, abs=0.1)


def test_small_grids() -> None:
    with pytest.raises(ValueError, match="max_num_masks_per_block"):
        random_block_mask((64, 4, 6))
    assert CyclicMaskGenerator((4, 6))(64).any()


def vision_transformer() -> VisionTransformer:
    return VisionTransformer(
        16, 4, embed_dim=16, depth=2, num_heads=2, num_classes=0, dynamic_img_size=True
    ).eval()


def test_tokens_of_the_masked_vision_transformer() -> None:
    vit = vision_transformer()
    reference = lightly.models.modules.MaskedVisionTransformerTIMM(
        copy.deepcopy(vit), weight_initialization="skip", pos_embed_initialization="skip"
    ).eval()
    encoder = ViTEncoder(vit)
    with torch.no_grad():
        encoder.mask_token.copy_(torch.randn(16))
        reference.mask_token.copy_(encoder.mask_token)
    images = torch.randn(3, 3, 16, 16)
    masks = CyclicMaskGenerator(4, mask_probability=1.0)(3)
    for mine, padded in ((masks, nn.functional.pad(masks.flatten(1), (1, 0))), (None, None)):
        tokens = encoder(images, mine)
        found = torch.cat([tokens.cls[:, None], tokens.patches.flatten(1, 2)], dim=1)
        torch.testing.assert_close(found, reference.encode(images, mask=padded))


def test_lightly_draws_new_weights() -> None:
    vit = vision_transformer()
    before = copy.deepcopy(vit.state_dict())
    ViTEncoder(vit)
    assert all(torch.equal(vit.state_dict()[name], before[name]) for name in before)
    lightly.models.modules.MaskedVisionTransformerTIMM(vit)
    changed = {name for name in before if not torch.equal(vit.state_dict()[name], before[name])}
    assert {"pos_embed", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.weight"} <= changed


# --- DINOv2, DINOv3 ------------------------------------------------------------------------------


def close(found: Tensor, expected: Tensor | float) -> None:
    torch.testing.assert_close(found.double(), torch.as_tensor(expected).double())


def probs(*shape: int) -> Tensor:
    return torch.softmax(3 * torch.randn(*shape, dtype=torch.float64), dim=-1)


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_dinov2s_forward_is_a_sum() -> None:
    student, teacher = double(3, 4, 6), probs(2, 4, 6)
    expected = dinov2.DINOLoss(6).forward(list(student), list(teacher))
    close(3 * 2 * DINOLoss()(student, teacher, ignore_diagonal=False), expected)


@pytest.mark.parametrize("num_local", [1, 3])
def test_dinov2s_two_calls_are_one_of_ours(num_local: int) -> None:
    B, K, L = 3, 6, num_local
    student, teacher, released = double(2 + L, B, K), double(2, B, K), dinov2.DINOLoss(K)
    swapped = released.sinkhorn_knopp_teacher(teacher.flip(0).flatten(0, 1), 0.3)  # [2B, K]
    terms = 2 * L + 2
    expected = released.forward(list(student[2:]), list(swapped.view(2, B, K))) / terms
    expected += 2 * released.forward([student[:2].flatten(0, 1)], [swapped]) / terms
    targets = SinkhornKnopp()(teacher.flatten(0, 1), 0.3)
    close(DINOLoss()(student, targets), expected)


@pytest.mark.parametrize("n_iterations", [1, 3, 8])
def test_sinkhorn_is_dinov2s(n_iterations: int) -> None:
    teacher, count = double(7, 5), torch.tensor([7])
    found = SinkhornKnopp(n_iterations)(teacher, 0.2).probs()
    close(found, dinov2.DINOLoss(5).sinkhorn_knopp_teacher(teacher, 0.2, n_iterations))
    for module in (
        dinov2.iBOTPatchLoss(5).sinkhorn_knopp_teacher,
        dinov3.SinkhornKnoppTeacher().forward,
    ):
        close(found, module(teacher, 0.2, count, n_iterations))


def test_centering_is_dinov2s() -> None:
    released, centering = dinov2.DINOLoss(5, center_momentum=0.6), EMACentering(5, momentum=0.6)
    for step in range(4):
        teacher = torch.randn(6, 5)
        expected = released.softmax_center_teacher(teacher, 0.1 + 0.1 * step)
        released.update_center(teacher)
        found = centering(teacher, 0.1 + 0.1 * step)
        centering.update(teacher)
        torch.testing.assert_close(found.probs(), expected.float())


def test_forward_masked_is_ibot_loss() -> None:
    masks = some_masks().flatten(1)
    M = int(masks.sum())
    student, teacher, released = double(M, 6), probs(M, 6), dinov2.iBOTPatchLoss(6)
    weights = (1 / masks.sum(1).clamp(min=1)).unsqueeze(1).expand_as(masks)[masks]
    found = iBOTLoss()(student, teacher, masks)
    close(found, released.forward_masked(student, teacher, masks))
    close(found, released.forward_masked(student, teacher, masks, M, weights.double()))
    padded = [torch.cat([rows, rows[:3]]) for rows in (student, teacher)]
    close(found, released.forward_masked(*padded, masks, M, weights.double()))


def test_forward_on_all_patches_is_ibot_loss() -> None:
    masks = some_masks().flatten(1)
    student, teacher = double(*masks.shape, 6), probs(*masks.shape, 6)
    expected = dinov2.iBOTPatchLoss(6).forward(student, teacher, masks)
    close(iBOTLoss()(student[masks], teacher[masks], masks), expected)


def test_padding_rows_take_part_in_dinov2s_sinkhorn() -> None:
    teacher = double(9, 5)
    padding = torch.arange(9) >= 6
    teacher[padding] = 0
    released = dinov2.iBOTPatchLoss(5).sinkhorn_knopp_teacher(teacher, 0.2, torch.tensor([6]))
    with_padding = SinkhornKnopp()(teacher, 0.2).probs()
    without = SinkhornKnopp()(teacher, 0.2, row_mask=padding).probs()
    close(with_padding, released)
    close(without[:6], SinkhornKnopp()(teacher[:6], 0.2).probs())
    assert (without[:6] - released[:6]).abs().max() > 0.01


def test_koleo_is_dinov2s() -> None:
    x = double(6, 4)
    close(KoLeoLoss()(x), dinov2.KoLeoLoss().forward(x))


def test_dinov2s_head_is_a_projector_of_one_level(page: dict[str, Any]) -> None:
    head = dinov2.DINOHead(10, 7, hidden_dim=8, bottleneck_dim=6)
    x = double(3, 10)
    (scores,) = page["projector_from"](head.tensors, "mlp").double()(x)
    torch.testing.assert_close(scores, head.forward(x), atol=1e-6, rtol=1e-5)


def test_cosine_scheduler_is_warmup_cosine() -> None:
    released = dinov2.CosineScheduler(1.0, 0.1, 20, warmup_iters=5, start_warmup_value=0.2)
    for step in range(25):
        found = warmup_cosine(step, peak=1.0, final=0.1, total_steps=20, warmup_steps=5, start=0.2)
        assert found == pytest.approx(released[step])
    frozen = dinov2.CosineScheduler(1.0, 0.1, 20, freeze_iters=4)
    assert [frozen[step] > 0 for step in range(20)] == [
        unfreeze(step, freeze_steps=4) > 0 for step in range(20)
    ]


@pytest.mark.parametrize("ignore_diagonal", [False, True])
def test_dino_loss_is_dinov3s(ignore_diagonal: bool) -> None:
    for S, T in ((5, 2), (2, 3)):
        student, teacher = double(S, 3, 6), probs(T, 3, 6)
        expected = dinov3.DINOLoss(6).forward(student, teacher, ignore_diagonal=ignore_diagonal)
        close(DINOLoss()(student, teacher, ignore_diagonal=ignore_diagonal), expected)


@pytest.mark.parametrize("img_level", [True, False])
@pytest.mark.parametrize("apply_norm", [True, False])
def test_gram_loss_is_dinov3s(img_level: bool, apply_norm: bool) -> None:
    student, teacher = double(2, 3, 4), double(2, 3, 5)
    removals = {"keep": (False, False), "remove": (True, False), "remove_teacher": (False, True)}
    for negatives, removed in removals.items():
        reference = dinov3.GramLoss(apply_norm, True, *removed)
        loss = GramLoss(per_image=img_level, normalize=apply_norm, negatives=negatives)
        close(loss(student, teacher), reference.forward(student, teacher, img_level))


# --- Franca --------------------------------------------------------------------------------------


def test_francas_head_is_a_projector() -> None:
    head = franca.MRLDINOHead(8, 12, hidden_dim=6, bottleneck_dim=5, nesting_list=[2, 4, 8])
    projector = MatryoshkaProjector(
        8,
        12,
        nesting_dims=[2, 4, 8],
        nesting="slice_linear",
        hidden_dim=6,
        bottleneck_dim=5,
        normalize=False,
    ).double()
    places = {0: 2, 2: 4, 4: 6}  # after the prefix and its linear layer
    tensors = {}
    for name, tensor in head.tensors.items():
        part, level, *rest = name.split(".")
        if part == "matryoshka_projections":
            tensors[f"heads.{level}.1.{rest[0]}"] = tensor
        elif part == "mlps":
            tensors[f"heads.{level}.{places[int(rest[0])]}.{rest[1]}"] = tensor
        elif rest == ["weight_g"]:
            directions = head.tensors[f"last_layers.{level}.weight_v"]
            unit = directions / directions.norm(dim=1, keepdim=True)
            tensors[f"prototypes.{level}.weight"] = tensor * unit
    projector.load_state_dict(tensors)
    x = double(3, 8)
    assert projector.num_prototypes_per_level == (3, 6, 12)
    for found, expected in zip(projector(x), head.forward(x), strict=True):
        close(found, expected)


def test_francas_two_calls_are_ours_summed_over_levels() -> None:
    B, L, levels = 3, 2, (4, 8)
    student = [double(2 + L, B, K) for K in levels]
    teacher = [double(2, B, K) for K in levels]
    released, terms = franca.MRLDINOLoss(8), 2 * L + 2
    swapped = released.sinkhorn_knopp_teacher(
        tuple(x.flip(0).flatten(0, 1) for x in teacher), 0.3, n_global_crops_teacher=2
    )
    local = tuple(x[2:].flatten(0, 1) for x in student)
    expected = released.forward(local, swapped, n_crops=(L, 2)) / terms
    both = tuple(x[:2].flatten(0, 1) for x in student)
    expected += 2 * released.forward(both, swapped, n_crops=2, teacher_global=True) / terms
    targets = sinkhorn_many([x.flatten(0, 1) for x in teacher], 0.3)
    close(sum_over_levels(DINOLoss(), student, targets), expected)


def test_francas_patch_loss_is_ours_summed_over_levels() -> None:
    masks = some_masks().flatten(1)
    M, levels = int(masks.sum()), (4, 8)
    student, teacher = [double(M, K) for K in levels], [probs(M, K) for K in levels]
    expected = franca.MRLiBOTPatchLoss(8).forward(tuple(student), tuple(teacher), masks)
    close(sum_over_levels(iBOTLoss(), student, teacher, masks), expected)

"""GramLoss beyond what tests/test_conformance.py holds it to."""

import pytest
import torch

from sslkit import GramLoss, gram_loss
from sslkit.slices import block_elements
from sslkit.testing import textbook
from sslkit.testing.properties import agree


def normal(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


OPTIONS = [
    {"per_image": per_image, "normalize": normalize, "negatives": negatives}
    for per_image in (True, False)
    for normalize in (True, False)
    for negatives in ("keep", "remove", "remove_teacher")
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradient(options):
    teacher = normal(0, 2, 3, 4)
    student = normal(1, 2, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gram_loss(x, teacher, **options), student)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_several_blocks(options, monkeypatch):
    """Blocks of a few rows, and of a few images, give what one product gives."""
    student, teacher = normal(2, 3, 5, 4).requires_grad_(), normal(3, 3, 5, 4)
    expected = textbook.gram(student, teacher, **options)
    (expected_gradient,) = torch.autograd.grad(expected, student)
    for elements in (1, 12, 60):
        monkeypatch.setattr("sslkit.slices._BLOCK_ELEMENTS_CPU", elements)
        loss = GramLoss(**options)(student, teacher)
        (gradient,) = torch.autograd.grad(loss, student)
        agree(loss, expected, 1e-12 * max(1.0, expected.item()))
        agree(gradient, expected_gradient, 1e-12 * float(expected_gradient.abs().max()) + 1e-14)


@pytest.mark.parametrize("per_image", [True, False])
def test_no_matrix_is_kept_for_the_backward_pass(per_image):
    B, N, D = 2, 700, 4
    assert block_elements(torch.device("cpu")) < N * N  # several blocks an image
    kept = []
    student = torch.randn(B, N, D, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        loss = gram_loss(student, torch.randn(B, N, D), per_image=per_image)
    assert max(kept) == B * N * D
    assert student.grad is None
    loss.backward()
    assert student.grad.isfinite().all()


def test_selected_patches():
    """The patches that a mask hides, of all images: DINOv3's tokens_used."""
    student, teacher = normal(0, 2, 6, 3), normal(1, 2, 6, 3)
    masks = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 0, 1, 0, 0, 1]]).bool()
    loss = gram_loss(student[masks], teacher[masks], per_image=False)
    agree(loss, textbook.gram(student[masks][None], teacher[masks][None]), 1e-12)


def test_grids_of_another_shape():
    """Twice the resolution, not square; the same grid is not touched."""
    student, teacher = normal(0, 2, 3, 5, 4), normal(1, 2, 6, 10, 7)
    resized = torch.nn.functional.interpolate(
        teacher.permute(0, 3, 1, 2), size=(3, 5), mode="bicubic", align_corners=False
    ).permute(0, 2, 3, 1)
    agree(gram_loss(student, teacher), gram_loss(student, resized), 1e-12)
    filtered = gram_loss(student, teacher, antialias=True)
    assert abs(filtered - gram_loss(student, teacher)) > 1e-3
    flat = gram_loss(student.flatten(1, 2), resized.flatten(1, 2))
    agree(gram_loss(student, resized), flat, 1e-12)
    agree(
        gram_loss(student, teacher, per_image=False),
        textbook.gram(student.flatten(1, 2), resized.flatten(1, 2), per_image=False),
        1e-12,
    )


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 2), (0, 3, 3, 2)])
@pytest.mark.parametrize("per_image", [True, False])
def test_no_patches_give_a_zero_that_can_be_differentiated(shape, per_image):
    student = torch.ones(shape, requires_grad=True)
    loss = gram_loss(student, torch.ones(shape), per_image=per_image)
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad.shape == shape


def test_nothing_is_saved_without_a_gradient():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        assert not gram_loss(torch.randn(2, 3, 4), torch.randn(2, 3, 4)).requires_grad
    assert kept == []


def test_training_reaches_the_teachers_similarities():
    """Other features with the same similarities: the loss is anchored, features are free."""
    teacher = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    student = torch.nn.Parameter(torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(1)))
    optimizer = torch.optim.Adam([student], lr=0.05)
    losses = []
    for _ in range(150):
        loss = gram_loss(student, teacher)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-3 * losses[0]
    cosines = torch.nn.functional.cosine_similarity(student, teacher, dim=-1)
    assert cosines.abs().mean() < 0.8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: GramLoss(negatives="drop"), "negatives must be one of .*'drop'"),
        (lambda x: gram_loss(x, x, negatives="drop"), "negatives must be one of .*'drop'"),
        (lambda x: gram_loss(x[0], x[0]), r"patches must be .*\(3, 4\)"),
        (lambda x: gram_loss(x, x[:, :2]), r"same patches.*\(2, 3, 4\).*\(2, 2, 4\)"),
        (lambda x: gram_loss(x[:, None], x[:1, None]), r"same patches.*\(2, 1, 3, 4\)"),
        (lambda x: gram_loss(x[:, None], x), r"patches must be .*both alike"),
        (lambda x: gram_loss(x.long(), x), "floating point, got torch.int64"),
    ],
)
def test_mistakes_are_told(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 3, 4))


def test_repr():
    assert repr(GramLoss(per_image=False)) == (
        "GramLoss(per_image=False, normalize=True, negatives='keep', antialias=False)"
    )

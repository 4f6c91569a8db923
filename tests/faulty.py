"""Deliberate faults: for every property of `sslkit.testing` a part that breaks it.

``FAULTS`` has the fault in words, the adapter of the faulty part, and the property that has to
catch it. ``SOUND`` has the parts that the faulty ones are made from, which break no property.
Functions that run on several processes stand at the top of this module.
"""

from copy import deepcopy
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sslkit.ops import collectives
from sslkit.testing import (
    AUROC,
    DINO,
    EMA,
    IBOT,
    KNN,
    RASA,
    Centering,
    Confusion,
    Encoder,
    Gram,
    Head,
    KoLeo,
    LayerDecay,
    Loss,
    Masks,
    Schedule,
    SIGReg,
    Sinkhorn,
    auroc,
    centering,
    confusion,
    dino,
    ema,
    encoder,
    gram,
    head,
    ibot,
    knn,
    koleo,
    layer_decay,
    loss,
    masks,
    own,
    rasa,
    schedule,
    sigreg,
    sinkhorn,
    textbook,
)

BOTH = (torch.bfloat16, torch.float16)


def eight_bits(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn).to(x.dtype)


def traced(call):
    """The second of two calls differs from the first, as of a loss that moves a centre."""
    calls = []

    def with_state(*inputs):
        calls.append(1)
        return call(*inputs) * (1 + 0.1 * len(calls))

    return with_state


def in_place(call):
    def overwriting(x, *inputs):
        return call(x.mul_(1.5), *inputs)

    return overwriting


def row_by_row(call):
    """A Python loop over rows, which every number of rows compiles anew."""

    def looping(x, *inputs):
        for b in range(x.shape[-2]):
            x = x + 0 * x[..., b : b + 1, :]
        return call(x, *inputs)

    return looping


def through_a_product(call):
    """A product with the identity, which autocast rounds to bfloat16."""

    def rounded(x, *inputs):
        return call((x @ torch.eye(x.shape[-1], dtype=x.dtype)).to(x.dtype), *inputs)

    return rounded


def read_by_rows(call):
    """The tensor is taken for a contiguous one, whatever its strides."""

    def reading(x, *inputs):
        return call(x.as_strided(x.shape, torch.empty(x.shape).stride()), *inputs)

    return reading


def by_place(x: Tensor, dim: int) -> Tensor:
    """Weights of mean 1 that depend on the place in the batch."""
    weights = 1 + 0.1 * (torch.arange(x.shape[dim], dtype=x.dtype) - (x.shape[dim] - 1) / 2)
    shape = [1] * x.ndim
    shape[dim] = -1
    return weights.view(shape)


class RoughGradient(torch.autograd.Function):
    """The identity, whose gradient is rounded to 8 bits."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return eight_bits(gradient)


# --- Sinkhorn -------------------------------------------------------------------------------------


def log_sinkhorn(logits: Tensor, temperature: float, num_iterations: int = 3) -> Tensor:
    with torch.no_grad():
        log_q = logits.float() / temperature
        for _ in range(num_iterations):
            log_q = log_q.log_softmax(dim=0).log_softmax(dim=1)
        return log_q.exp()


def shifted_rows(x: Tensor, temperature: float) -> Tensor:
    """The repair that facebookresearch/dinov2#583 proposes."""
    return log_sinkhorn(x - x.max(dim=-1, keepdim=True).values, temperature)


def rows_first(x: Tensor, temperature: float) -> Tensor:
    return log_sinkhorn(x.mT, temperature).mT * x.shape[0] / x.shape[1]


def first_prototype_favoured(x: Tensor, temperature: float) -> Tensor:
    q = log_sinkhorn(x, temperature) * torch.tensor([1.5] + [1.0] * (x.shape[1] - 1))
    return q / q.sum(dim=1, keepdim=True)


def own_rows_only(x: Tensor, temperature: float) -> Tensor:
    return log_sinkhorn(x, temperature)


def empty_ranks_leave(x: Tensor, temperature: float) -> Tensor:
    return x if len(x) == 0 else own.sinkhorn_probs_on_ranks(x, temperature)


def with_gradient(x: Tensor, temperature: float) -> Tensor:
    return textbook.sinkhorn(x, temperature)


SINKHORN = [
    ("exp overflows", Sinkhorn(textbook.sinkhorn), sinkhorn.is_finite_over_its_range),
    (
        "each row's maximum is subtracted",
        Sinkhorn(shifted_rows),
        sinkhorn.equals_the_published_loop,
    ),
    (
        "an iteration is missing",
        Sinkhorn(lambda x, t: log_sinkhorn(x, t, 2)),
        sinkhorn.equals_the_published_loop,
    ),
    ("prototypes are normalised last", Sinkhorn(rows_first), sinkhorn.rows_sum_to_one),
    (
        "a softmax of each row",
        Sinkhorn(lambda x, t: (x / t).softmax(1).detach()),
        sinkhorn.a_shift_of_a_prototype_changes_nothing,
    ),
    ("a favourite prototype", Sinkhorn(first_prototype_favoured), sinkhorn.order_does_not_matter),
    (
        "the temperature is left out",
        Sinkhorn(lambda x, t: log_sinkhorn(x, 1.0)),
        sinkhorn.logits_and_temperature_scale_together,
    ),
    (
        "strides are ignored",
        Sinkhorn(read_by_rows(log_sinkhorn)),
        sinkhorn.memory_layout_does_not_matter,
    ),
    ("logits are scaled in place", Sinkhorn(in_place(log_sinkhorn)), sinkhorn.leaves_no_trace),
    ("the teacher gets a gradient", Sinkhorn(with_gradient), sinkhorn.has_no_gradient),
    (
        "logits are rounded to 8 bits",
        Sinkhorn(lambda x, t: log_sinkhorn(eight_bits(x), t), sixteen_bit=BOTH),
        sinkhorn.sixteen_bit_logits_are_balanced_as_well,
    ),
    (
        "a product in autocast",
        Sinkhorn(through_a_product(log_sinkhorn), sixteen_bit=BOTH),
        sinkhorn.autocast_does_not_make_it_less_exact,
    ),
    (
        "each process balances its own rows",
        Sinkhorn(log_sinkhorn, on_ranks=own_rows_only),
        sinkhorn.any_split_over_processes_gives_the_same,
    ),
    (
        "a process without rows leaves before the others have finished",
        Sinkhorn(log_sinkhorn, on_ranks=empty_ranks_leave),
        sinkhorn.any_split_over_processes_gives_the_same,
    ),
    (
        "a loop over rows",
        Sinkhorn(row_by_row(log_sinkhorn), compiles=True),
        sinkhorn.compiles_in_few_graphs,
    ),
]

# --- DINO -----------------------------------------------------------------------------------------


def right_dino(student: Tensor, probs: Tensor) -> Tensor:
    return textbook.dino(student.float(), probs.detach())


def all_pairs_counted(student: Tensor, probs: Tensor) -> Tensor:
    pairs = len(student) * len(probs)
    return right_dino(student, probs) * (pairs - min(len(student), len(probs))) / pairs


def nan_of_one_view(student: Tensor, probs: Tensor) -> Tensor:
    pairs = len(student) * len(probs) - min(len(student), len(probs))
    return right_dino(student, probs) if pairs else student.sum() * torch.nan


def last_view_detached(student: Tensor, probs: Tensor) -> Tensor:
    return right_dino(torch.cat([student[:-1], student[-1:].detach()]), probs)


def batch_centred(student: Tensor, probs: Tensor) -> Tensor:
    return right_dino(student - student.mean(dim=1, keepdim=True), probs)


def unsafe_softmax(student: Tensor, probs: Tensor) -> Tensor:
    weights = (student / 0.1).exp()
    logits = 0.1 * (weights / weights.sum(dim=-1, keepdim=True)).log()
    return right_dino(logits, probs)


def without_logsumexp(student: Tensor, probs: Tensor) -> Tensor:
    return right_dino(student, probs) + 0.1 * student.mean()


def dino_over_ranks(student: Tensor, probs: Tensor) -> Tensor:
    return right_dino(student, probs) / dist.get_world_size()


DINO_LOSS = [
    (
        "local views are left out",
        DINO(lambda s, q: right_dino(s[:2], q)),
        dino.equals_the_double_loop,
    ),
    ("the diagonal counts in the mean", DINO(all_pairs_counted), dino.equals_the_double_loop),
    ("the last view is detached", DINO(last_view_detached), dino.gradient_is_that_of_the_equation),
    ("0 / 0 of one view", DINO(nan_of_one_view), dino.one_view_gives_no_nan),
    (
        "samples weigh by their place",
        DINO(lambda s, q: right_dino(s * by_place(s, 1), q)),
        dino.order_of_samples_does_not_matter,
    ),
    (
        "views weigh by their place",
        DINO(lambda s, q: right_dino(s * by_place(s, 0), q)),
        dino.order_of_views_does_not_matter,
    ),
    ("logits are centred over the batch", DINO(batch_centred), dino.samples_do_not_mix),
    ("the normaliser is forgotten", DINO(without_logsumexp), dino.a_shift_of_a_row_changes_nothing),
    ("exp without a shift", DINO(unsafe_softmax), dino.is_exact_over_its_range),
    (
        "a sum over samples",
        DINO(lambda s, q: right_dino(s, q) * s.shape[1]),
        dino.micro_batches_accumulate,
    ),
    ("targets are not detached", DINO(textbook.dino), dino.targets_get_no_gradient),
    ("a centre moves in forward", DINO(traced(right_dino)), dino.leaves_no_trace),
    (
        "logits are rounded to 8 bits",
        DINO(lambda s, q: right_dino(eight_bits(s), q), sixteen_bit=BOTH),
        dino.sixteen_bit_logits_are_as_exact,
    ),
    (
        "gradients are rounded to 8 bits",
        DINO(lambda s, q: right_dino(RoughGradient.apply(s), q), sixteen_bit=BOTH),
        dino.sixteen_bit_logits_are_as_exact,
    ),
    (
        "strides are ignored",
        DINO(read_by_rows(right_dino)),
        dino.memory_layout_does_not_matter,
    ),
    (
        "a product in autocast",
        DINO(through_a_product(right_dino), sixteen_bit=BOTH),
        dino.autocast_does_not_make_it_less_exact,
    ),
    (
        "the loss is divided by the number of processes",
        DINO(right_dino, on_ranks=dino_over_ranks),
        dino.processes_average_to_the_same,
    ),
    (
        "a loop over samples",
        DINO(row_by_row(right_dino), compiles=True),
        dino.compiles_in_few_graphs,
    ),
]

# --- iBOT -----------------------------------------------------------------------------------------


def right_ibot(student: Tensor, probs: Tensor, masks: Tensor) -> Tensor:
    weights = 1 / (masks.sum(dim=1).clamp(min=1) * len(masks)).float()
    rows = weights.repeat_interleave(masks.sum(dim=1), output_size=len(student))
    return (textbook.cross_entropy(student.float(), probs.detach(), 0.1) * rows).sum()


def over_patches(student: Tensor, probs: Tensor, masks: Tensor) -> Tensor:
    return textbook.cross_entropy(student, probs.detach(), 0.1).sum() / masks.numel()


def over_masked_images(student: Tensor, probs: Tensor, masks: Tensor) -> Tensor:
    return right_ibot(student, probs, masks) * len(masks) / masks.any(dim=1).sum()


def mean_of_patches(student: Tensor, probs: Tensor, masks: Tensor) -> Tensor:
    return textbook.cross_entropy(student, probs.detach(), 0.1).mean()


def images_by_place(student: Tensor, probs: Tensor, masks: Tensor) -> Tensor:
    images = masks.nonzero()[:, 0]
    return right_ibot(student * (1 + 0.1 * images[:, None]), probs, masks)


def last_patch_detached(student: Tensor, probs: Tensor, masks: Tensor) -> Tensor:
    return right_ibot(torch.cat([student[:-1], student[-1:].detach()]), probs, masks)


def patches_centred(student: Tensor, probs: Tensor, masks: Tensor) -> Tensor:
    return right_ibot(student - student.mean(dim=0), probs, masks)


def unsafe_ibot(student: Tensor, probs: Tensor, masks: Tensor) -> Tensor:
    weights = (student / 0.1).exp()
    return right_ibot(0.1 * (weights / weights.sum(dim=1, keepdim=True)).log(), probs, masks)


def ibot_over_ranks(student: Tensor, probs: Tensor, masks: Tensor) -> Tensor:
    return right_ibot(student, probs, masks) / dist.get_world_size()


def nothing_masked_has_no_graph(student: Tensor, probs: Tensor, masks: Tensor) -> Tensor:
    """The process takes no part in the backward pass, and the others wait for it."""
    return right_ibot(student, probs, masks) if masks.any() else torch.zeros(())


def over_all_ranks_patches(student: Tensor, probs: Tensor, masks: Tensor) -> Tensor:
    total = torch.tensor(float(len(student)))
    dist.all_reduce(total)
    rows = textbook.cross_entropy(student, probs.detach(), 0.1)
    return rows.sum() * dist.get_world_size() / total


IBOT_LOSS = [
    ("masked patches are averaged over all", IBOT(over_patches), ibot.equals_the_double_loop),
    ("images without a mask do not count", IBOT(over_masked_images), ibot.equals_the_double_loop),
    (
        "the last patch is detached",
        IBOT(last_patch_detached),
        ibot.gradient_is_that_of_the_equation,
    ),
    ("a mean over no patch", IBOT(mean_of_patches), ibot.nothing_masked_gives_no_nan),
    ("images weigh by their place", IBOT(images_by_place), ibot.order_of_images_does_not_matter),
    ("images weigh by their masks", IBOT(mean_of_patches), ibot.images_weigh_the_same),
    ("logits are centred over the batch", IBOT(patches_centred), ibot.images_do_not_mix),
    (
        "the normaliser is forgotten",
        IBOT(lambda s, q, m: right_ibot(s, q, m) + 0.1 * s.sum()),
        ibot.a_shift_of_a_row_changes_nothing,
    ),
    ("exp without a shift", IBOT(unsafe_ibot), ibot.is_exact_over_its_range),
    (
        "a sum over images",
        IBOT(lambda s, q, m: right_ibot(s, q, m) * len(m)),
        ibot.micro_batches_accumulate,
    ),
    (
        "targets are not detached",
        IBOT(lambda s, q, m: textbook.ibot(s, q, m)),
        ibot.targets_get_no_gradient,
    ),
    ("a centre moves in forward", IBOT(traced(right_ibot)), ibot.leaves_no_trace),
    (
        "logits are rounded to 8 bits",
        IBOT(lambda s, q, m: right_ibot(eight_bits(s), q, m), sixteen_bit=BOTH),
        ibot.sixteen_bit_logits_are_as_exact,
    ),
    (
        "strides are ignored",
        IBOT(read_by_rows(right_ibot)),
        ibot.memory_layout_does_not_matter,
    ),
    (
        "a product in autocast",
        IBOT(through_a_product(right_ibot), sixteen_bit=BOTH),
        ibot.autocast_does_not_make_it_less_exact,
    ),
    (
        "the loss is divided by the number of processes",
        IBOT(right_ibot, on_ranks=ibot_over_ranks),
        ibot.processes_average_to_the_same,
    ),
    (
        "a process with nothing masked has no gradient",
        IBOT(right_ibot, on_ranks=nothing_masked_has_no_graph),
        ibot.processes_average_to_the_same,
    ),
    (
        "one mean over the masked patches of all processes",
        IBOT(right_ibot, on_ranks=over_all_ranks_patches),
        ibot.processes_average_to_the_same,
    ),
    (
        "a loop over patches",
        IBOT(row_by_row(right_ibot), compiles=True),
        ibot.compiles_in_few_graphs,
    ),
]

# --- KoLeo ----------------------------------------------------------------------------------------


def itself_a_neighbour(x: Tensor) -> Tensor:
    z = F.normalize(x, dim=-1)
    return -(torch.cdist(z, z).min(dim=1).values + 1e-8).log().mean()


def neighbours_detached(x: Tensor) -> Tensor:
    z = F.normalize(x, dim=-1)
    nearest = torch.cdist(z, z).detach().fill_diagonal_(torch.inf).argmin(dim=1)
    return -((z - z[nearest].detach()).norm(dim=-1) + 1e-8).log().mean()


def lengths_count(x: Tensor) -> Tensor:
    nearest = torch.cdist(x, x).detach().fill_diagonal_(torch.inf).argmin(dim=1)
    return -((x - x[nearest]).norm(dim=-1) + 1e-8).log().mean()


def city_blocks(x: Tensor) -> Tensor:
    z = F.normalize(x, dim=-1)
    nearest = torch.cdist(z, z).detach().fill_diagonal_(torch.inf).argmin(dim=1)
    return -((z - z[nearest]).abs().sum(dim=-1) + 1e-8).log().mean()


def next_row(x: Tensor) -> Tensor:
    z = F.normalize(x, dim=-1)
    return -((z - z.roll(1, dims=0)).norm(dim=-1) + 1e-8).log().mean()


def no_floor(x: Tensor) -> Tensor:
    return textbook.koleo(x, eps=0.0)


def nan_of_one_row(x: Tensor) -> Tensor:
    return textbook.koleo(x) if len(x) > 1 else x.sum() * torch.nan


def by_products(x: Tensor) -> Tensor:
    """Distances from products, which autocast rounds to bfloat16."""
    z = F.normalize(x, dim=-1)
    similarity = (z @ z.T).float().clone().fill_diagonal_(-2.0)
    return -((2 - 2 * similarity.max(dim=1).values).clamp(min=1e-16).sqrt() + 1e-8).log().mean()


def gathered_without_gradient(x: Tensor) -> Tensor:
    """Neighbours of other processes get no gradient, and a rank's mean is over its own rows."""
    lengths = [torch.zeros((), dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor(len(x)))
    padded = x.new_zeros(max(map(int, lengths)), x.shape[1])
    padded[: len(x)] = x.detach()
    everyone = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(everyone, padded)
    rows = torch.cat([each[:n] for each, n in zip(everyone, lengths, strict=True)])
    first = sum(map(int, lengths[: dist.get_rank()]))
    z, others = F.normalize(x, dim=-1), F.normalize(rows, dim=-1)
    distances = torch.cdist(z, others).detach()
    distances.diagonal(offset=first).fill_(torch.inf)
    near = others[distances.argmin(dim=1)] if len(x) else others[:0]
    scale = dist.get_world_size() / len(rows)
    return -((z - near).norm(dim=-1) + 1e-8).log().sum() * scale


KOLEO = [
    ("a row is its own neighbour", KoLeo(itself_a_neighbour), koleo.equals_the_double_loop),
    ("neighbours are detached", KoLeo(neighbours_detached), koleo.gradient_is_that_of_the_equation),
    ("rows are not normalised", KoLeo(lengths_count), koleo.scale_of_a_row_does_not_matter),
    ("distances of city blocks", KoLeo(city_blocks), koleo.a_rotation_changes_nothing),
    ("the next row is taken for the nearest", KoLeo(next_row), koleo.order_does_not_matter),
    ("the logarithm of zero", KoLeo(no_floor), koleo.equal_rows_give_finite_numbers),
    ("NaN of one row", KoLeo(nan_of_one_row), koleo.one_row_gives_no_nan),
    (
        "strides are ignored",
        KoLeo(read_by_rows(textbook.koleo)),
        koleo.memory_layout_does_not_matter,
    ),
    ("a statistic moves in forward", KoLeo(traced(textbook.koleo)), koleo.leaves_no_trace),
    (
        "features are rounded to 8 bits",
        KoLeo(lambda x: textbook.koleo(eight_bits(x).float()), sixteen_bit=BOTH),
        koleo.sixteen_bit_features_are_as_exact,
    ),
    (
        "distances by products",
        KoLeo(by_products, sixteen_bit=BOTH),
        koleo.autocast_does_not_make_it_less_exact,
    ),
    (
        "other processes' rows are gathered without a gradient",
        KoLeo(textbook.koleo, on_ranks=gathered_without_gradient),
        koleo.any_split_over_processes_gives_the_same,
    ),
    (
        "a loop over rows",
        KoLeo(row_by_row(own.koleo_loss.call), compiles=True),
        koleo.compiles_in_few_graphs,
    ),
]

# --- losses without a reference -------------------------------------------------------------------


def barlow(first: Tensor, second: Tensor, correlation: Tensor | None = None) -> Tensor:
    """Redundancy reduction without the batch normalisation: a function of mean products."""
    if correlation is None:
        correlation = first.T @ second / len(first)
    return (correlation - torch.eye(first.shape[1], dtype=first.dtype)).square().sum()


def reduced_without_gradient(first: Tensor, second: Tensor) -> Tensor:
    """lightly-ai/lightly#1920: torch.distributed.all_reduce of what has a gradient."""
    correlation = first.T @ second / len(first) / dist.get_world_size()
    everyone = correlation.detach().clone()
    dist.all_reduce(everyone)
    return barlow(first, second, correlation + (everyone - correlation).detach())


def barlow_in_16_bits(first: Tensor, second: Tensor) -> Tensor:
    if first.dtype == torch.float64:
        return barlow(first, second)
    return barlow(first.bfloat16(), second.bfloat16()).float()


def standardised(first: Tensor, second: Tensor) -> Tensor:
    return barlow(first / first.std(dim=0), second / second.std(dim=0))


LOSS = [
    (
        "images weigh by their place",
        Loss(lambda a, b: barlow(a * by_place(a, 0), b)),
        loss.order_of_images_does_not_matter,
    ),
    (
        "the second view weighs more",
        Loss(lambda a, b: barlow(a, b) + b.square().sum(), symmetric=True),
        loss.order_of_views_does_not_matter,
    ),
    ("a view is left out", Loss(lambda a, b: barlow(a, a)), loss.every_view_has_a_gradient),
    (
        "rows are not normalised",
        Loss(barlow, ignores_lengths=True),
        loss.lengths_do_not_matter,
    ),
    (
        "computed in 16 bits",
        Loss(barlow_in_16_bits),
        loss.float32_is_as_exact_as_it_can_be,
    ),
    ("a product in autocast", Loss(barlow, autocast=True), loss.autocast_changes_nothing),
    ("divided by a deviation of 0", Loss(standardised), loss.equal_rows_give_finite_numbers),
    ("a statistic moves in forward", Loss(traced(barlow)), loss.leaves_no_trace),
    (
        "the gradient is divided by the number of processes",
        Loss(barlow, on_ranks=reduced_without_gradient),
        loss.processes_average_to_the_same,
    ),
    ("a loop over images", Loss(row_by_row(barlow), compiles=True), loss.compiles_in_few_graphs),
]

# --- EMA ------------------------------------------------------------------------------------------


class Teacher(nn.Module):
    """An average of weights that is right; the faulty ones change one method."""

    def __init__(self, student: nn.Module, momentum: float) -> None:
        super().__init__()
        self.module = self.copied(student).eval().requires_grad_(False)
        self.momentum = momentum

    def copied(self, student: nn.Module) -> nn.Module:
        return deepcopy(student)

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        for own_, other in self.pairs(student):
            self.move(own_, other)
        for own_, other in zip(self.module.buffers(), student.buffers(), strict=True):
            self.copy_buffer(own_, other)

    def pairs(self, student: nn.Module):
        return zip(self.module.parameters(), student.parameters(), strict=True)

    def move(self, own_: Tensor, other: Tensor) -> None:
        own_.lerp_(other, 1 - self.momentum)

    def copy_buffer(self, own_: Tensor, other: Tensor) -> None:
        own_.copy_(other)


class MomentumOfTheStudent(Teacher):
    def move(self, own_, other):
        own_.lerp_(other, self.momentum)


class Shared(Teacher):
    def copied(self, student):
        return student


class StudentInEvalMode(Teacher):
    def update(self, student):
        super().update(student.eval())


class Drifting(Teacher):
    def move(self, own_, other):
        own_.mul_(self.momentum).add_(other, alpha=1.01 - self.momentum)


class WithoutBuffers(Teacher):
    def copy_buffer(self, own_, other):
        pass


class Trained(Teacher):
    def __init__(self, student, momentum):
        super().__init__(student, momentum)
        self.module.train().requires_grad_(True)


class SharedMovedTwice(Teacher):
    def pairs(self, student):
        named = [dict(m.named_parameters(remove_duplicate=False)) for m in (self.module, student)]
        return [(named[0][name], named[1][name]) for name in named[0]]


class LostCounter(Teacher):
    """A warm-up of the momentum by a counter that is no buffer (lightly-ai/lightly-train#892)."""

    updates = 0

    def move(self, own_, other):
        momentum = min(self.momentum, self.updates / 100)
        own_.lerp_(other, 1 - momentum)

    def update(self, student):
        self.updates += 1
        super().update(student)


def ema_of(teacher: type[Teacher]) -> EMA:
    return EMA(teacher, lambda t, student: t.update(student), lambda t: t.module)


EMA_TEACHER = [
    ("momentum and rest exchanged", ema_of(MomentumOfTheStudent), ema.equals_the_closed_form),
    ("the teacher is the student", ema_of(Shared), ema.starts_as_a_copy),
    ("the student is left in eval mode", ema_of(StudentInEvalMode), ema.leaves_the_student_alone),
    ("weights that sum to 1.01", ema_of(Drifting), ema.equal_weights_stay),
    ("buffers stay behind", ema_of(WithoutBuffers), ema.buffers_follow),
    ("the teacher is trained", ema_of(Trained), ema.is_frozen),
    ("shared weights move twice", ema_of(SharedMovedTwice), ema.shared_weights_are_moved_once),
    (
        "the counter of updates is not saved",
        ema_of(LostCounter),
        ema.a_resumed_teacher_has_the_same_future,
    ),
]

# --- masks ----------------------------------------------------------------------------------------

GRID = (7, 9)


def masks_of(draw, **promises) -> Masks:
    return Masks(draw, GRID, **promises)


def right_masks(batch_size: int, generator: torch.Generator) -> Tensor:
    return own.cyclic_masks.call(batch_size, generator)


def scattered(batch_size: int, generator: torch.Generator) -> Tensor:
    found = torch.zeros(batch_size, *GRID, dtype=torch.bool)
    for b in torch.randperm(batch_size, generator=generator)[: (batch_size + 1) // 2]:
        count = int(torch.randint(7, 40, (), generator=generator))
        found[b].view(-1)[torch.randperm(63, generator=generator)[:count]] = True
    return found


def too_many(batch_size: int, generator: torch.Generator) -> Tensor:
    found = right_masks(batch_size, generator)
    found[found.flatten(1).any(dim=1)] = True
    return found


def in_the_middle(batch_size: int, generator: torch.Generator) -> Tensor:
    """The cyclic shift is left out."""
    found = right_masks(batch_size, generator)
    counts = found.flatten(1).sum(dim=1)
    order = torch.tensor([abs(r - 3) + abs(c - 4) for r in range(7) for c in range(9)]).argsort()
    for mask, count in zip(found, counts, strict=True):
        mask.view(-1)[order] = torch.arange(63) < count
    return found


def sorted_images(batch_size: int, generator: torch.Generator) -> Tensor:
    found = right_masks(batch_size, generator)
    return found[found.flatten(1).any(dim=1).int().argsort(descending=True)]


def always_the_same(batch_size: int, generator: torch.Generator) -> Tensor:
    found = right_masks(1 + batch_size, generator)
    masked = right_masks(8, torch.Generator().manual_seed(0))
    one = masked[masked.flatten(1).any(dim=1)][0]
    return one & found[:batch_size].flatten(1).any(dim=1)[:, None, None]


def global_randomness(batch_size: int, generator: torch.Generator) -> Tensor:
    return right_masks(batch_size, torch.default_generator)


class EveryThird:
    """A counter of its own, beside the generator, says when to draw twice."""

    def __init__(self):
        self.calls = 0

    def __call__(self, batch_size, generator):
        self.calls += 1
        if self.calls % 3 == 0:
            right_masks(batch_size, generator)
        return right_masks(batch_size, generator)


MASKS = [
    (
        "numbers instead of booleans",
        masks_of(lambda b, g: right_masks(b, g).int()),
        masks.has_the_shape_and_type,
    ),
    ("everything is masked", masks_of(too_many), masks.counts_are_in_the_range),
    (
        "too few images are masked",
        masks_of(lambda b, g: right_masks(b, g), mask_probability=0.75),
        masks.a_share_of_the_images_is_masked,
    ),
    ("no cyclic shift", masks_of(in_the_middle), masks.every_patch_is_masked_equally_often),
    (
        "the first images are masked",
        masks_of(sorted_images),
        masks.every_image_is_masked_equally_often,
    ),
    ("scattered patches", masks_of(scattered, region="visible"), masks.a_region_is_connected),
    ("one mask for all", masks_of(always_the_same), masks.masks_differ),
    ("the global generator", masks_of(global_randomness), masks.randomness_is_the_generators),
    (
        "a counter beside the generator",
        masks_of(EveryThird()),
        masks.a_restored_generator_has_the_same_future,
    ),
]

# --- heads ----------------------------------------------------------------------------------------


class Levels(nn.Module):
    """A nested head that is right; the faulty ones change one method."""

    def __init__(self, in_dim, num_prototypes, nesting_dims):
        super().__init__()
        self.dims = tuple(nesting_dims)
        self.mlps = nn.ModuleList(self.mlp(dim, in_dim) for dim in self.dims)
        self.prototypes = nn.ModuleList(
            nn.Linear(4, self.count(num_prototypes, dim, in_dim), bias=False) for dim in self.dims
        )

    def mlp(self, dim, in_dim):
        return nn.Sequential(nn.Linear(dim, 6), nn.GELU(), nn.Linear(6, 4))

    def count(self, num_prototypes, dim, in_dim):
        return num_prototypes * dim // in_dim

    def prefix(self, x, dim):
        return x[..., :dim]

    def logits(self, z, prototypes):
        return F.linear(F.normalize(z.float(), dim=-1), F.normalize(prototypes.weight, dim=-1))

    def forward(self, x):
        levels = zip(self.dims, self.mlps, self.prototypes, strict=True)
        return tuple(self.logits(mlp(self.prefix(x, dim)), p) for dim, mlp, p in levels)


class SameNumber(Levels):
    def count(self, num_prototypes, dim, in_dim):
        return num_prototypes


class Projected(Levels):
    """valeoai/Franca#4: a learned projection of all features, where the paper slices."""

    def mlp(self, dim, in_dim):
        return nn.Sequential(nn.Linear(in_dim, dim), *super().mlp(dim, in_dim))

    def prefix(self, x, dim):
        return x


class OneBottleneck(Levels):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.last = nn.Linear(4, 4)

    def logits(self, z, prototypes):
        return super().logits(self.last(z), prototypes)


class Products(Levels):
    def logits(self, z, prototypes):
        return prototypes(z)


class BatchNormed(Levels):
    def mlp(self, dim, in_dim):
        return nn.Sequential(nn.BatchNorm1d(dim), *super().mlp(dim, in_dim))


class SecondAxis(Levels):
    def forward(self, x):
        if x.ndim == 3:
            x = x.flip(1)
        return super().forward(x)


class Counting(Levels):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Unregistered(Levels):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.signs = torch.randn(4)

    def logits(self, z, prototypes):
        return super().logits(z * self.signs, prototypes)


class RoughAutocast(Levels):
    def logits(self, z, prototypes):
        found = super().logits(z, prototypes)
        return found.square() if torch.is_autocast_enabled("cpu") else found


class Looping(Levels):
    def forward(self, x):
        return super().forward(row_by_row(lambda rows: rows)(x))


HEAD = [
    ("K prototypes at every level", Head(SameNumber), head.has_one_output_a_level),
    ("a projection instead of a slice", Head(Projected), head.a_level_sees_its_prefix_alone),
    ("levels share a layer", Head(OneBottleneck), head.levels_share_no_parameter),
    ("products instead of cosines", Head(Products), head.logits_are_cosines),
    ("batch normalisation", Head(BatchNormed), head.rows_do_not_mix),
    ("patches of an image are exchanged", Head(SecondAxis), head.leading_axes_are_kept),
    ("forward counts its calls", Head(Counting), head.leaves_no_trace),
    ("a tensor that is not saved", Head(Unregistered), head.a_loaded_head_is_the_same),
    ("autocast changes the logits", Head(RoughAutocast), head.autocast_is_close),
    ("a loop over rows", Head(Looping, compiles=True), head.compiles_in_few_graphs),
]

# --- schedules ------------------------------------------------------------------------------------


def right_schedule(step: int, **settings) -> float:
    return own.warmup_then_cosine.call(step, **settings)


def overshooting(step: int, **settings) -> float:
    return right_schedule(step, **settings) * 1.01 + 0.01


def periodic(step: int, *, total_steps: int, **settings) -> float:
    return right_schedule(step % total_steps, total_steps=total_steps, **settings)


class Counted:
    """A scheduler that counts its own steps."""

    def __init__(self):
        self.calls = 0

    def __call__(self, step, *, total_steps, **settings):
        self.calls += 1
        step = (self.calls - 1) % (2 * total_steps)
        return right_schedule(step, total_steps=total_steps, **settings)


def never_negative(step: int, **settings) -> float:
    return max(right_schedule(step, **settings), 0.0)


SCHEDULE = [
    (
        "a step late",
        Schedule(lambda step, **settings: right_schedule(max(step - 1, 0), **settings)),
        schedule.is_the_published_array,
    ),
    (
        "timm's warm-up taken for DINOv2's",
        replace(own.warmup_then_cosine, warmup="fraction"),
        schedule.is_the_published_array,
    ),
    ("an overshoot", Schedule(overshooting), schedule.never_leaves_its_range),
    ("it starts again at the end", Schedule(periodic), schedule.a_finished_schedule_stays),
    ("negative values are cut off", Schedule(never_negative), schedule.values_scale_and_shift),
    ("a counter of its own", Schedule(Counted()), schedule.a_value_depends_on_the_step_alone),
]

# --- k-NN -----------------------------------------------------------------------------------------


def votes(train, labels, test, *, k, temperature, num_classes, similarity=None, weights=None):
    if similarity is None:
        similarity = F.normalize(test.float(), dim=1) @ F.normalize(train.float(), dim=1).T
    best, where = similarity.topk(k)
    weight = (best / temperature).exp() if weights is None else weights(best, temperature)
    counts = torch.zeros(len(test), num_classes).scatter_add_(1, labels[where], weight)
    return counts.argmax(dim=1)


def unweighted(*x, **settings):
    return votes(*x, **settings, weights=lambda best, temperature: torch.ones_like(best))


def by_products_of_rows(train, labels, test, **settings):
    return votes(train, labels, test, **settings, similarity=test @ train.T)


def first_ones(train, labels, test, *, k, **settings):
    return votes(train[:k], labels[:k], test, k=k, **settings)


def centred(train, labels, test, **settings):
    return votes(train, labels, test - test.mean(dim=0), **settings)


def compared_as_stored(train, labels, test, **settings):
    similarity = F.normalize(test, dim=1) @ F.normalize(train, dim=1).T
    return votes(train, labels, test, **settings, similarity=similarity.float())


def multiplied(*x, **settings):
    return votes(*x, **settings, weights=lambda best, temperature: (best * temperature).exp())


NEIGHBOURS = [
    ("votes without weights", KNN(unweighted), knn.wins_the_loops_vote),
    ("products instead of cosines", KNN(by_products_of_rows), knn.lengths_do_not_matter),
    ("the first k items", KNN(first_ones), knn.order_of_the_training_items_does_not_matter),
    ("test features are centred", KNN(centred), knn.test_items_do_not_mix),
    ("multiplied by the temperature", KNN(multiplied), knn.a_temperature_is_divided_by),
    (
        "features are scaled in place",
        KNN(lambda train, *x, **s: votes(train.mul_(2), *x, **s)),
        knn.leaves_no_trace,
    ),
    (
        "compared in 16 bits",
        KNN(compared_as_stored, sixteen_bit=BOTH),
        knn.sixteen_bit_features_are_compared_as_exactly,
    ),
]

# --- confusion ------------------------------------------------------------------------------------


def counts_of(truth, prediction, num_classes):
    return own.confusion.call(truth, prediction, num_classes)


def ignored_in_class_0(truth, prediction, num_classes):
    return counts_of(truth.masked_fill(truth == 255, 0), prediction, num_classes)


def without_the_last(truth, prediction, num_classes):
    return counts_of(truth.flatten()[:-1], prediction.flatten()[:-1], num_classes)


def at_most_two(truth, prediction, num_classes):
    return counts_of(truth, prediction, num_classes).clamp(max=2)


def iou_of_the_truth(truth, prediction, num_classes):
    counts = counts_of(truth, prediction, num_classes).double()
    return counts.diagonal() / counts.sum(dim=1)


CONFUSION = [
    (
        "rows and columns exchanged",
        Confusion(lambda *x: counts_of(*x).T),
        confusion.counts_are_those_of_the_loop,
    ),
    ("ignored pixels count", Confusion(ignored_in_class_0), confusion.ignored_pixels_do_not_count),
    ("the last pixel is left out", Confusion(without_the_last), confusion.order_does_not_matter),
    ("counts are cut off", Confusion(at_most_two), confusion.counts_add_up),
    (
        "false positives are forgotten",
        Confusion(counts_of, iou=iou_of_the_truth),
        confusion.iou_is_that_of_the_counts,
    ),
    (
        "the truth is overwritten",
        Confusion(lambda t, p, C: counts_of(t.masked_fill_(t == 255, 0), p, C)),
        confusion.leaves_no_trace,
    ),
]

# --- Gram -----------------------------------------------------------------------------------------


def one_side_detached(student: Tensor, teacher: Tensor) -> Tensor:
    x, y = (F.normalize(z, dim=-1) for z in (student, teacher))
    return (x @ x.detach().mT - y @ y.mT).square().mean()


def teacher_follows(student: Tensor, teacher: Tensor) -> Tensor:
    x, y = (F.normalize(z, dim=-1) for z in (student, teacher))
    return (x @ x.mT - y @ y.mT).square().mean()


def divided_by_lengths(student: Tensor, teacher: Tensor) -> Tensor:
    x, y = (z / z.norm(dim=-1, keepdim=True) for z in (student, teacher.detach()))
    return (x @ x.mT - y @ y.mT).square().mean()


def first_feature_twice(student: Tensor, teacher: Tensor) -> Tensor:
    return textbook.gram(torch.cat([student, student[..., :1]], dim=-1), teacher)


def features_compared(student: Tensor, teacher: Tensor) -> Tensor:
    return textbook.gram(student, teacher) + 0 * (student - teacher).sum()


def bilinear(student: Tensor, teacher: Tensor) -> Tensor:
    if student.ndim == 4:
        size, channels_first = student.shape[1:3], teacher.permute(0, 3, 1, 2)
        resized = F.interpolate(channels_first, size=size, mode="bilinear", align_corners=False)
        student, teacher = student.flatten(1, 2), resized.flatten(2).mT
    return textbook.gram(student, teacher)


def patches_of_all_ranks_detached(student: Tensor, teacher: Tensor) -> Tensor:
    """Each rank compares its patches with all; others' terms with them give no gradient."""
    x, y = (F.normalize(z, dim=-1).flatten(0, 1) for z in (student, teacher.detach()))
    counts = collectives.row_counts(x, dist.group.WORLD)
    all_x, all_y = (collectives.gather_rows(z, counts, dist.group.WORLD) for z in (x, y))
    squares = (x @ all_x.mT - y @ all_y.mT).square()
    return squares.sum() * (len(counts) / sum(counts) ** 2)


def own_images_only(student: Tensor, teacher: Tensor) -> Tensor:
    return textbook.gram(student, teacher) if len(student) else student.sum()


def batch_gram(student: Tensor, teacher: Tensor) -> Tensor:
    return textbook.gram(student, teacher, per_image=False)


GRAM_LOSS = [
    (
        "a sum over the patches",
        Gram(lambda x, y: textbook.gram(x, y) * x.shape[1]),
        gram.equals_the_double_loop,
    ),
    ("one side is detached", Gram(one_side_detached), gram.gradient_is_that_of_the_equation),
    ("the teacher is not detached", Gram(teacher_follows), gram.teacher_gets_no_gradient),
    ("a feature counts twice", Gram(first_feature_twice), gram.a_rotation_changes_nothing),
    ("features are compared", Gram(features_compared), gram.other_features_may_be_more),
    (
        "patches are not normalised",
        Gram(lambda x, y: textbook.gram(x, y, normalize=False)),
        gram.lengths_do_not_matter,
    ),
    (
        "patches weigh by their place",
        Gram(lambda x, y: textbook.gram(x + by_place(x, 1), y)),
        gram.order_of_patches_does_not_matter,
    ),
    (
        "patches of all images are compared",
        Gram(lambda x, y: textbook.gram(x, y, per_image=False)),
        gram.images_do_not_mix,
    ),
    ("0 / 0 of a patch", Gram(divided_by_lengths), gram.patches_of_zeros_give_finite_numbers),
    ("a statistic moves in forward", Gram(traced(textbook.gram)), gram.leaves_no_trace),
    (
        "grids are resized bilinearly",
        Gram(bilinear, grids=True),
        gram.a_grid_of_another_size_is_resized,
    ),
    (
        "features are rounded to 8 bits",
        Gram(lambda x, y: textbook.gram(eight_bits(x).float(), y.float()), sixteen_bit=BOTH),
        gram.sixteen_bit_features_are_as_exact,
    ),
    (
        "products in the precision of autocast",
        Gram(textbook.gram, sixteen_bit=BOTH),
        gram.autocast_does_not_make_it_less_exact,
    ),
    (
        "other processes' patches are gathered without a gradient",
        Gram(batch_gram, per_image=False, on_ranks=patches_of_all_ranks_detached),
        gram.any_split_over_processes_gives_the_same,
    ),
    (
        "processes with few images weigh as much as others",
        Gram(textbook.gram, on_ranks=own_images_only),
        gram.any_split_over_processes_gives_the_same,
    ),
    (
        "a loop over patches",
        Gram(row_by_row(textbook.gram), compiles=True),
        gram.compiles_in_few_graphs,
    ),
]

# --- SIGReg ---------------------------------------------------------------------------------------


def sine_detached(x: Tensor, slices: Tensor) -> Tensor:
    """The statistic of x and -x together has no sine, and so no gradient along the mean."""
    both = textbook.sigreg(torch.cat([x, -x]), slices) / 2
    return both + (textbook.sigreg(x, slices) - both).detach()


def last_slice_alone(x: Tensor, slices: Tensor) -> Tensor:
    return textbook.sigreg(x, slices[:, -1:])


def views_pooled(x: Tensor, slices: Tensor) -> Tensor:
    return textbook.sigreg(x.flatten(0, -2), slices)


def whitened(x: Tensor, slices: Tensor) -> Tensor:
    return textbook.sigreg((x - x.mean(dim=0)) / x.std(dim=0, correction=0), slices)


def draws_anew(x: Tensor, slices: Tensor) -> Tensor:
    return textbook.sigreg(x, slices) + 0 * torch.randn(()).to(x)


def mean_of_means(x: Tensor, slices: Tensor) -> Tensor:
    """Each rank tests its own rows, and those without any nothing."""
    return textbook.sigreg(x, slices) if len(x) else x.sum()


SIGREG = [
    (
        "the number of rows is forgotten",
        SIGReg(lambda x, s: textbook.sigreg(x, s) / len(x)),
        sigreg.equals_the_loop,
    ),
    ("the mean is detached", SIGReg(sine_detached), sigreg.gradient_is_that_of_the_equation),
    (
        "rows weigh by their place",
        SIGReg(lambda x, s: textbook.sigreg(x * by_place(x, 0), s)),
        sigreg.order_does_not_matter,
    ),
    ("slices are left out", SIGReg(last_slice_alone), sigreg.slices_are_alike),
    ("views are pooled", SIGReg(views_pooled, views=True), sigreg.views_are_averaged),
    (
        "divided by a deviation of 0",
        SIGReg(whitened),
        sigreg.collapsed_features_give_finite_numbers,
    ),
    ("global random numbers are drawn", SIGReg(draws_anew), sigreg.leaves_no_trace),
    (
        "features are rounded to 8 bits",
        SIGReg(lambda x, s: textbook.sigreg(eight_bits(x).float(), s.float()), sixteen_bit=BOTH),
        sigreg.sixteen_bit_features_are_as_exact,
    ),
    (
        "projections in the precision of autocast",
        SIGReg(textbook.sigreg, sixteen_bit=BOTH),
        sigreg.autocast_does_not_make_it_less_exact,
    ),
    (
        "each process tests its own rows",
        SIGReg(textbook.sigreg, on_ranks=mean_of_means),
        sigreg.any_split_over_processes_gives_the_same,
    ),
    (
        "a loop over rows",
        SIGReg(row_by_row(textbook.sigreg), compiles=True),
        sigreg.compiles_in_few_graphs,
    ),
]


# --- centering ------------------------------------------------------------------------------------


class Center(nn.Module):
    """A centre that is right; the faulty ones change one method."""

    def __init__(self, num_prototypes: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(num_prototypes))

    @torch.no_grad()
    def update(self, logits: Tensor) -> None:
        if len(logits):
            self.move(self.mean(logits))

    def mean(self, logits: Tensor) -> Tensor:
        return logits.float().mean(dim=0)

    def move(self, mean: Tensor) -> None:
        self.center.lerp_(mean, 1 - self.momentum)

    def probs(self, logits: Tensor, temperature: float) -> Tensor:
        return ((logits.detach() - self.center) / temperature).softmax(dim=1)


class MomentumExchanged(Center):
    def move(self, mean):
        self.center.lerp_(mean, self.momentum)


class MovesWhenAsked(Center):
    def probs(self, logits, temperature):
        found = super().probs(logits, temperature)
        self.update(logits)
        return found


class FirstRow(Center):
    def mean(self, logits):
        return logits[0].float()


class OneMean(Center):
    """One number for all prototypes."""

    def mean(self, logits):
        return super().mean(logits).mean().expand(logits.shape[1])


class MeanOfNothing(Center):
    def update(self, logits):
        with torch.no_grad():
            self.move(self.mean(logits))


class UnsafeSoftmax(Center):
    def probs(self, logits, temperature):
        weights = ((logits.detach() - self.center) / temperature).exp()
        return weights / weights.sum(dim=1, keepdim=True)


class TeacherHasGradient(Center):
    def probs(self, logits, temperature):
        return ((logits - self.center) / temperature).softmax(dim=1)


class SumInSixteenBits(Center):
    def mean(self, logits):
        total = logits[:1].clone()[0]
        for rows in logits.split(8):  # partial sums are rounded to the type of the logits
            total = (total.float() + rows.float().sum(dim=0)).to(logits.dtype)
        return (total - logits[0]).float() / len(logits)


class UnsavedCenter(Center):
    def __init__(self, num_prototypes, momentum):
        super().__init__(num_prototypes, momentum)
        self.register_buffer("center", torch.zeros(num_prototypes), persistent=False)


class MeanOfMeans(Center):
    """lightly's and DINO's: the ranks' means are averaged, whatever the numbers of their rows."""

    def update(self, logits):
        mean = self.mean(logits) if len(logits) else torch.zeros_like(self.center)
        dist.all_reduce(mean)
        self.move(mean / dist.get_world_size())


def update_center(center: Center, logits: Tensor) -> None:
    center.update(logits)


def center_of(made: type[Center], **promises) -> Centering:
    return Centering(made, made.update, made.probs, **promises)


def in_a_loop(center: Center, logits: Tensor, temperature: float) -> Tensor:
    return torch.stack([center.probs(row[None], temperature)[0] for row in logits])


CENTERING = [
    (
        "momentum and rest exchanged",
        center_of(MomentumExchanged),
        centering.follows_the_recursion,
    ),
    (
        "the centre moves before it is used again",
        center_of(MovesWhenAsked),
        centering.assigning_changes_nothing,
    ),
    ("the first row alone", center_of(FirstRow), centering.order_of_rows_does_not_matter),
    (
        "one mean for all prototypes",
        center_of(OneMean),
        centering.a_shift_of_a_prototype_is_centred_away,
    ),
    ("the mean of nothing", center_of(MeanOfNothing), centering.no_rows_leave_the_centre),
    ("exp without a shift", center_of(UnsafeSoftmax), centering.is_finite_over_its_range),
    ("the teacher gets a gradient", center_of(TeacherHasGradient), centering.has_no_gradient),
    (
        "a sum in 16 bits",
        center_of(SumInSixteenBits, sixteen_bit=BOTH),
        centering.many_sixteen_bit_rows_are_averaged_as_well,
    ),
    (
        "the centre is not saved",
        center_of(UnsavedCenter),
        centering.a_resumed_centre_has_the_same_future,
    ),
    (
        "a mean of the processes' means",
        Centering(Center, update_center, Center.probs, on_ranks=MeanOfMeans),
        centering.any_split_over_processes_gives_the_same,
    ),
    (
        "a loop over rows",
        Centering(Center, Center.update, in_a_loop, compiles=True),
        centering.compiles_in_few_graphs,
    ),
]

# --- AUROC ----------------------------------------------------------------------------------------


def area(positive: Tensor, negative: Tensor, ties: float = 0.5) -> Tensor:
    higher = (positive[:, None] > negative).double()
    return (higher + ties * (positive[:, None] == negative)).mean()


def without_ties(positive: Tensor, negative: Tensor) -> Tensor:
    return area(positive, negative, ties=0.0)


def sum_of_ranks(positive: Tensor, negative: Tensor) -> Tensor:
    """Mann and Whitney's sum of ranks, ties ranked in the order in which they come."""
    ranks = torch.cat([positive, negative]).argsort(stable=True).argsort() + 1.0
    n, m = len(positive), len(negative)
    return (ranks[:n].sum() - n * (n + 1) / 2) / (n * m)


def of_pairs_in_order(positive: Tensor, negative: Tensor) -> Tensor:
    n = min(len(positive), len(negative))
    return (positive[:n] > negative[:n]).double().mean()


def of_sigmoids(positive: Tensor, negative: Tensor) -> Tensor:
    return area(positive.sigmoid(), negative.sigmoid())


def at_least_half(positive: Tensor, negative: Tensor) -> Tensor:
    found = area(positive, negative)
    return torch.maximum(found, 1 - found)


def with_a_few_thresholds(positive: Tensor, negative: Tensor) -> Tensor:
    """A histogram of 50 bins, which small batches do not fill."""
    both = torch.cat([positive, negative])
    edges = both.unique() if both.numel() < 50 else torch.linspace(both.min(), both.max(), 50)
    return area(torch.bucketize(positive, edges), torch.bucketize(negative, edges))


AREA = [
    ("ties count nothing", AUROC(without_ties), auroc.is_the_share_of_pairs),
    ("ties are ranked as they come", AUROC(sum_of_ranks), auroc.ties_count_half),
    ("pairs in the order of the items", AUROC(of_pairs_in_order), auroc.order_does_not_matter),
    ("a sigmoid that saturates", AUROC(of_sigmoids), auroc.only_the_ranking_counts),
    ("never below one half", AUROC(at_least_half), auroc.classes_may_be_exchanged),
    ("a histogram", AUROC(with_a_few_thresholds), auroc.many_items_are_counted_exactly),
    (
        "scores are sorted in place",
        AUROC(lambda p, n: area(p.copy_(p.sort().values).mul_(2), n)),
        auroc.leaves_no_trace,
    ),
]

# --- layer decay ----------------------------------------------------------------------------------


def layers(vit: nn.Module, decay: float) -> list[dict]:
    return own.groups(vit, decay)


def grouped(vit: nn.Module, scale, decays=lambda name, p: p.ndim > 1) -> list[dict]:
    """One group a parameter, by functions of its name."""
    return [
        {"params": [p], "lr_scale": scale(name), "weight_decay": float(decays(name, p))}
        for name, p in vit.named_parameters()
        if p.requires_grad
    ]


def in_the_order_of_names(vit: nn.Module, decay: float) -> list[dict]:
    """blocks.10 stands before blocks.2."""
    blocks = sorted({name.split(".")[1] for name, _ in vit.named_parameters() if "blocks" in name})

    def layer(name: str) -> int:
        if name.startswith("blocks."):
            return blocks.index(name.split(".")[1]) + 1
        return len(blocks) + 1 if name.startswith(("norm", "head")) else 0

    return grouped(vit, lambda name: decay ** (len(blocks) + 1 - layer(name)))


def from_the_wrong_end(vit: nn.Module, decay: float) -> list[dict]:
    made = layers(vit, decay)
    return [{**group, "lr_scale": decay ** len(vit.blocks) / group["lr_scale"]} for group in made]


def without_the_head(vit: nn.Module, decay: float) -> list[dict]:
    head = {id(p) for p in vit.head.parameters()}
    made = layers(vit, decay)
    return [{**g, "params": [p for p in g["params"] if id(p) not in head]} for g in made]


def frozen_ones_too(vit: nn.Module, decay: float) -> list[dict]:
    frozen = [p for p in vit.parameters() if not p.requires_grad]
    return [*layers(vit, decay), {"params": frozen, "lr_scale": 1.0, "weight_decay": 0.0}]


def biases_decay(vit: nn.Module, decay: float) -> list[dict]:
    return [{**group, "weight_decay": 1.0} for group in layers(vit, decay)]


def half_of_no_decay(vit: nn.Module, decay: float) -> list[dict]:
    return [{**group, "lr_scale": group["lr_scale"] * 0.5} for group in layers(vit, decay)]


def freezes_the_slowest(vit: nn.Module, decay: float) -> list[dict]:
    made = layers(vit, decay)
    vit.cls_token.requires_grad_(False)
    return made


LAYER_DECAY = [
    (
        "blocks in the order of their names",
        LayerDecay(in_the_order_of_names),
        layer_decay.rates_are_those_of_the_layers,
    ),
    (
        "the head is in no group",
        LayerDecay(without_the_head),
        layer_decay.every_parameter_is_in_one_group,
    ),
    (
        "frozen parameters are optimized",
        LayerDecay(frozen_ones_too),
        layer_decay.every_parameter_is_in_one_group,
    ),
    ("biases decay", LayerDecay(biases_decay), layer_decay.matrices_alone_decay),
    (
        "layers are counted from the head",
        LayerDecay(from_the_wrong_end),
        layer_decay.later_layers_are_not_slower,
    ),
    ("half of every rate", LayerDecay(half_of_no_decay), layer_decay.no_decay_is_one_rate),
    (
        "the slowest parameters are frozen",
        LayerDecay(freezes_the_slowest),
        layer_decay.leaves_the_model_alone,
    ),
]

# --- RASA -----------------------------------------------------------------------------------------


class Removal(nn.Module):
    """Regression on the position, iterated: right; the faulty ones change one method."""

    def __init__(self, dim: int, num_iterations: int) -> None:
        super().__init__()
        self.num_iterations = num_iterations
        self.register_buffer("matrix", torch.eye(dim, dtype=torch.float64))

    def fit(self, batches) -> None:
        rows, targets = [], []
        for x in batches:
            B, H, W, _ = x.shape
            grid = rasa.positions(H, W)
            rows.append(self.read(x.double().flatten(0, 2)))
            targets.append(torch.tensor(grid, dtype=torch.float64).repeat(B, 1))
        x, p = torch.cat(rows), torch.cat(targets)
        basis = x.new_zeros(0, x.shape[1])
        for _ in range(self.num_iterations):
            plane = self.plane(x - x @ basis.T @ basis, p)
            if plane is None:
                break
            basis = torch.cat([basis, plane])
        self.matrix.copy_(self.removal(basis))

    def read(self, rows: Tensor) -> Tensor:
        return rows

    def plane(self, x: Tensor, p: Tensor) -> Tensor | None:
        """Orthonormal directions of the covariance with the position, while there is any."""
        weight = (x - x.mean(dim=0)).T @ (p - p.mean(dim=0)) / len(x)
        return torch.linalg.qr(weight).Q.T if weight.norm() > 0.1 else None

    def removal(self, basis: Tensor) -> Tensor:
        return torch.eye(basis.shape[1], dtype=torch.float64) - basis.T @ basis

    def forward(self, x: Tensor) -> Tensor:
        return (x.double() @ self.matrix).to(x.dtype)


class RowsAlone(Removal):
    """The column of a patch is forgotten."""

    def plane(self, x, p):
        return super().plane(x, p[:, :1])


class Everything(Removal):
    def removal(self, basis):
        return super().removal(torch.eye(basis.shape[1], dtype=torch.float64)[:-1])


class HalfRemoved(Removal):
    def removal(self, basis):
        return (super().removal(basis) + torch.eye(basis.shape[1], dtype=torch.float64)) / 2


class TenDirections(Removal):
    def removal(self, basis):
        return super().removal(torch.eye(basis.shape[1], dtype=torch.float64)[:10])


class Centred(Removal):
    def forward(self, x):
        return super().forward(x - x.mean(dim=tuple(range(x.ndim - 1)), keepdim=True))


class NotIdle(Removal):
    def __init__(self, dim, num_iterations):
        super().__init__(dim, num_iterations)
        self.matrix[0, 0] = 0


class LastBatch(Removal):
    def fit(self, batches):
        super().fit(batches[-1:])


class GlobalSeed(Removal):
    def read(self, rows):
        return rows[torch.randperm(len(rows)).sort().values]


class SixteenBits(Removal):
    def forward(self, x):
        return eight_bits(super().forward(x))


class UnsavedMatrix(Removal):
    def __init__(self, dim, num_iterations):
        super().__init__(dim, num_iterations)
        self.register_buffer("matrix", torch.eye(dim, dtype=torch.float64), persistent=False)


def removal_of(made: type[Removal], **promises) -> RASA:
    return RASA(made, made.fit, **promises)


def basis_of(removal: Removal) -> Tensor:
    values, vectors = torch.linalg.eigh(torch.eye(len(removal.matrix)) - removal.matrix)
    return vectors.T[values > 0.5]


def folded(removal: Removal, linear: nn.Linear) -> nn.Linear:
    made = deepcopy(linear)
    with torch.no_grad():
        made.weight.copy_(removal.matrix @ linear.weight.double())
        made.bias.copy_(removal.matrix @ linear.bias.double())
    return made


def folded_without_bias(removal: Removal, linear: nn.Linear) -> nn.Linear:
    made = folded(removal, linear)
    made.bias = linear.bias
    return made


POSITION = [
    ("columns are left", removal_of(RowsAlone), rasa.position_is_gone),
    ("all but one direction are removed", removal_of(Everything), rasa.content_is_kept),
    ("half of the position is left", removal_of(HalfRemoved), rasa.is_an_exact_projector),
    ("ten directions", removal_of(TenDirections), rasa.two_directions_an_iteration),
    (
        "a basis that is not normalised",
        removal_of(Removal, basis=lambda removal: 2 * basis_of(removal)),
        rasa.removes_the_span_of_its_basis,
    ),
    ("features are centred", removal_of(Centred), rasa.rows_do_not_mix),
    ("a direction is always removed", removal_of(NotIdle), rasa.nothing_is_removed_before_the_fit),
    ("the last batch alone", removal_of(LastBatch), rasa.batches_do_not_matter),
    (
        "the bias is not projected",
        removal_of(Removal, fold=folded_without_bias),
        rasa.a_folded_layer_is_the_same,
    ),
    ("the global generator", removal_of(GlobalSeed), rasa.leaves_no_trace),
    (
        "projected in 8 bits",
        removal_of(SixteenBits, sixteen_bit=BOTH),
        rasa.sixteen_bit_features_are_projected_as_exactly,
    ),
    ("the matrix is not saved", removal_of(UnsavedMatrix), rasa.a_loaded_module_is_the_same),
]

# --- encoders of crops ----------------------------------------------------------------------------


class Attending(nn.Module):
    """One layer of attention over the patches of an image, with masks: right."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed = nn.Conv2d(3, 4, 2, stride=2)
            self.cls_token = nn.Parameter(torch.randn(1, 1, 4))
            self.mask_token = nn.Parameter(torch.randn(4))
            self.norm = nn.LayerNorm(4)

    def patches(self, x, mask):
        rows = self.embed(x).flatten(2).mT  # [B, N, 4]
        if mask is not None:
            rows = torch.where(mask.flatten(1)[..., None], self.mask_token, rows)
        return rows

    def attend(self, tokens):
        return tokens + (tokens @ tokens.mT / 2).softmax(dim=-1) @ tokens

    def encode(self, x, mask):
        rows = self.patches(x, mask)
        cls = self.cls_token.expand(len(x), -1, -1)
        return self.norm(self.attend(torch.cat([cls, rows], dim=1)))

    def many(self, crops, masks):
        masks = [None] * len(crops) if masks is None else masks
        return [self.encode(x, mask) for x, mask in zip(crops, masks, strict=True)]


class SquareGrids(Attending):
    def patches(self, x, mask):
        side = min(x.shape[2:])
        return super().patches(x[..., :side, :side], mask)


class AttendingToAll(Attending):
    """Packed crops without a mask of the attention: tokens of other crops are seen."""

    def many(self, crops, masks):
        found = super().many(crops, masks)
        mean = torch.cat([tokens.flatten(0, 1) for tokens in found]).mean(dim=0)
        return [tokens + 0.1 * mean for tokens in found] if len(found) > 1 else found


class BatchCentred(Attending):
    def attend(self, tokens):
        return super().attend(tokens - tokens.mean(dim=0))


class SeesMasked(Attending):
    def attend(self, tokens):
        return super().attend(tokens) + self.pixels * torch.arange(4.0)

    def patches(self, x, mask):
        self.pixels = x.mean()
        return super().patches(x, mask)


class SecondDetached(Attending):
    def many(self, crops, masks):
        first, *others = super().many(crops, masks)
        return [first.detach() + 0 * others[0].sum(), *others] if others else [first]


class Running(Attending):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def attend(self, tokens):
        self.calls += 1
        return super().attend(tokens)


def encoder_of(made: type[Attending]) -> Encoder:
    return Encoder(made, lambda module, crops, masks: module.many(crops, masks), patch_size=2)


ENCODER = [
    ("grids are cut to squares", encoder_of(SquareGrids), encoder.has_a_token_for_each_patch),
    (
        "attention over all packed crops",
        encoder_of(AttendingToAll),
        encoder.each_crop_is_encoded_as_if_alone,
    ),
    ("tokens are centred over the batch", encoder_of(BatchCentred), encoder.images_do_not_mix),
    ("masked pixels are seen", encoder_of(SeesMasked), encoder.masked_patches_are_not_seen),
    (
        "the first of several resolutions is detached",
        encoder_of(SecondDetached),
        encoder.gradients_of_crops_add_up,
    ),
    ("forward counts its calls", encoder_of(Running), encoder.leaves_no_trace),
]

FAULTS = [
    *SINKHORN,
    *DINO_LOSS,
    *IBOT_LOSS,
    *KOLEO,
    *GRAM_LOSS,
    *SIGREG,
    *LOSS,
    *EMA_TEACHER,
    *MASKS,
    *HEAD,
    *SCHEDULE,
    *NEIGHBOURS,
    *CONFUSION,
    *CENTERING,
    *AREA,
    *LAYER_DECAY,
    *POSITION,
    *ENCODER,
]

SOUND = {
    "sinkhorn": Sinkhorn(log_sinkhorn),
    "dino": DINO(right_dino),
    "ibot": IBOT(right_ibot),
    "koleo": KoLeo(textbook.koleo),
    "gram": Gram(textbook.gram),
    "sigreg": SIGReg(textbook.sigreg, views=True),
    "loss": Loss(barlow),
    "teacher": ema_of(Teacher),
    "head": Head(Levels),
    "neighbours": KNN(votes),
    "centering": center_of(Center, sixteen_bit=BOTH, compiles=True),
    "area": AUROC(area),
    "removal": removal_of(Removal, basis=basis_of, fold=folded),
    "encoder": encoder_of(Attending),
}

"""Linear classification on frozen features: a grid of linear heads, trained in one loop.

The protocol of DINOv2 (Oquab et al. 2024, arXiv 2304.07193, appendix B.3) without its data
augmentation: the features are cached, one view an image.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor

from sslkit.evaluation.labels import warn_of_one_class, with_labels
from sslkit.evaluation.linear_head import (
    ITEMS_AT_ONCE,
    LinearHead,
    LinearInput,
)

LEARNING_RATES = (
    *(1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4),
    *(1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1),
)
_MOMENTUM, _INIT_STD = 0.9, 0.01


@dataclass(frozen=True)
class LinearProbeResult:
    """The heads' scores on the validation images, and the best head.

    Attributes:
        accuracies: top-1 accuracy of each head, in 0..1, by its input and its learning rate.
        best: the head with the highest accuracy; of equal ones, the first of ``accuracies``.
        predictions: int64 [Q], of the best head, for the Q labelled validation images.
        correct: bool [Q], of the best head.
    """

    accuracies: dict[tuple[LinearInput, float], float]
    best: LinearHead
    predictions: Tensor
    correct: Tensor

    @property
    def accuracy(self) -> float:
        """Accuracy of the best head, which was chosen on the very same images."""
        return self.accuracies[self.best.inputs, self.best.learning_rate]


def linear_probe(
    train_cls: Tensor,
    train_mean_patch: Tensor | None,
    train_labels: Tensor,
    test_cls: Tensor,
    test_mean_patch: Tensor | None,
    test_labels: Tensor,
    *,
    generator: torch.Generator,
    num_blocks: Sequence[int] = (1, 4),
    mean_patch: Sequence[bool] = (False, True),
    learning_rates: Sequence[float] = LEARNING_RATES,
    num_steps: int = 12_500,
    batch_size: int = 1024,
    num_classes: int | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> LinearProbeResult:
    """Train a linear head for each input and learning rate, and report the best.

    **The best head is chosen on the test images**, as in DINOv2, where they are ImageNet's
    validation images: its accuracy is the largest of all heads', and so slightly optimistic. For a
    number without this bias, choose here on images held out of the training set, and score
    ``best.logits`` of the test images.

    The heads of one input are one linear map ``d -> heads * C``: a step costs
    ``4 * batch * d * heads * C`` floating-point operations an input (logits and weight gradient;
    there is no gradient of the features), and one read of the batch. With the defaults, ImageNet
    and D = 768 that is 0.5 TFLOP a step for all four inputs: minutes to an hour on a GPU, too long
    on a CPU; 20,000 images of 10 classes take minutes on one core.

    Each head is what it would be if it were trained alone: with ``lr = learning_rate * batch_size
    / 256`` and g the gradient of the batch's mean cross-entropy, at step t = 0, 1, ..., T - 1::

        v = 0.9 v + g
        w = w - lr * (1 + cos(pi t / T)) / 2 * v

    There is no weight decay. Weights start from N(0, 0.01²), biases from 0. Batches go through
    the training items in random order; each pass has an order of its own, and a batch may end one
    pass and begin the next.

    Args:
        train_cls: class tokens [N, n, D] of the last n blocks, shallow to deep, after the final
            norm; any float type, also memory-mapped.
        train_mean_patch: mean patch tokens [N, D] of the last block; None if no head reads them.
        train_labels: int [N]; items of label -1 are left out, and a warning says how many.
        test_cls, test_mean_patch, test_labels: the validation images; those of label -1 are left
            out, and a label that was not trained counts as wrong.
        generator: a CPU generator of the weights at the start and of the batches.
        num_blocks: inputs: how many class tokens.
        mean_patch: inputs: without and with the mean patch token.
        learning_rates: for a batch of 256.
        num_steps: T.
        batch_size: items a step; 1024 is DINOv2's 8 × 128, with 12,500 steps 10 passes of ImageNet.
        num_classes: what training labels must be below; only checked. The C classes of a head are
            those that occur among them.
        device: where the heads are trained.
        progress: called with the number of steps done, after each.

    >>> generator = torch.Generator().manual_seed(0)
    >>> labels = torch.arange(60) % 3
    >>> cls = torch.eye(3)[labels][:, None]  # [60, 1, 3]
    >>> settings = {"num_blocks": (1,), "num_steps": 50, "batch_size": 16}
    >>> cls_only = {"mean_patch": (False,), "generator": generator}
    >>> result = linear_probe(cls, None, labels, cls, None, labels, **settings, **cls_only)
    >>> result.accuracy, result.best.weight.shape, str(result.best.inputs)
    (1.0, torch.Size([3, 3]), '1 block')
    """
    _check("train", train_cls, train_mean_patch, train_labels)
    _check("test", test_cls, test_mean_patch, test_labels)
    train_labels, train_cls, train_mean_patch = with_labels(
        train_labels, train_cls, train_mean_patch, name="train_labels"
    )
    warn_of_one_class(train_labels, name="train_labels")
    test_labels, test_cls, test_mean_patch = with_labels(
        test_labels, test_cls, test_mean_patch, name="test_labels"
    )
    if num_classes is not None and int(train_labels.max()) >= num_classes:
        raise ValueError(
            f"train_labels holds {int(train_labels.max())}, but num_classes={num_classes}"
        )
    classes, train_labels = train_labels.cpu().unique(return_inverse=True)
    C = len(classes)
    if num_steps < 1 or batch_size < 1:
        raise ValueError(
            f"num_steps and batch_size must be at least 1, got {num_steps} and {batch_size}"
        )
    inputs = [
        LinearInput(n, p) for n in dict.fromkeys(num_blocks) for p in dict.fromkeys(mean_patch)
    ]
    learning_rates = list(dict.fromkeys(learning_rates))
    if not inputs or not learning_rates:
        raise ValueError("num_blocks, mean_patch and learning_rates must each hold a value")
    if train_cls.shape[2] != test_cls.shape[2]:
        raise ValueError(
            f"train_cls and test_cls must have the same D, got {train_cls.shape[2]} and "
            f"{test_cls.shape[2]}"
        )
    for one in inputs:  # complains about what is missing
        one(train_cls[:1], None if train_mean_patch is None else train_mean_patch[:1])
        one(test_cls[:1], None if test_mean_patch is None else test_mean_patch[:1])
    joined = _JoinedInputs(inputs, max(num_blocks), train_cls.shape[2])
    weights = [
        weight.to(device)
        for weight in joined.start(len(learning_rates) * C, generator)  # [heads * C, d + 1]
    ]
    velocities = [torch.zeros_like(weight) for weight in weights]
    rates = torch.tensor(learning_rates, device=device) * (batch_size / 256)
    rates = repeat(rates, "head -> (head c) 1", c=C)
    for step, batch in enumerate(_batches(len(train_cls), batch_size, num_steps, generator)):
        cosine = (1 + math.cos(math.pi * step / num_steps)) / 2
        label = train_labels[batch].to(device, torch.int64)
        parts = joined(train_cls, train_mean_patch, batch, device)
        for x, weight, velocity in zip(parts, weights, velocities, strict=True):
            velocity.mul_(_MOMENTUM).addmm_(_logit_gradient(x @ weight.T, label, C).T, x)
            weight.addcmul_(rates, velocity, value=-cosine)
        if progress is not None:
            progress(step + 1)
    if not all(weight.isfinite().all() for weight in weights):
        raise ValueError(
            "the trained weights are not finite: the training features hold NaN or infinite values"
        )

    predicted: list[list[Tensor]] = [[] for _ in inputs]
    for rows in torch.arange(len(test_cls)).split(ITEMS_AT_ONCE):
        parts = joined(test_cls, test_mean_patch, rows, device)
        for x, weight, found in zip(parts, weights, predicted, strict=True):
            logits = rearrange(x @ weight.T, "row (head c) -> row head c", c=C)
            found.append(logits.argmax(-1).cpu())  # [rows, heads]
    truth = test_labels.cpu()
    guesses = {
        (one, rate): classes[guess]
        for one, found in zip(inputs, predicted, strict=True)
        for rate, guess in zip(learning_rates, torch.cat(found).T, strict=True)
    }
    accuracies = {head: (guess == truth).double().mean().item() for head, guess in guesses.items()}
    one, rate = max(accuracies, key=lambda head: accuracies[head])  # the first of equal ones
    i = learning_rates.index(rate)
    rows_of_head = weights[inputs.index(one)][i * C : (i + 1) * C].cpu()
    best = LinearHead(one, rate, *joined.split(one, rows_of_head), classes)
    guess = guesses[one, rate]
    return LinearProbeResult(accuracies, best, guess, guess == truth)


def _logit_gradient(logits: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Gradient of each head's mean cross-entropy [batch, heads * C]: (softmax - onehot) / batch."""
    logits = rearrange(logits, "row (head c) -> row head c", c=num_classes)
    # Below e^-60 the products with the features are subnormal, and several times slower.
    gradient = (logits - logits.amax(-1, keepdim=True)).clamp_(min=-60).exp_()
    gradient /= gradient.sum(-1, keepdim=True) * len(labels)
    where = labels[:, None, None].expand(-1, gradient.shape[1], 1)
    less = gradient.new_full((), -1 / len(labels)).expand(where.shape)
    return rearrange(gradient.scatter_add_(2, where, less), "row head c -> row (head c)")


@dataclass(frozen=True)
class _JoinedInputs:
    """[class tokens of the last ``most`` blocks, 1, mean patch]: every input is a slice of it.

    The 1 stands for the bias, which is so a column of the weight.
    """

    inputs: list[LinearInput]
    most: int
    dim: int

    def __call__(
        self, cls: Tensor, patch: Tensor | None, rows: Tensor, device: torch.device | str
    ) -> list[Tensor]:
        """For each input, float32 [rows, d + 1]."""
        tokens = cls[rows, -self.most :].to(device).float()
        tokens = rearrange(tokens, "row block d -> row (block d)")
        parts = [tokens, tokens.new_ones(len(rows), 1)]
        if patch is not None:
            parts.append(patch[rows].to(device).float())
        joined = torch.cat(parts, dim=1)
        end = self.most * self.dim + 1
        return [
            joined[:, (self.most - one.num_blocks) * self.dim : end + self.dim * one.mean_patch]
            for one in self.inputs
        ]

    def start(self, num_rows: int, generator: torch.Generator) -> Iterator[Tensor]:
        """For each input, the weight and bias before the first step, [num_rows, d + 1]."""
        for one in self.inputs:
            d = (one.num_blocks + one.mean_patch) * self.dim
            weight = torch.randn(num_rows, d, generator=generator) * _INIT_STD
            cls, patch = weight.tensor_split((one.num_blocks * self.dim,), dim=1)
            yield torch.cat([cls, weight.new_zeros(num_rows, 1), patch], dim=1)

    def split(self, one: LinearInput, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Weight [C, d] and bias [C] of rows [C, d + 1]."""
        at = one.num_blocks * self.dim
        return torch.cat([weight[:, :at], weight[:, at + 1 :]], dim=1), weight[:, at].clone()


def _batches(
    num_items: int, batch_size: int, num_steps: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Indices [batch_size], ``num_steps`` times: permutations of the items, one after another."""
    waiting = torch.empty(0, dtype=torch.int64)
    for _ in range(num_steps):
        while len(waiting) < batch_size:
            waiting = torch.cat([waiting, torch.randperm(num_items, generator=generator)])
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


def _check(split: str, cls: Tensor, patch: Tensor | None, labels: Tensor) -> None:
    if cls.ndim != 3:
        raise ValueError(
            f"{split}_cls must be the class tokens [N, n, D] of the last n blocks, got "
            f"{list(cls.shape)}"
        )
    if not len(cls):
        raise ValueError(f"{split}_cls is empty: the probe needs at least one item")
    if patch is not None and patch.shape != (len(cls), cls.shape[2]):
        raise ValueError(
            f"{split}_mean_patch must be [{len(cls)}, {cls.shape[2]}], as {split}_cls is "
            f"{list(cls.shape)}; got {list(patch.shape)}"
        )
    if labels.shape != cls.shape[:1]:
        raise ValueError(
            f"{split}_labels must be [{len(cls)}], one for each of {split}_cls, got "
            f"{list(labels.shape)}"
        )

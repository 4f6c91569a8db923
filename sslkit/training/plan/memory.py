"""Bytes on one GPU in each phase of a step of the recipe, derived from its shapes.

Not counted: CUDA contexts, buffers of NCCL and cuDNN, fragmentation, and what is tiny beside the
rest: masks, statistics of losses, drop path.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch

from sslkit.ops.attention import HEAD_SIZES_TRITON, MAX_TOKENS_TRITON
from sslkit.slices import block_elements, chunks
from sslkit.training.plan.hardware import Strategy
from sslkit.training.plan.workload import FLOAT, NUM_GLOBAL, Workload, parameters

Device = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class Memory:
    """Bytes that lie on one GPU at the fullest moment of one phase of a step."""

    phase: str
    parameters: float
    teacher: float
    optimizer: float
    """Two moments; while it runs, its work space too."""
    gradients: float
    copies: float
    """Parameters in the encoder's precision or gathered, gradients on their way to others."""
    activations: float
    """With the images, what autograd keeps of encoder and heads, and the backward's work space."""
    scores: float
    """Of teacher and student: written, or as factors with their chunk."""

    @property
    def parts(self) -> dict[str, float]:
        """By name, without the phase."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "phase"}

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(self.parts.values())


def state_bytes(work: Workload, strategy: Strategy) -> float:
    """Student, teacher and the two moments of AdamW on one GPU, between two steps."""
    return 4 * FLOAT * parameters(work).total / strategy.shards


def between_steps(work: Workload, strategy: Strategy) -> float:
    """Bytes on one GPU when a step begins: state, and gradients of the one before."""
    return 5 * FLOAT * parameters(work).total / strategy.shards + _copies(work, strategy).always


def peak(work: Workload, strategy: Strategy, device: Device = "cuda") -> Memory:
    """The fullest phase of a step."""
    return max(phases(work, strategy, device), key=lambda memory: memory.total)


class _Sizes(NamedTuple):
    """Bytes of what a micro-batch leaves on one GPU, and of the work space that it needs."""

    crops: float
    teacher_block: float
    """Work space of the teacher's last MLP."""
    student_tokens: float
    teacher_scores: float
    teacher_prototypes: float
    """Normalised ones, where scores are factored."""
    student_scores: float
    """With normalised prototypes where scores are factored."""
    encoder_forward: float
    """What autograd keeps of the blocks."""
    encoder_backward: float
    """The same when the backward of the last block begins, and its work space."""
    dino_head: float
    """What autograd keeps of the head."""
    ibot_head: float
    loss: float
    """Tiles or chunks of scores that a loss is computed in."""


def _sizes(work: Workload, strategy: Strategy, device: Device) -> _Sizes:
    D, F, element = work.width, work.mlp_hidden, work.element
    gated = work.mlp == "swiglu"
    images = work.batch_size / strategy.gpus / work.accumulation
    tokens = [images * count * length for count, length in work.crops]
    T, T_teacher = sum(tokens), tokens[0]
    dino_rows, ibot_rows = images * (NUM_GLOBAL + work.num_local), images * work.masked
    teacher_rows = images * NUM_GLOBAL

    # A CPU has the batch already; micro-batches that are not all of it are copies on any device.
    pixels = NUM_GLOBAL * work.global_size**2 + work.num_local * work.local_size**2
    copies = (device == "cuda") + (work.accumulation > 1)
    crops = copies * images * work.in_chans * pixels * FLOAT

    # Without gradients: the block's input, that plus attention, and the norm's output (in half
    # precision a copy of it too); of the MLP both halves, silu(x1) and the product, or GELU's ends.
    half_copy = element if element < FLOAT else 0
    in_teacher = D * (3 * FLOAT + half_copy) + (4 if gated else 2) * F * element

    # Autograd keeps of a block all but its input. With checkpoints it keeps the inputs alone, and
    # in the backward the rest of one block.
    inputs, inner = work.depth * T * D * FLOAT, T * _kept_inside_block(work, device)
    forward = inputs + (0 if work.activation_checkpointing else work.depth * inner)
    inner_backward = inner if work.activation_checkpointing else work.depth * inner
    # The backward begins with y of the last LayerScale, which it releases, and the gradient of the
    # residual stream. It is fullest at silu(x1) * x2: of [T, F] the gradients of the product and of
    # both factors, less the product, released by the layer before. Of a GELU: both its gradients,
    # less its output.
    work_space = T * (D * FLOAT - D * element + (2 if gated else 1) * F * element)

    bottlenecks = work.dino_bottleneck, work.ibot_bottleneck
    factored = sum(_normalised(work, b) for b in bottlenecks) if work.factored_scores else 0.0
    return _Sizes(
        crops=crops,
        teacher_block=T_teacher * in_teacher,
        student_tokens=T * D * FLOAT,
        teacher_scores=_scores(work, teacher_rows, ibot_rows),
        teacher_prototypes=factored,
        student_scores=_scores(work, dino_rows, ibot_rows) + factored,
        encoder_forward=forward,
        encoder_backward=inputs + inner_backward + work_space,
        dino_head=_kept_by_head(work, work.dino_bottleneck, dino_rows),
        ibot_head=_kept_by_head(work, work.ibot_bottleneck, ibot_rows),
        loss=max(
            _loss_work_space(work, dino_rows, teacher_rows, device),
            _loss_work_space(work, ibot_rows, ibot_rows, device),
        ),
    )


def _kept_inside_block(work: Workload, device: Device) -> float:
    """Bytes a token that autograd keeps of a block, without the block's input."""
    D, F, element = work.width, work.mlp_hidden, work.element
    kept = D * FLOAT  # input of the second norm: the residual stream is float32 under autocast
    kept += 2 * 2 * FLOAT  # mean and deviation of both norms
    # In the branches' type: outputs of both norms; q, k and v; attention's output, which is the
    # input of its projection; y of both LayerScales.
    kept += (2 + 3 + 1 + 2) * D * element
    kept += work.heads * FLOAT  # log-sum-exp of attention
    # If attention is called for each resolution, the projection has their concatenation, a copy.
    one_call = (
        device == "cuda"
        and work.precision == "bfloat16"
        and D // work.heads in HEAD_SIZES_TRITON
        and work.crops[0][1] <= MAX_TOKENS_TRITON
    )
    kept += 0 if one_call or len(work.crops) == 1 else D * element
    # [x1, x2], silu(x1) and the product; of a plain MLP both ends of the GELU.
    return kept + (4 if work.mlp == "swiglu" else 2) * F * element


def _kept_by_head(work: Workload, bottleneck: int, rows: float) -> float:
    """Bytes that autograd keeps of a head of so many rows; factored scores keep prototypes."""
    kept = work.width  # its input, which all levels share
    for level in work.levels:
        kept += 0 if work.nesting == "slice" else level.dim
        kept += 2 * (work.head_layers - 1) * work.head_hidden_dim  # both ends of each GELU
        kept += 2 * bottleneck  # and normalised, or both ends of the last GELU
    prototypes = 0.0 if work.factored_scores else _normalised(work, bottleneck)
    return rows * kept * FLOAT + prototypes


def _normalised(work: Workload, bottleneck: int) -> float:
    """Bytes of the normalised prototypes of a head."""
    return work.all_prototypes * bottleneck * FLOAT if work.normalize else 0.0


def _scores(work: Workload, dino_rows: float, ibot_rows: float) -> float:
    """Bytes of the scores of all levels of both heads, or of the factors that have their rows."""
    if work.factored_scores:
        bottlenecks = dino_rows * work.dino_bottleneck + ibot_rows * work.ibot_bottleneck
        return len(work.levels) * bottlenecks * FLOAT
    return (dino_rows + ibot_rows) * work.all_prototypes * FLOAT


def _loss_work_space(work: Workload, rows: float, targets: float, device: Device) -> float:
    """Bytes of what a loss of the finest level works in: a chunk of factored scores, and tiles.

    On a CPU tiles of student, targets and their products; CUDA kernels work in registers.
    """
    finest, height = work.levels[-1].prototypes, math.ceil(rows + targets)
    where = torch.device(device)
    columns = next(chunks(finest, height, where)).stop if work.factored_scores else finest
    chunk = height * columns if work.factored_scores else 0
    tiles = 3 * min(block_elements(where), math.ceil(rows) * columns) if device == "cpu" else 0
    return (chunk + tiles) * FLOAT


def _prototypes_backward(work: Workload, bottleneck: int) -> float:
    """Bytes of work space of the backward of a head's finest prototypes w, c = w / |w|.

    From the gradient of c, dc: dc / |w|, and -dc · (w / |w| / |w|) with both its factors.
    """
    if not work.normalize:
        return 0.0
    # dc itself is counted: it takes the place of c, which its product has released, or, of factors,
    # it waits. Without norms it is the gradient of w.
    return 4 * work.levels[-1].prototypes * bottleneck * FLOAT


def _adamw_work_space(work: Workload, strategy: Strategy, device: Device) -> float:
    """Roots of the second moments: on a GPU of all at once; on a CPU of one after the other.

    There with a second tensor, the root over its bias correction.
    """
    if device == "cuda":
        return parameters(work).total * FLOAT / strategy.shards
    prototypes = work.levels[-1].prototypes * max(work.dino_bottleneck, work.ibot_bottleneck)
    mlp = (2 if work.mlp == "swiglu" else 1) * work.mlp_hidden * work.width
    return 2 * FLOAT * max(prototypes, mlp)


class _Copies(NamedTuple):
    """Bytes of parameters and gradients in other forms than their own, in each phase."""

    always: float
    teacher: float
    forward: float
    losses: float
    dino_head: float
    ibot_head: float
    block: float


def _copies(work: Workload, strategy: Strategy) -> _Copies:
    p, element = parameters(work), work.element
    if strategy.kind != "fsdp":
        # DistributedDataParallel sends gradients from buckets. Autocast keeps the student's weights
        # in half precision while the forward lasts; the graph, for each layer's backward; the
        # backward of a checkpointed block makes that block's again.
        buckets = p.total * FLOAT if strategy.kind == "ddp" else 0
        half = p.backbone * element if element < FLOAT else 0
        again = p.block * element if element < FLOAT else 0
        graph, last = (0, again) if work.activation_checkpointing else (half, half)
        return _Copies(buckets, 0, half, graph, graph, graph, last)
    # Of two blocks, the one that computes and the next, the parameters in the encoder's type; in
    # the backward gradients of one in that type, and in float32 of two, one of them on its way.
    blocks = 2 * p.block * element
    backward = blocks + p.block * element + 2 * p.block * FLOAT
    # Heads are float32, whole from their forward to their backward (the teacher's in its forward
    # alone). A head's gradients are whole until they are sent, from a copy.
    heads = p.heads * FLOAT
    dino, ibot = (heads + 2 * head * FLOAT for head in (p.dino_head, p.ibot_head))
    return _Copies(0, blocks + heads, blocks + heads, heads, dino, ibot, backward)


def phases(work: Workload, strategy: Strategy, device: Device = "cuda") -> list[Memory]:
    """Each phase of a step of the recipe's main process, in order, at its fullest moment."""
    s, p, copies = _sizes(work, strategy, device), parameters(work), _copies(work, strategy)
    count, again = work.accumulation, work.accumulation > 1
    each = FLOAT / strategy.shards  # bytes of a parameter

    # The teacher's scores of each micro-batch, with prototypes of their own where scores are
    # factored, and, of several, their concatenation, which takes their place.
    by_micro_batch = count * (s.teacher_scores + s.teacher_prototypes)
    held_scores = count * s.teacher_scores + s.teacher_prototypes
    concatenating = by_micro_batch + again * count * s.teacher_scores
    crops, heads, norm = count * s.crops, s.dino_head + s.ibot_head, s.student_tokens
    # The losses come first: gradients of all factors' prototypes wait for the heads' backward.
    waiting = work.all_prototypes * FLOAT if work.factored_scores else 0
    waiting_dino, waiting_ibot = waiting * work.dino_bottleneck, waiting * work.ibot_bottleneck
    scores = held_scores + s.student_scores

    def phase(
        name: str,
        *,
        activations: float,
        scores: float,
        gradients: float,
        copied: float = 0.0,
        moments: float = 0.0,
    ) -> Memory:
        return Memory(
            phase=name,
            parameters=p.total * each,
            teacher=p.total * each,
            optimizer=2 * p.total * each + moments,
            # micro-batches add to the gradients of the first in place
            gradients=(p.total if again else gradients) * each,
            copies=copies.always + copied,
            activations=activations,
            scores=scores,
        )

    return [
        phase(
            "teacher's last block",
            gradients=p.total,  # of the step before
            copied=copies.teacher,
            activations=crops + s.teacher_block,
            scores=by_micro_batch * (count - 1) / count,
        ),
        phase(
            "targets",
            gradients=p.total,
            activations=crops,
            scores=max(concatenating, held_scores + s.loss),
        ),
        phase(  # with the output of the final norm
            "end of the student's forward",
            gradients=0,
            copied=copies.forward,
            activations=crops + s.encoder_forward + 2 * norm + heads,
            scores=scores,
        ),
        phase(
            "losses",
            gradients=0,
            copied=copies.losses,
            activations=crops + s.encoder_forward + norm + heads,
            scores=scores + waiting_dino + waiting_ibot + s.loss,
        ),
        phase(
            "backward of the iBOT head",
            gradients=0,
            copied=copies.ibot_head,
            activations=crops
            + s.encoder_forward
            + norm
            + heads
            + _prototypes_backward(work, work.ibot_bottleneck),
            scores=scores + waiting_dino + waiting_ibot,
        ),
        phase(
            "backward of the DINO head",
            gradients=p.ibot_head,
            copied=copies.dino_head,
            activations=crops
            + s.encoder_forward
            + norm
            + s.dino_head
            + _prototypes_backward(work, work.dino_bottleneck),
            scores=scores + waiting_dino,
        ),
        phase(
            "backward of the last block",
            gradients=p.heads + work.mlp_hidden * work.width,  # and of the block's last layer
            copied=copies.block,
            activations=crops + s.encoder_backward,
            scores=scores,
        ),
        phase(
            "optimizer",
            gradients=p.total,
            activations=crops,
            scores=held_scores,
            moments=_adamw_work_space(work, strategy, device),
        ),
    ]

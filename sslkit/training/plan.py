"""What a step of the Franca recipe will need on GPUs that are not here: memory, work, traffic, time.

    python -m sslkit.training.plan --preset vitg14_laion --gpus 128

Bytes and FLOPs are derived from the shapes; the figures of the hardware are given (data sheets, or
options of the command) and not measured, and images a second follow from them by `duration`.

Not counted: CUDA contexts, buffers of NCCL and of cuDNN, fragmentation (`--reserve` is their
allowance), and what is tiny beside the rest: masks, statistics of losses, drop path.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple

import torch

from sslkit.assignments import block_elements
from sslkit.factored_logits import chunks
from sslkit.ops.attention import HEAD_SIZES_TRITON, MAX_TOKENS_TRITON

NUM_GLOBAL = 2  # global crops of an image; the teacher sees these alone
FLOAT = 4  # bytes of a float32
GIB = 1 << 30

Device = Literal["cuda", "cpu"]

# ------------------------------------------------------------------------------------ workload


class Level(NamedTuple):
    """A level of a nested head."""

    dim: int
    """Features that it sees."""
    prototypes: int


@dataclass(frozen=True)
class Workload:
    """The shapes of one training step: a ViT with LayerScale and a qkv bias, two nested heads."""

    width: int
    depth: int
    heads: int
    mlp_hidden: int
    """Of one of the two halves, where the MLP is gated."""
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    patch_size: int = 14
    in_chans: int = 3
    registers: int = 0
    """With any, the class token has no position embedding (as in timm's ``reg4`` networks)."""
    global_size: int = 224
    """Pixels a side, also of the grid of the position embedding."""
    local_size: int = 98
    num_local: int = 8
    batch_size: int = 2048
    """Images an optimizer step, over all GPUs and micro-batches."""
    accumulation: int = 1
    num_prototypes: int = 131072
    nesting_dims: tuple[int, ...] = ()
    """Empty: D/16, D/8, D/4, D/2, D."""
    nesting: Literal["slice", "slice_linear", "linear"] = "slice"
    head_hidden_dim: int = 2048
    head_layers: int = 3
    dino_bottleneck: int = 384
    ibot_bottleneck: int = 256
    normalize: bool = True
    mask_ratio: tuple[float, float] = (0.1, 0.65)
    mask_probability: float = 0.5
    sinkhorn_iterations: int = 3
    factored_scores: bool = False
    activation_checkpointing: bool = False
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the encoder, by autocast; heads, scores and losses are float32."""

    @property
    def element(self) -> int:
        """Bytes of an activation inside a branch of a block; the residual stream is float32."""
        return 2 if self.precision == "bfloat16" else FLOAT

    @property
    def levels(self) -> list[Level]:
        """Coarse to fine."""
        dims = self.nesting_dims or tuple(self.width // share for share in (16, 8, 4, 2, 1))
        return [Level(m, self.num_prototypes * m // dims[-1]) for m in dims]

    @property
    def all_prototypes(self) -> int:
        """Of all levels of one head."""
        return sum(level.prototypes for level in self.levels)

    @property
    def prefix(self) -> int:
        """Class token and registers."""
        return 1 + self.registers

    def patches(self, size: int) -> int:
        """Of a crop of so many pixels a side."""
        return (size // self.patch_size) ** 2

    @property
    def crops(self) -> list[tuple[int, int]]:
        """``(crops an image, tokens a crop)``, global ones first."""
        sizes = [(NUM_GLOBAL, self.global_size), (self.num_local, self.local_size)]
        return [(count, self.prefix + self.patches(size)) for count, size in sizes if count]

    @property
    def masked(self) -> float:
        """Masked patches an image, on average."""
        ratio = sum(self.mask_ratio) / 2
        return NUM_GLOBAL * self.mask_probability * ratio * self.patches(self.global_size)


class Parameters(NamedTuple):
    """Numbers of parameters of the student; the teacher has as many."""

    embedding: int
    """Patches, positions, tokens and the final norm."""
    block: int
    blocks: int
    dino_head: int
    ibot_head: int

    @property
    def backbone(self) -> int:
        """Embedding and all blocks."""
        return self.embedding + self.blocks

    @property
    def heads(self) -> int:
        """Both."""
        return self.dino_head + self.ibot_head

    @property
    def total(self) -> int:
        """Of the student."""
        return self.backbone + self.heads


def parameters(work: Workload) -> Parameters:
    """Count them; equal to the networks' own."""
    D, F = work.width, work.mlp_hidden
    positions = work.patches(work.global_size) + (0 if work.registers else 1)
    embedding = (work.in_chans * work.patch_size**2 + 1) * D  # the convolution
    embedding += (positions + work.prefix + 1) * D + 2 * D  # one more token: the mask's
    mlp = (D + 1) * 2 * F + (F + 1) * D if work.mlp == "swiglu" else (D + 1) * F + (F + 1) * D
    block = (D + 1) * 3 * D + (D + 1) * D + mlp + 6 * D  # two norms and two LayerScales
    return Parameters(
        embedding=embedding,
        block=block,
        blocks=work.depth * block,
        dino_head=_head_parameters(work, work.dino_bottleneck),
        ibot_head=_head_parameters(work, work.ibot_bottleneck),
    )


def _head_parameters(work: Workload, bottleneck: int) -> int:
    return sum(
        sum((a + 1) * b for a, b in _head_layers(work, level, bottleneck))
        + level.prototypes * bottleneck
        for level in work.levels
    )


def _head_layers(work: Workload, level: Level, bottleneck: int) -> list[tuple[int, int]]:
    """``(in, out)`` of each linear layer of a level, up to the bottleneck."""
    nest = {"slice": 0, "slice_linear": level.dim, "linear": work.width}[work.nesting]
    widths = [level.dim, *[work.head_hidden_dim] * (work.head_layers - 1), bottleneck]
    layers = list(zip(widths[:-1], widths[1:], strict=True))
    return [(nest, level.dim), *layers] if nest else layers


# ------------------------------------------------------------------------------------ hardware


@dataclass(frozen=True)
class Hardware:
    """Figures of one GPU: of data sheets unless other ones are given, none of them measured."""

    memory: float
    """Bytes."""
    flops: float
    """Dense bfloat16 products a second, at best."""
    bandwidth: float
    """Bytes a second between its memory and its cores."""
    intra_bandwidth: float
    """Bytes a second that one GPU sends to others of its node (NVLink, one direction)."""
    inter_bandwidth: float
    """Bytes a second that one GPU sends to other nodes (one network card each)."""
    gpus_per_node: int = 8
    utilisation: float = 0.4
    """Share of `flops` that a whole training step reaches: an assumption."""
    reserve: float = 4 * GIB
    """Bytes for all that is not counted: an allowance."""


HARDWARE = {
    "a100": Hardware(80 * GIB, 312e12, 2.0e12, 300e9, 25e9),
    "h100": Hardware(80 * GIB, 989e12, 3.35e12, 450e9, 50e9),
    "h200": Hardware(140 * GIB, 989e12, 4.8e12, 450e9, 50e9),
}


@dataclass(frozen=True)
class Strategy:
    """How the processes share the work; one GPU each."""

    kind: Literal["none", "ddp", "fsdp"]
    gpus: int = 1
    replicas: int = 1
    """Groups that each hold the whole model in shards (HSDP); 1: all GPUs share one copy."""

    @property
    def shards(self) -> int:
        """GPUs among which a tensor of the state is cut."""
        return self.gpus // self.replicas if self.kind == "fsdp" else 1


def problems(work: Workload, strategy: Strategy, hardware: Hardware) -> list[str]:
    """What is impossible, by the names of the command's options."""
    found = []
    at_least_one = {
        "--gpus": strategy.gpus,
        "--hsdp-replicas": strategy.replicas,
        "--batch-size": work.batch_size,
        "--accumulation": work.accumulation,
        "--gpus-per-node": hardware.gpus_per_node,
    }
    found += [f"{name} must be at least 1, got {n}" for name, n in at_least_one.items() if n < 1]
    positive = ("memory", "flops", "bandwidth", "intra_bandwidth", "inter_bandwidth", "utilisation")
    for name in positive:
        if not getattr(hardware, name) > 0:
            found.append(f"--{name.replace('_', '-')} must be above 0")
    if hardware.utilisation > 1:
        found.append(f"--utilisation is a share of --flops, at most 1, got {hardware.utilisation}")
    if not 0 <= hardware.reserve < hardware.memory:
        found.append("--reserve must be at least 0 and below --memory")
    if found:
        return found
    if strategy.kind == "none" and strategy.gpus > 1:
        found.append(f"--parallel none is for one GPU, not for --gpus {strategy.gpus}")
    if strategy.replicas > 1 and strategy.kind != "fsdp":
        found.append("--hsdp-replicas needs --parallel fsdp")
    if strategy.gpus % strategy.replicas:
        found.append(f"--hsdp-replicas {strategy.replicas} does not divide --gpus {strategy.gpus}")
    if work.batch_size % (strategy.gpus * work.accumulation):
        found.append(
            f"--batch-size {work.batch_size} does not divide into --gpus {strategy.gpus} times "
            f"--accumulation {work.accumulation} equal micro-batches"
        )
    return found


# -------------------------------------------------------------------------------------- memory


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


def between_steps(work: Workload, strategy: Strategy, device: Device = "cuda") -> float:
    """Bytes on one GPU when a step begins: state, gradients and results of the one before."""
    s, p = _sizes(work, strategy, device), parameters(work)
    results = work.accumulation * s.teacher_scores + s.teacher_prototypes + s.student_tokens
    return 5 * FLOAT * p.total / strategy.shards + results + _copies(work, strategy).always


def peak(work: Workload, strategy: Strategy, device: Device = "cuda") -> Memory:
    """The fullest phase of a step."""
    return max(phases(work, strategy, device), key=lambda memory: memory.total)


class _Sizes(NamedTuple):
    """Bytes of what a micro-batch leaves on one GPU, and of the work space that it needs."""

    crops: float
    teacher_block: float
    """Work space of the teacher's last MLP."""
    teacher_tokens: float
    """Normalised tokens; the class tokens are a view of them."""
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
        teacher_tokens=T_teacher * D * FLOAT,
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
    # the backward gradients of one in that type, and of two, one of which is on its way, in float32.
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

    # What a step returns lives until the next one returns: the scores that Sinkhorn took, and all
    # tokens of the student. Within a step the teacher's scores of each micro-batch, and their
    # concatenation; factors of each micro-batch have prototypes of their own.
    past_scores, past_tokens = count * s.teacher_scores + s.teacher_prototypes, s.student_tokens
    by_micro_batch = count * (s.teacher_scores + s.teacher_prototypes)
    held_scores = past_scores + by_micro_batch + count * s.teacher_scores
    held_tokens = past_tokens + count * (s.crops + s.teacher_tokens)
    heads = s.dino_head + s.ibot_head
    norm = 2 * s.student_tokens  # input and output of the final norm
    # The losses come first: gradients of all factors' prototypes wait for the heads' backward.
    waiting = work.all_prototypes * FLOAT if work.factored_scores else 0
    waiting_dino, waiting_ibot = waiting * work.dino_bottleneck, waiting * work.ibot_bottleneck
    scores = held_scores + s.student_scores
    if device == "cuda":  # one root of the second moments for all parameters of a call
        work_space = p.total * each
    else:  # one parameter after the other: its root, and that over the bias correction
        bottleneck = max(work.dino_bottleneck, work.ibot_bottleneck)
        finest = work.levels[-1].prototypes * bottleneck
        work_space = (
            2 * FLOAT * max(finest, (1 + (work.mlp == "swiglu")) * work.mlp_hidden * work.width)
        )

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
            activations=held_tokens - s.teacher_tokens + s.teacher_block,
            scores=past_scores + by_micro_batch * (count - 1) / count,
        ),
        phase(
            "targets",
            gradients=p.total,
            activations=held_tokens,
            scores=held_scores + s.loss,
        ),
        phase(  # the scores and tokens of the micro-batch before go when this one's are there
            "end of the student's forward",
            gradients=0,
            copied=copies.forward,
            activations=held_tokens + s.encoder_forward + norm + heads + again * s.student_tokens,
            scores=scores + again * s.student_scores,
        ),
        phase(
            "losses",
            gradients=0,
            copied=copies.losses,
            activations=held_tokens + s.encoder_forward + norm + heads,
            scores=scores + waiting_dino + waiting_ibot + s.loss,
        ),
        phase(
            "backward of the iBOT head",
            gradients=0,
            copied=copies.ibot_head,
            activations=held_tokens
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
            activations=held_tokens
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
            activations=held_tokens + s.student_tokens + s.encoder_backward,
            scores=scores,
        ),
        phase(
            "optimizer",
            gradients=p.total,
            activations=held_tokens + s.student_tokens,
            scores=scores,
            moments=work_space,
        ),
    ]


# ------------------------------------------------------------------- products, traffic and time


@dataclass(frozen=True)
class Flops:
    """Matrix products and attention of one step on all GPUs; a multiply-add is two.

    All else counts as 0: norms, activations, exponentials, losses, Sinkhorn, AdamW, augmentation.
    """

    student: float
    """Forward and backward."""
    recomputation: float
    """The blocks' forward again, with activation checkpointing."""
    teacher: float
    heads: float
    """MLPs of both heads, student and teacher."""
    prototypes: float
    """Scores of student and teacher, and the gradients of their factors."""

    @property
    def total(self) -> float:
        """A step's."""
        return sum(getattr(self, f.name) for f in fields(self))


def flops(work: Workload) -> Flops:
    """What a step has to multiply.

    A layer's backward has two products of the size of its one, the patch embedding's one: pixels
    need no gradient. Attention's has five for two, as flash attention computes its weights again.
    Factored scores are formed once more by the student's backward; the teacher's in each of T
    passes of Sinkhorn, and in the forward and the backward of the losses (T + 2 products for 1).
    """
    D, F = work.width, work.mlp_hidden
    of_token = 2 * (4 * D * D + (3 if work.mlp == "swiglu" else 2) * D * F)
    linear = [work.depth * count * n * of_token for count, n in work.crops]
    attention = [work.depth * count * 4 * n * n * D for count, n in work.crops]
    of_patch = 2 * work.in_chans * work.patch_size**2 * D
    embedding = [count * (n - work.prefix) * of_patch for count, n in work.crops]

    teacher_rows = NUM_GLOBAL, work.masked  # of an image, for the DINO and the iBOT head
    student_rows = NUM_GLOBAL + work.num_local, work.masked
    student_products = 4 if work.factored_scores else 3
    teacher_products = work.sinkhorn_iterations + 2 if work.factored_scores else 1
    heads = prototypes = 0.0
    bottlenecks = work.dino_bottleneck, work.ibot_bottleneck
    for b, student, teacher in zip(bottlenecks, student_rows, teacher_rows, strict=True):
        of_row = sum(2 * i * o for level in work.levels for i, o in _head_layers(work, level, b))
        heads += (3 * student + teacher) * of_row
        scores = 2 * b * work.all_prototypes
        prototypes += (student_products * student + teacher_products * teacher) * scores
    blocks = sum(linear) + sum(attention)
    return Flops(
        student=work.batch_size * (3 * sum(linear) + 3.5 * sum(attention) + 2 * sum(embedding)),
        recomputation=work.batch_size * blocks * work.activation_checkpointing,
        teacher=work.batch_size * (linear[0] + attention[0] + embedding[0]),
        heads=work.batch_size * heads,
        prototypes=work.batch_size * prototypes,
    )


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU sends in a step; rings, so that it receives as many."""

    gathers: float
    """Parameters of student (forward, backward) and teacher (FSDP)."""
    gradients: float
    """All-reduced (DDP), or reduce-scattered in float32 (FSDP)."""
    replicas: float
    """Shards of gradients, all-reduced over the replicas (HSDP)."""
    sinkhorn: float
    """Sums over the rows of all prototypes of both heads, packed, once an iteration."""
    koleo: float
    """Class tokens of all GPUs, and their gradients."""

    @property
    def total(self) -> float:
        """A step's."""
        return sum(getattr(self, f.name) for f in fields(self))


def traffic(work: Workload, strategy: Strategy) -> Traffic:
    """What a step has to send: an all-reduce of n bytes over w processes sends 2 (w - 1) / w n.

    With FSDP each micro-batch gathers and reduces; with DDP only the last one reduces.
    """
    p, w, count = parameters(work), strategy.gpus, work.accumulation
    gathers = gradients = replicas = 0.0
    if strategy.kind == "fsdp":
        sent = (strategy.shards - 1) / strategy.shards
        passes = 3 * p.backbone * work.element + 2 * p.heads * FLOAT  # heads stay for the backward
        gathers = count * sent * passes
        gradients = count * sent * p.total * FLOAT
        R = strategy.replicas
        replicas = count * 2 * (R - 1) / R * p.total / strategy.shards * FLOAT
    elif strategy.kind == "ddp":
        gradients = 2 * (w - 1) / w * p.total * FLOAT
    # Cosines have a known bound; without it the maxima of all columns cross first.
    reductions = work.sinkhorn_iterations + (0 if work.normalize else 1)
    sums = 2 * work.all_prototypes * FLOAT  # both heads
    # Of each view, rows of all processes [w b, D] are gathered, and their gradients all-reduced.
    rows = NUM_GLOBAL * work.batch_size / w * work.width * FLOAT
    return Traffic(
        gathers=gathers,
        gradients=gradients,
        replicas=replicas,
        sinkhorn=reductions * 2 * (w - 1) / w * sums,
        koleo=3 * (w - 1) * rows,
    )


@dataclass(frozen=True)
class Duration:
    """Seconds of one step, by its parts."""

    compute: float
    """Products at `utilisation` times the peak."""
    memory: float
    """Passes over scores and state, which wait for memory alone."""
    overlapped: float
    """Traffic of parameters and gradients, while products are computed."""
    exposed: float
    """Traffic of Sinkhorn and KoLeo, which everything waits for."""

    @property
    def total(self) -> float:
        """The longer of products and the traffic that they hide, and then the rest."""
        return max(self.compute, self.overlapped) + self.memory + self.exposed


def duration(work: Workload, strategy: Strategy, hardware: Hardware) -> Duration:
    """Expected seconds of a step, from given figures."""
    sent = traffic(work, strategy)
    everywhere = _ring_bandwidth(strategy.gpus, hardware)
    spread = strategy.gpus > hardware.gpus_per_node
    replicas = hardware.inter_bandwidth if spread else hardware.intra_bandwidth
    in_shards = (
        everywhere if strategy.kind != "fsdp" else _ring_bandwidth(strategy.shards, hardware)
    )
    return Duration(
        compute=flops(work).total / strategy.gpus / (hardware.flops * hardware.utilisation),
        memory=bytes_moved(work, strategy) / hardware.bandwidth,
        overlapped=(sent.gathers + sent.gradients) / in_shards + sent.replicas / replicas,
        exposed=(sent.sinkhorn + sent.koleo) / everywhere,
    )


def _ring_bandwidth(gpus: int, hardware: Hardware) -> float:
    """Of a ring inside a node its links'. Rings over nodes leave each once, by one card each."""
    if gpus <= hardware.gpus_per_node:
        return hardware.intra_bandwidth
    return min(hardware.intra_bandwidth, hardware.gpus_per_node * hardware.inter_bandwidth)


def bytes_moved(work: Workload, strategy: Strategy) -> float:
    """Bytes that one GPU reads and writes in passes over scores, and over parameters at the end.

    Of T iterations, Sinkhorn reads the teacher's scores in 1 + 2 (T - 1) passes, the losses' forward
    and backward once each. The student's are read by both and written over by the latter. Written
    scores of the teacher are also concatenated (a copy).
    AdamW reads parameter, gradient and moments, and writes all but the gradient; the average reads
    student and teacher and writes the teacher.
    """
    images = work.batch_size / strategy.gpus
    score = images * work.all_prototypes * FLOAT  # of one row an image, at all levels
    of_teacher = 2 * work.sinkhorn_iterations - 1 + 2 + (0 if work.factored_scores else 2)
    scores = of_teacher * (NUM_GLOBAL + work.masked) * score
    scores += 3 * (NUM_GLOBAL + work.num_local + work.masked) * score
    return scores + (4 + 3 + 3) * FLOAT * parameters(work).total / strategy.shards


# ------------------------------------------------------------------------------------- command

# The recipe's presets on GPUs.
PRESETS = {
    "vitb14_in21k": Workload(width=768, depth=12, heads=12, mlp_hidden=2048),
    "vitl14_in21k": Workload(width=1024, depth=24, heads=16, mlp_hidden=2736, batch_size=3072),
    "vitg14_laion": Workload(
        width=1536,
        depth=40,
        heads=24,
        mlp_hidden=4096,
        batch_size=3072,
        activation_checkpointing=True,
    ),
}
HIGH_RESOLUTION = 518  # pixels of the global crops in the recipe's second stage
_SHARDED_FROM = 500_000_000  # parameters of the encoder above which FSDP is the default


def report(work: Workload, strategy: Strategy, hardware: Hardware) -> str:
    """The plan as text: memory, work, traffic, time, and what they assume."""
    p, fullest = parameters(work), peak(work, strategy)
    products, sent = flops(work), traffic(work, strategy)
    seconds = duration(work, strategy, hardware)
    shards = f" in {strategy.replicas} replicas" if strategy.replicas > 1 else ""
    micro = work.batch_size // strategy.gpus // work.accumulation
    limit = hardware.memory - hardware.reserve
    lines = [
        f"{p.total / 1e6:,.1f} M parameters: encoder {p.backbone / 1e6:,.1f} M, DINO head "
        f"{p.dino_head / 1e6:,.1f} M, iBOT head {p.ibot_head / 1e6:,.1f} M",
        f"{strategy.gpus} GPUs, {strategy.kind}{shards}; {work.batch_size} images a step: "
        f"{work.accumulation} x {micro} on each",
        "",
        f"Memory on the main GPU, GiB (fullest: {fullest.phase})",
        *(_row(name, size / GIB) for name, size in fullest.parts.items()),
        _row("total", fullest.total / GIB),
        _row("of", limit / GIB, f"{hardware.memory / GIB:.0f} less a reserve for what is not here"),
        "  by phase: "
        + ", ".join(f"{m.phase} {m.total / GIB:.2f}" for m in phases(work, strategy)),
        "",
        "Products and attention, TFLOP a step (all GPUs)",
        *(_row(f.name, getattr(products, f.name) / 1e12) for f in fields(products)),
        _row("total", products.total / 1e12, f"{products.total / 1e12 / strategy.gpus:,.1f} a GPU"),
        "",
        "Sent by each GPU, MB a step",
        *(_row(f.name, getattr(sent, f.name) / 1e6) for f in fields(sent)),
        _row("total", sent.total / 1e6),
        "",
        "Time of a step, ms: max(compute, overlapped) + memory + exposed",
        *(_row(f.name, getattr(seconds, f.name) * 1e3) for f in fields(seconds)),
        _row("total", seconds.total * 1e3),
        _row("images/s", work.batch_size / seconds.total, "expected, all GPUs"),
        "",
        "Assumed, not measured:",
        f"  {hardware.flops / 1e12:,.0f} TFLOP/s bfloat16 x {hardware.utilisation:.0%} utilisation, "
        f"float32 heads too (TF32 or float32 products are slower)",
        f"  {hardware.bandwidth / 1e12:.2f} TB/s memory; {hardware.intra_bandwidth / 1e9:,.0f} GB/s "
        f"to a node's GPUs, {hardware.inter_bandwidth / 1e9:,.0f} GB/s to other nodes, "
        f"{hardware.gpus_per_node} GPUs a node",
        "  traffic of parameters and gradients hides behind products; latency, stragglers and the "
        "loader cost nothing",
        "  kernels of sslkit.ops run; the main GPU also keeps the results of the previous step",
    ]
    if fullest.total > limit:
        lines += ["", f"does not fit: {fullest.total / GIB:.1f} GiB of {limit / GIB:.1f} GiB; "]
        lines[-1] += _what_would_help(work, strategy, limit)
    return "\n".join(lines)


def _row(name: str, value: float, remark: str = "") -> str:
    return f"  {name:<14}{value:>14,.2f}  {remark}".rstrip()


def _what_would_help(work: Workload, strategy: Strategy, limit: float) -> str:
    """Changes, each by itself, and the need that they leave."""
    options: dict[str, tuple[Workload, Strategy]] = {}
    if strategy.kind != "fsdp" and strategy.gpus > 1:
        options["--parallel fsdp"] = work, replace(strategy, kind="fsdp")
    if not work.activation_checkpointing:
        options["--activation-checkpointing"] = (
            replace(work, activation_checkpointing=True),
            strategy,
        )
    if not work.factored_scores:
        options["--factored-scores"] = replace(work, factored_scores=True), strategy
    each = work.batch_size // strategy.gpus
    for count in (n for n in range(work.accumulation + 1, each + 1) if each % n == 0):
        changed = replace(work, accumulation=count), strategy
        options[f"--accumulation {count}"] = changed
        if peak(*changed).total <= limit:
            break
    if strategy.kind != "none" and each % (2 * work.accumulation) == 0:
        options[f"--gpus {2 * strategy.gpus}"] = work, replace(strategy, gpus=2 * strategy.gpus)
    needs = {name: peak(*changed).total for name, changed in options.items()}
    fewer = {name: need for name, need in needs.items() if need < peak(work, strategy).total}
    return "each of these by itself would need: " + (
        ", ".join(f"{name} {need / GIB:.1f} GiB" for name, need in fewer.items()) or "(none helps)"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sslkit.training.plan", description="Memory, work and time of a step."
    )
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), default="vitg14_laion", help="of the recipe")
    add("--highres", action="store_true", help=f"the stage at {HIGH_RESOLUTION} pixels")
    add("--gpus", type=int, default=8)
    add(
        "--parallel",
        choices=("none", "ddp", "fsdp"),
        help="default: none on one GPU, fsdp for a ViT-g, else ddp",
    )
    add("--hsdp-replicas", type=int, default=1, help="groups of GPUs that hold a whole copy")
    add("--batch-size", type=int, help="images a step, over all GPUs; default: the preset's")
    add("--accumulation", type=int, help="micro-batches a step")
    flag = argparse.BooleanOptionalAction
    add("--activation-checkpointing", action=flag, default=None)
    add("--factored-scores", action=flag, default=None)
    add("--precision", choices=("bfloat16", "float32"), help="of the encoder")
    add("--gpu", choices=list(HARDWARE), default="h100", help="whose figures are taken")
    add("--memory", type=float, metavar="GIB")
    add("--reserve", type=float, metavar="GIB", help="for what is not counted")
    add("--flops", type=float, metavar="TFLOPS", help="dense bfloat16, at best")
    add("--utilisation", type=float, help="share of them that a step reaches")
    add("--bandwidth", type=float, metavar="GB/S", help="of a GPU's memory")
    add("--intra-bandwidth", type=float, metavar="GB/S", help="of a GPU to others of its node")
    add("--inter-bandwidth", type=float, metavar="GB/S", help="of a GPU to other nodes")
    add("--gpus-per-node", type=int)
    return parser


_UNITS = {"memory": GIB, "reserve": GIB, "flops": 1e12, "utilisation": 1, "gpus_per_node": 1} | {
    name: 1e9 for name in ("bandwidth", "intra_bandwidth", "inter_bandwidth")
}
_OVERRIDES = ("batch_size", "accumulation", "activation_checkpointing", "factored_scores")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a plan; exit with status 2 and the name of the option if one is impossible."""
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    work = PRESETS[given["preset"]]
    if given["highres"]:
        work = replace(work, global_size=HIGH_RESOLUTION)
    overrides = {k: given[k] for k in (*_OVERRIDES, "precision") if given[k] is not None}
    work = replace(work, **overrides)
    figures = {k: given[k] * unit for k, unit in _UNITS.items() if given[k] is not None}
    hardware = replace(HARDWARE[given["gpu"]], **figures)
    kind = given["parallel"]
    if kind is None:
        sharded = parameters(work).backbone > _SHARDED_FROM or given["hsdp_replicas"] > 1
        kind = "none" if given["gpus"] == 1 else "fsdp" if sharded else "ddp"
    strategy = Strategy(kind, given["gpus"], given["hsdp_replicas"])
    if found := problems(work, strategy, hardware):
        parser.error("; ".join(found))
    stage = f", {HIGH_RESOLUTION} px" if given["highres"] else ""
    print(f"{given['preset']}{stage} on {strategy.gpus} {given['gpu'].upper()}")
    print(report(work, strategy, hardware))


if __name__ == "__main__":
    main()

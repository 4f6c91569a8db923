"""What a step multiplies and sends, and how long given hardware should take over it."""

from dataclasses import dataclass, fields

from sslkit.training.plan.hardware import Hardware, Strategy
from sslkit.training.plan.workload import FLOAT, NUM_GLOBAL, Workload, head_layers, parameters


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
        of_row = sum(2 * i * o for level in work.levels for i, o in head_layers(work, level, b))
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
    """Products of the encoder at a share of the peak, and of the heads in float32."""
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
    products = flops(work)
    in_float32 = products.heads + products.prototypes
    half = hardware.flops * hardware.utilisation
    encoder_rate = half if work.precision == "bfloat16" else hardware.float32_flops
    compute = (products.total - in_float32) / encoder_rate + in_float32 / hardware.float32_flops
    return Duration(
        compute=compute / strategy.gpus,
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

    Of T iterations, Sinkhorn reads the teacher's scores in 1 + 2 (T - 1) passes, forward and
    backward of the losses once each. The student's are read by both and written over by the latter.
    Written scores of the teacher are also concatenated (a copy).

    AdamW reads parameter, gradient and moments, and writes all but the gradient; the average reads
    student and teacher and writes the teacher.
    """
    images = work.batch_size / strategy.gpus
    score = images * work.all_prototypes * FLOAT  # of one row an image, at all levels
    of_teacher = 2 * work.sinkhorn_iterations - 1 + 2 + (0 if work.factored_scores else 2)
    scores = of_teacher * (NUM_GLOBAL + work.masked) * score
    scores += 3 * (NUM_GLOBAL + work.num_local + work.masked) * score
    return scores + (4 + 3 + 3) * FLOAT * parameters(work).total / strategy.shards

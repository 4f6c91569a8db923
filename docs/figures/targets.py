"""What balancing and centering do to a teacher's assignments."""

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks import textbook
from docs.figures.page import phone_figure
from sslkit import Assignments, EMACentering, SinkhornKnopp, SinkhornQueue, Targets
from sslkit.evaluation.figures.style import (
    BASELINE,
    HEAT,
    INK,
    REFERENCE,
    TRAINED,
    show,
    styled,
    whole_numbers,
)


@styled
def sinkhorn_knopp(B: int = 48, K: int = 12, temperature: float = 0.1) -> Figure:
    """Assignments before and after; shares by iterations; where the textbook overflows."""
    figure = phone_figure(
        "Every prototype gets the same share of the batch",
        f"Top: assignments of {B} samples (rows) to {K} prototypes. Middle: the teacher's "
        "favourites lose what they had too much. Bottom: the textbook formula overflows as soon as "
        "a logit exceeds 3.55, at temperature 0.04.",
        height=8.2,
    )
    generator = torch.Generator().manual_seed(0)
    taste = 0.35 * torch.linspace(1, -1, K) ** 3
    logits = 0.25 * torch.randn(B, K, generator=generator) + taste
    logits = logits[logits.argmax(dim=1).argsort(stable=True)]
    before = torch.softmax(logits / temperature, dim=1)
    after = SinkhornKnopp(num_iterations=3)(logits, temperature).probs()

    panels = figure.subplot_mosaic(
        [["before", "after"], ["shares", "iterations"], ["overflow", "overflow"]],
        height_ratios=(1.7, 1, 1),
    )
    for name, title, probs in (
        ("before", "softmax alone", before),
        ("after", "Sinkhorn, 3 iterations", after),
    ):
        show(panels[name], probs.numpy(), cmap=HEAT, vmin=0, vmax=1, aspect="auto")
        panels[name].set(title=title, xlabel="prototype", ylabel="sample")
    scale = figure.colorbar(
        panels["before"].images[0],
        ax=[panels["before"], panels["after"]],
        location="bottom",
        aspect=40,
    )
    scale.set_label("probability")

    shares = panels["shares"]
    shares.plot(K * before.mean(dim=0), "s--", color=REFERENCE, ms=4, label="softmax")
    shares.plot(K * after.mean(dim=0), "o-", color=TRAINED, ms=4, label="Sinkhorn")
    shares.set(title="share, times K", xlabel="prototype", ylim=(0, None))
    shares.legend()

    counts = torch.arange(1, 21)
    worst = [
        (K * SinkhornKnopp(n)(logits, temperature).probs().mean(dim=0) - 1).abs().max().item()
        for n in counts.tolist()
    ]
    iterations = panels["iterations"]
    iterations.plot(counts, worst, "o-", color=TRAINED, ms=4)
    iterations.plot(3, worst[2], "o", color=REFERENCE, ms=8, fillstyle="none")
    iterations.annotate(
        "3, the usual", (3, worst[2]), xytext=(8, 4), textcoords="offset points", size=8.5
    )
    iterations.set(title="largest error of a share", xlabel="iterations", yscale="log")
    whole_numbers(iterations.xaxis)

    largest = torch.logspace(-1, 1.7, 25)
    unit = logits / logits.abs().max()
    errors: dict[str, list[float]] = {"textbook": [], "SinkhornKnopp": []}
    for size in largest.tolist():
        stretched = (size * unit).double()
        stretched[0, 0] = size  # the largest logit is positive
        exact = SinkhornKnopp()(stretched, 0.04).probs()
        for name, found in (
            ("textbook", textbook.sinkhorn(stretched.float(), 0.04)),
            ("SinkhornKnopp", SinkhornKnopp()(stretched.float(), 0.04).probs()),
        ):
            errors[name].append((found - exact).abs().max().item())
    overflow = panels["overflow"]
    overflow.axvspan(88.72 * 0.04, 50, color=REFERENCE, alpha=0.12, lw=0)
    overflow.text(50, 1e-1, "textbook: NaN ", ha="right", va="top", color=INK, size=8.5)
    overflow.plot(largest, errors["textbook"], "s--", color=REFERENCE, ms=4, label="textbook")
    overflow.plot(largest, errors["SinkhornKnopp"], "o-", color=TRAINED, ms=4, label="sslkit")
    overflow.set(
        title="error in float32, temperature 0.04",
        xlabel="largest logit",
        ylabel="of a probability",
        xscale="log",
        yscale="log",
        xlim=(0.1, 50),
        ylim=(1e-9, 1),
    )
    overflow.set_xticks([0.1, 1, 3.55, 10, 50], ["0.1", "1", "3.55", "10", "50"])
    overflow.legend(loc="upper left", ncols=2)
    return figure


@styled
def ema_centering(steps: int = 120, B: int = 256, K: int = 16, temperature: float = 0.1) -> Figure:
    """Prototypes in use while the teacher's taste changes; shares at the end."""
    figure = phone_figure(
        "Centering is late and not quite even",
        "The taste changes at the dotted lines. Top: how many prototypes the batch uses. Bottom: "
        "shares at the last step. Equal mean logits are not equal shares: Sinkhorn balances each "
        "batch, centering the past mean.",
        height=5.2,
    )
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(0.05, 0.3, K)  # logits of later prototypes vary more between samples
    changes = {0: 1.0, steps // 3: -1.0, 2 * steps // 3: 1.5}
    slow, fast = EMACentering(K, momentum=0.97), EMACentering(K, momentum=0.9)
    sinkhorn = SinkhornKnopp()
    kinds = {
        "softmax alone": (BASELINE, ":"),
        "centering, momentum 0.97": ("#009E73", "-."),
        "centering, momentum 0.9": (REFERENCE, "--"),
        "Sinkhorn": (TRAINED, "-"),
    }
    used: dict[str, list[float]] = {name: [] for name in kinds}
    taste = torch.zeros(K)
    for step in range(steps):
        if step in changes:
            taste = 0.4 * changes[step] * torch.linspace(1, -1, K)
        logits = spread * torch.randn(B, K, generator=generator) + taste
        targets = (
            Assignments(logits, torch.zeros(K), temperature),
            slow(logits, temperature),
            fast(logits, temperature),
            sinkhorn(logits, temperature),
        )
        for name, target in zip(kinds, targets, strict=True):
            used[name].append(target.usage().entropy.exp().item())
        slow.update(logits)
        fast.update(logits)

    top, bottom = figure.subplots(2, 1, height_ratios=(1.3, 1))
    for step in list(changes)[1:]:
        top.vlines(step, 0, K, color=INK, lw=0.8, ls=":")
    for (name, (colour, line)), target in zip(kinds.items(), targets, strict=True):
        top.plot(used[name], color=colour, ls=line, label=name)
        bottom.plot(K * target.probs().mean(dim=0), color=colour, ls=line)
    top.set(title="prototypes in use: exp of the entropy of the mean assignment", xlabel="step")
    top.set_ylim(0, 1.6 * K)
    top.set_yticks(range(0, K + 1, 4))
    top.legend(ncols=2, loc="upper center")
    bottom.set(title="share of the last batch, times K", xlabel="prototype", ylim=(0, None))
    return figure


def planted_logits(N: int, clusters: int, per_cluster: int) -> Tensor:
    """Cosines [N, K] of features around centres with the prototypes around the same centres."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(clusters, 64, generator=generator)
    labels = torch.randint(clusters, (N,), generator=generator)
    noise = torch.randn(N, 64, generator=generator)
    prototypes = centres.repeat_interleave(per_cluster, dim=0)
    prototypes = prototypes + 0.7 * torch.randn(prototypes.shape, generator=generator)
    features = F.normalize(centres[labels] + 0.7 * noise, dim=-1)
    return features @ F.normalize(prototypes, dim=-1).T


@styled
def sinkhorn_queue(
    N: int = 4096,
    clusters: int = 32,
    per_cluster: int = 8,
    batch_sizes: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024),
    num_counted: int = 1024,
) -> Figure:
    """Agreement with the balance of all rows, by batch size and length of the queue."""
    K, temperature = clusters * per_cluster, 0.07
    figure = phone_figure(
        "A small batch is balanced as if it were large",
        f"{N} samples in {clusters} planted clusters, {K} prototypes: how many samples get the "
        "prototype that they get when all are balanced at once.",
        height=3.7,
    )
    axes = figure.subplots()
    all_logits = planted_logits(N, clusters, per_cluster)
    sinkhorn = SinkhornKnopp()
    whole = sinkhorn(all_logits, temperature).argmax()
    for num_past, colour, line in (
        (4 * K, TRAINED, "o-"),
        (K, "#009E73", "^-."),
        (0, REFERENCE, "s--"),
    ):
        agreement = []
        for B in batch_sizes:
            queue = SinkhornQueue(max(num_past, 1), K)
            batches = list(zip(all_logits.split(B), whole.split(B), strict=True))
            warm = -(-num_past // B)  # batches that fill the queue, which are not counted
            same = []
            for i, (logits, expected) in enumerate(batches[: warm + max(1, num_counted // B)]):
                past = queue(logits) if num_past else None
                if i >= warm:
                    winners = sinkhorn(logits, temperature, past=past).argmax()
                    same.append((winners == expected).float().mean())
                queue.update(logits)
            agreement.append(100 * torch.stack(same).mean().item())
        name = f"queue of {num_past}" if num_past else "no queue"
        axes.plot(batch_sizes, agreement, line, color=colour, label=name)
    axes.axvline(K, color=BASELINE, ls=":")
    axes.text(K, 3, " as many rows\n as prototypes", color=INK, size=8.5)
    axes.set(xscale="log", xlabel="batch size", ylabel="same prototype, %", ylim=(0, 100))
    axes.set_xticks(batch_sizes, [str(B) for B in batch_sizes])
    axes.xaxis.set_ticks([], minor=True)
    axes.legend(loc="lower left", bbox_to_anchor=(0.02, 0.02))
    return figure


@styled
def targets(
    N: int = 1024,
    clusters: int = 32,
    per_cluster: int = 8,
    counts: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64),
) -> Figure:
    """Agreement with the balance of the whole batch, by the number of micro-batches."""
    K, temperature = clusters * per_cluster, 0.07
    figure = phone_figure(
        "Gradient accumulation does not change the targets",
        f"A batch of {N} samples and {K} prototypes, cut into micro-batches: how many samples get "
        "the prototype that they get in the whole batch.",
        height=3.7,
    )
    axes = figure.subplots()
    logits = planted_logits(N, clusters, per_cluster)
    sinkhorn, together = SinkhornKnopp(), Targets({"head": K})
    whole = sinkhorn(logits, temperature).argmax()
    same: dict[str, list[float]] = {"Targets": [], "each micro-batch by itself": []}
    for count in counts:
        parts = logits.chunk(count)
        for name, assigned in (
            (
                "Targets",
                [own["head"] for own in together([{"head": x} for x in parts], temperature)],
            ),
            ("each micro-batch by itself", [sinkhorn(x, temperature) for x in parts]),
        ):
            winners = torch.cat([own.argmax() for own in assigned])
            same[name].append(100 * (winners == whole).float().mean().item())
    axes.plot(counts, same["Targets"], "o-", color=TRAINED, label="Targets")
    name = "each micro-batch by itself"
    axes.plot(counts, same[name], "s--", color=REFERENCE, label=name)
    axes.set(xscale="log", xlabel="micro-batches", ylabel="same prototype, %", ylim=(0, 105))
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.xaxis.set_ticks([], minor=True)
    axes.legend(loc="lower left")
    return figure

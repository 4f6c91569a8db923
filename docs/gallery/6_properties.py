# %% [markdown]
# # Which property sees which fault
#
# A wrong loss trains. It trains a little worse, and nothing says so. This page breaks a DINO loss
# in six ways, and asks each property of `sslkit.testing` what it sees. How to test a loss of your
# own is on the page [Test your own loss](../testing.md).

# %%
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sslkit.evaluation.figures.style import INK, new_figure, styled
from sslkit.testing import DINO
from sslkit.testing.conformance import cases_of

# %% [markdown]
# The loss as it should be: a mean of cross-entropies over the pairs of different views. Student
# logits are [V_s, B, K], target probabilities [V_t, B, K].


# %%
def pairs_of(student: Tensor, probs: Tensor) -> list[Tensor]:
    log_p = torch.log_softmax(student.float() / 0.1, dim=-1)
    q = probs.detach()
    return [
        -(q[t] * log_p[s]).sum(dim=-1).mean()
        for s in range(len(student))
        for t in range(len(probs))
        if s != t
    ]


def right(student: Tensor, probs: Tensor) -> Tensor:
    return torch.stack(pairs_of(student, probs)).mean()


# %% [markdown]
# Six faults. Each is a line or two, gives a loss of a plausible size, and runs without an error.


# %%
def counts_the_diagonal(student, probs):
    return torch.stack(pairs_of(student, probs)).sum() / (len(student) * len(probs))


def leaves_out_local_views(student, probs):
    return right(student[:2], probs)


def detaches_a_view(student, probs):
    return right(torch.cat([student[:-1], student[-1:].detach()]), probs)


def adds_samples(student, probs):
    return right(student, probs) * student.shape[1]


def trains_the_teacher(student, probs):
    log_p = torch.log_softmax(student / 0.1, dim=-1)
    pairs = -torch.einsum("tbk,sbk->ts", probs, log_p) / student.shape[1]
    different = ~torch.eye(*pairs.shape, dtype=torch.bool)
    return pairs[different].mean()


calls = []


def remembers(student, probs):
    calls.append(1)
    return right(student, probs) * (1 + 0.1 * len(calls))


faults: list[Callable] = [
    right,
    counts_the_diagonal,
    leaves_out_local_views,
    detaches_a_view,
    adds_samples,
    trains_the_teacher,
    remembers,
]

# %% [markdown]
# One adapter holds each of them to everything that is promised of a DINO loss. `run` returns what
# was found; here a quarter of the usual number of inputs is enough.

# %%
findings = {
    fault.__name__.replace("_", " "): [case.run(effort=0.25) for case in cases_of(DINO(fault))]
    for fault in faults
}
for name, found in findings.items():
    print(f"{name:24} {sum(each.holds for each in found):2d} of {len(found)} properties hold")

# %% [markdown]
# A row is a loss, a column a property, a filled cell a property that does not hold:


# %%
@styled
def seen():
    figure = new_figure(
        "What each property sees",
        "The first row is the right loss. Every fault fills a cell, and no two rows are alike.",
        height=3.6,
    )
    axes = figure.subplots()
    fails = np.array([[not each.holds for each in found] for found in findings.values()])
    axes.imshow(fails, cmap="Blues", vmin=0, vmax=1.3, aspect="auto")
    names = [each.promise.name for each in findings["right"]]
    axes.set_xticks(range(len(names)), names, rotation=35, ha="left")
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(findings)), findings)
    axes.set_xticks(np.arange(-0.5, len(names)), minor=True)
    axes.set_yticks(np.arange(-0.5, len(findings)), minor=True)
    axes.grid(False)
    axes.grid(which="minor", color=INK, alpha=0.15)
    axes.tick_params(length=0, which="both")
    return figure


seen()

# %% [markdown]
# The comparison with the double loop sees many of them, and not all: a loss may have the right
# value and a wrong gradient, or be right once. What is reported is the smallest input that was
# found. For the local views that are left out:

# %%
print(next(each for each in findings["leaves out local views"] if not each.holds))

# %% [markdown]
# Three student views, one teacher view, one image, two prototypes. Two pairs are different views.
# One has flat logits and costs ln 2; the other costs ln(1 + exp(10)) - 5, and is the local view
# that was left out. Their mean is 2.8466.

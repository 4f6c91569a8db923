# %% [markdown]
# # Sinkhorn is a bias
#
# Balancing a batch over prototypes is usually written as a matrix that is normalised over rows
# and columns in turn. The result is a softmax of the logits with one number added for each
# prototype. This page shows that, and what the balance does to a teacher that prefers a few
# prototypes.

# %%
import torch

from sslkit import SinkhornKnopp
from sslkit.evaluation.figures.style import REFERENCE, TRAINED, new_figure, styled

generator = torch.Generator().manual_seed(0)
liked = torch.linspace(-0.25, 0.25, 24)  # the teacher's taste for the later prototypes
logits = 0.3 * torch.randn(512, 24, generator=generator) + liked
TEMPERATURE = 0.1

# %% [markdown]
# The textbook: divide columns, then rows, three times. sslkit: one bias.

# %%
Q = (logits.double() / TEMPERATURE).exp()
for _ in range(3):
    Q = Q / Q.sum(0)
    Q = Q / Q.sum(1, keepdim=True)
targets = SinkhornKnopp(num_iterations=3)(logits, TEMPERATURE)
by_hand = torch.softmax(logits / TEMPERATURE + targets.bias, dim=1)
print(f"largest difference to the matrix: {(by_hand - Q).abs().max():.1e}")
print(f"numbers kept: {targets.bias.numel()} in place of {Q.numel()}")

# %% [markdown]
# How much of the batch each prototype gets, before and after:


# %%
@styled
def shares():
    figure = new_figure(
        "Share of the batch by prototype",
        "Balanced targets give each of 24 prototypes one 24th; the bias takes the taste back.",
        height=4.6,
        width=5,
    )
    top, bottom = figure.subplots(2, 1)
    plain = torch.softmax(logits / TEMPERATURE, 1).mean(0)
    top.plot(24 * plain, color=REFERENCE, ls="--", marker="s", label="softmax")
    top.plot(24 * targets.probs().mean(0), color=TRAINED, marker="o", label="Sinkhorn")
    top.set(title="share of the batch, times K", xlabel="prototype", ylim=(0, None))
    top.legend()
    bottom.plot(targets.bias - targets.bias.mean(), color=TRAINED, marker="o", label="bias")
    bottom.plot(-liked / TEMPERATURE, color=REFERENCE, ls="--", label="minus the taste")
    bottom.set(title="bias, in units of the exponent", xlabel="prototype")
    bottom.legend()
    return figure


shares()

# %% [markdown]
# A pitfall: a softmax does not change when a number is added to a row, so subtracting each row's
# largest logit looks like a harmless guard against overflow. With few iterations it is not: rows
# enter the first column sum with other weights.

# %%
shifted = logits - logits.amax(1, keepdim=True)
for iterations in (1, 3, 10, 100):
    sinkhorn = SinkhornKnopp(num_iterations=iterations)
    a, b = (sinkhorn(x, TEMPERATURE).probs() for x in (logits, shifted))
    print(f"{iterations:3d} iterations: targets move by up to {(a - b).abs().max():.1e}")

# %% [markdown]
# sslkit shifts by prototype or not at all, both exact.

# %% [markdown]
# # Masks and what they show of the image
#
# Four ways to mask sixty per cent of the patches, and how often each patch is masked over many
# draws. The paper's point (section 3.2): a network that sees some places less often than others
# learns them less well.

# %%
import torch

from sslkit import CyclicMaskGenerator
from sslkit.evaluation.figures.style import new_figure, show, styled

GRID = (12, 16)
KINDS = {
    "random": CyclicMaskGenerator(GRID, kind="random", shift=False),
    "block": CyclicMaskGenerator(GRID, kind="block", shift=False),
    "inverse block": CyclicMaskGenerator(GRID, shift=False),
    "CyclicMask": CyclicMaskGenerator(GRID),
}
NUM_MASKED = 115
draw = torch.Generator().manual_seed(0)

# %% [markdown]
# Three masks of each kind, each with exactly that many True. An inverse block leaves one piece of
# the picture whole; the shift lets it go over the border and come back on the other side.


# %%
@styled
def examples():
    figure = new_figure(
        "Masks of 115 of 192 patches", "Masked patches are dark.", height=3.0, width=5
    )
    for column, (name, masks) in enumerate(KINDS.items()):
        for row in range(3):
            axes = figure.add_subplot(3, 4, 4 * row + column + 1)
            hidden = masks.one(NUM_MASKED, generator=draw).float().numpy()
            show(axes, 0.85 - 0.65 * hidden, cmap="gray", vmin=0, vmax=1)
            if row == 0:
                axes.set_title(name)
    return figure


examples()

# %% [markdown]
# Exposure: the share of 1,500 draws in which a patch was masked. Random masks and CyclicMask are
# even. A block covers the middle more often than the corners; an inverse block is its negative,
# and the corners are hardly ever seen.


# %%
@styled
def exposures():
    figure = new_figure(
        "How often each patch is masked",
        "One flat colour is what is wanted.",
        height=3.6,
        width=5,
    )
    panels = figure.subplots(2, 2).ravel()
    for axes, (name, masks) in zip(panels, KINDS.items(), strict=True):
        share = sum(masks.one(NUM_MASKED, generator=draw).float() for _ in range(1500)) / 1500
        print(f"{name:14} rarest {share.min():.2f}  most frequent {share.max():.2f}")
        show(axes, share.numpy(), cmap="viridis", vmin=0, vmax=1)
        axes.set_title(name)
    figure.colorbar(panels[0].images[0], ax=panels, label="share of draws")
    return figure


exposures()

# %% [markdown]
# In a training loop the generator is called for a batch. Half of the images are masked, their
# ratios spread evenly from a tenth to .65, which ones is random:

# %%
masks = CyclicMaskGenerator(GRID)(8, generator=draw)
print(masks.flatten(1).sum(1).tolist(), "of", masks[0].numel(), "patches")

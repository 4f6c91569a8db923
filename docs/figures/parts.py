"""Figures of docs/parts: ``python docs/figures/parts.py`` draws them again."""

from pathlib import Path

import torch
from matplotlib.figure import Figure

from sslkit import CyclicMaskGenerator
from sslkit.evaluation.figures.style import HEAT, new_figure, show, styled

KINDS = {
    "random": {"kind": "random", "shift": False},
    "block": {"kind": "block", "shift": False},
    "inverse block": {"kind": "inverse_block", "shift": False},
    "inverse block + shift (CyclicMask)": {"kind": "inverse_block", "shift": True},
}


@styled
def masks(grid: int = 14, draws: int = 4000, num_masked: int = 127) -> Figure:
    """A row of masks and the map of exposures for each kind."""
    figure = new_figure(
        "Masks of 65 % of the patches",
        "Left: four masks of each kind, masked patches dark. Right: how often a patch is masked. "
        "Blocks treat centre and border alike only with the shift.",
        height=5.6,
    )
    panels = figure.subplots(len(KINDS), 5)
    for (name, settings), row in zip(KINDS.items(), panels, strict=True):
        generator = torch.Generator().manual_seed(0)
        masking = CyclicMaskGenerator(grid, **settings)
        drawn = torch.stack([masking.one(num_masked, generator=generator) for _ in range(draws)])
        for axes, mask in zip(row[:4], drawn, strict=False):
            show(axes, mask.numpy(), cmap="Greys", vmin=-0.25, vmax=1.25)
        exposure = drawn.float().mean(dim=0).numpy()
        show(row[4], exposure, cmap=HEAT, vmin=0, vmax=1)
        row[0].set_title(name)
        row[4].set_title(f"{exposure.min():.2f} to {exposure.max():.2f}")
    figure.colorbar(panels[0, 4].images[0], ax=panels[:, 4].tolist(), shrink=0.6)
    return figure


if __name__ == "__main__":
    masks().savefig(Path(__file__).parents[1] / "parts" / "masks.png")

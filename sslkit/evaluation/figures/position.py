"""Where in the image the position of a patch can be told."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from sslkit.evaluation.figures.style import HEAT, WIDTH, new_figure, show, styled

_CHANCE = 1 / 12


@styled
def position_maps(errors: Mapping[str, Tensor]) -> Figure:
    """Error of position probes at each place of the grid, side by side in one colour scale.

    Args:
        errors: by the probe's name, mean squared error of each patch [H, W], in squared normalised
            coordinates.
    """
    maps = {name: error.detach().cpu().numpy() for name, error in errors.items()}
    aspect = max(error.shape[0] / error.shape[1] for error in maps.values())
    figure = new_figure(
        "Position probe: error at each place of the image",
        "Dark: features tell where the patch is. A probe that knows nothing predicts the centre: "
        "its error is low there and grows towards the corners.",
        height=aspect * 0.85 * WIDTH / max(len(maps), 4) + 0.5,
    )
    grid = figure.subplots(1, max(len(maps), 4))
    for axes in grid[len(maps) :]:
        axes.set_axis_off()
    highest = max(_CHANCE, *(float(np.max(error)) for error in maps.values()))
    for axes, (name, error) in zip(grid[: len(maps)], maps.items(), strict=True):
        show(axes, error, cmap=HEAT, vmin=0, vmax=highest)
        axes.set_title(name.replace(": ", ":\n"))
    scale = figure.colorbar(grid[0].images[0], ax=grid, fraction=0.05, pad=0.01)
    scale.set_ticks([0, _CHANCE], labels=["0", "1/12\n(chance)"])
    scale.set_label("mean squared error")
    return figure

"""How well features tell the position of a patch: by place, and while RASA removes it."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from sslkit.evaluation.figures.style import (
    BASELINE,
    HEAT,
    INK,
    REFERENCE,
    TRAINED,
    WIDTH,
    new_figure,
    show,
    styled,
    whole_numbers,
)

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


@styled
def position_error(
    errors: Sequence[float],
    *,
    r2: Mapping[str, tuple[float, float]],
    chance: float | None = None,
) -> Figure:
    """RASA: position error per iteration, and the position R² before and after.

    Args:
        errors: mean squared error of the position predictor of each iteration, in squared
            normalised coordinates, as `RASAProjector.fit` returns them.
        r2: by probe (``"linear"``, ``"two layers"``), R² on held-out images before and after.
        chance: error of always predicting the mean position.
    """
    figure = new_figure(
        "RASA: position removed from patch features",
        "Left: the error should climb to chance, when nothing is left to predict. Right: R² on "
        "held-out images should fall to about 0.",
        height=2.9,
    )
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    iterations = range(1, len(errors) + 1)
    left.plot(iterations, errors, color=TRAINED, marker="o", label="position predictor")
    if chance is not None:
        left.axhline(chance, color=BASELINE, ls=":", lw=1.8, label="chance (mean position)")
        left.legend(loc="best")
    left.margins(y=0.15)
    whole_numbers(left.xaxis)
    left.set(
        title="Error of each iteration",
        xlabel="RASA iteration",
        ylabel="mean squared error\n(normalised coordinates²)",
    )
    places = np.arange(len(r2))
    for offset, name, colour in ((-0.2, "before", REFERENCE), (0.2, "after", TRAINED)):
        values = [pair[offset > 0] for pair in r2.values()]
        bars = right.bar(places + offset, np.maximum(values, 0), 0.36, color=colour, label=name)
        texts = [f"{value:.2f}" for value in values]
        right.bar_label(bars, texts, padding=2, fontsize=8.5, color=INK)
    right.set_xticks(places, list(r2))
    right.tick_params(axis="x", length=0)
    right.grid(False, axis="x")
    highest = max(0.0, *(value for pair in r2.values() for value in pair))
    right.set(
        title="Held-out position R²",
        xlabel="probe",
        ylabel="R² (1: position is known)",
        ylim=(0, 1.35 * max(highest, 0.1)),
    )
    right.legend(loc="upper right", ncols=2)
    return figure

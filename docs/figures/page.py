"""The size of these figures: legible on a phone, where a picture is 360 pixels wide."""

from functools import partial

from sslkit.evaluation.figures.style import new_figure

# In inches: at 360 pixels a point is then one pixel high.
phone_figure = partial(new_figure, width=5.0)

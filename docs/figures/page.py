"""The size of these figures: legible on a phone, where a picture is 360 pixels wide."""

from matplotlib.figure import Figure

from sslkit.evaluation.figures.style import new_figure

WIDTH = 5.0
"""Inches; at 360 pixels a point is then one pixel high."""


def phone_figure(title: str, look_for: str, *, height: float) -> Figure:
    """`new_figure`, narrow."""
    figure = new_figure(title, look_for, height=height, width=WIDTH)
    figure.set_dpi(200)
    return figure

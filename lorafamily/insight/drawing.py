"""Figures as pixels and as files, made without matplotlib's global state.

Colours are those of Okabe and Ito and the map cividis, which colour-blind readers can tell apart.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000"]


def save(figure: Figure, path: Path) -> None:
    """Draw the figure into a file."""
    if path.suffix == ".png":
        Image.fromarray(pixels(figure)).save(path)
    else:
        figure.savefig(path)


def pixels(figure: Figure) -> UInt8[np.ndarray, "height width 3"]:
    """The pixels of a figure, which is drawn on the first call only."""
    canvas = figure.canvas
    if not isinstance(canvas, FigureCanvasAgg):  # before the first call it is the base class
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()

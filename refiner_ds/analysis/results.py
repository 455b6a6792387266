"""Results as a table anybody can read (CSV) and a picture of it (PNG); a file is there whole, or not at all."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refiner_ds.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(rows: int = 1, columns: int = 1, width: float = 6.4, height: float = 4.2) -> tuple[Figure, Any]:
    """A figure without a screen, and its axes as an array [rows, columns].

    Args:
        width, height: of one panel, inches.
    """
    from matplotlib.figure import Figure  # tables alone need no matplotlib

    figure = Figure(figsize=(width * columns, height * rows), dpi=110, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def line_colors(labels: Sequence[str]) -> dict[str, Any]:
    """A colour a model; the checkpoints of one run, ``run/step_…``, share a hue and darken with training."""
    from matplotlib import colormaps

    hues = ("Blues", "Oranges", "Greens", "Reds", "Purples", "Greys")
    families: dict[str, list[str]] = {}
    for label in labels:
        families.setdefault(label.partition("/step_")[0], []).append(label)
    return {
        label: colormaps[hues[number % len(hues)]](0.9 if len(family) == 1 else 0.35 + 0.6 * place / (len(family) - 1))
        for number, family in enumerate(families.values())
        for place, label in enumerate(family)
    }


def legend_below(figure: Figure, panel: Any) -> None:
    """One legend for all panels, that of one of them, under them all: beside few lines it would hide some."""
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), fontsize=7)


def write_figure(figure: Figure, file: Path) -> None:
    """Write a figure as PNG; the same figure gives the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    write_atomically(file, buffer.getvalue())


def write_table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], file: Path) -> None:
    """Write rows as CSV; numbers keep nine significant digits."""
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(columns)
    for row in rows:
        table.writerow([f"{row[name]:.9g}" if isinstance(row[name], float) else row[name] for name in columns])
    write_atomically(file, buffer.getvalue())

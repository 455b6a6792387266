"""Learning curves as SVG: a colour a row of the table, a line a seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

__all__ = ["curves_svg"]

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 620, 300, 52, 190, 12, 38
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")
TICKS = 5
Points = Sequence[tuple[float, float]]


def curves_svg(lines: Mapping[str, Sequence[Points]], y_name: str) -> str:
    """One panel over epochs.

    Args:
        lines: by row of the table, the points (epoch, value) of each of its runs.
        y_name: what the values are, with their unit.
    Returns:
        An ``<svg>`` element in the colours of the page; empty where there are no points.
    """
    points = [point for runs in lines.values() for run in runs for point in run]
    if not points:
        return ""
    most = max(x for x, _ in points) or 1.0
    low, high = min(y for _, y in points), max(y for _, y in points)
    margin = 0.05 * (high - low) or 1.0
    low, high = low - margin, high + margin

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (WIDTH - LEFT - RIGHT) * x / most,
            TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / (high - low),
        )

    inside = _axes(most, low, high, y_name)
    for number, (name, runs) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        for run in runs:
            path = [place(x, y) for x, y in run]
            if len(path) == 1:
                inside.append(f'<circle cx="{path[0][0]:.1f}" cy="{path[0][1]:.1f}" r="3" fill="{colour}"/>')
            elif path:
                text = " ".join(f"{x:.1f},{y:.1f}" for x, y in path)
                inside.append(f'<polyline points="{text}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        y = TOP + 14 + 17 * number
        inside.append(f'<rect x="{WIDTH - RIGHT + 14}" y="{y - 8}" width="14" height="4" fill="{colour}"/>')
        inside.append(f'<text x="{WIDTH - RIGHT + 34}" y="{y}">{escape(name)}</text>')
    size = f'viewBox="0 0 {WIDTH} {max(HEIGHT, TOP + 20 + 17 * len(lines))}" width="{WIDTH}"'
    style = 'font-family="system-ui, sans-serif" font-size="12" fill="currentColor"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>' + "".join(inside) + "</svg>"


def _axes(most: float, low: float, high: float, y_name: str) -> list[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    found = []
    for tick in range(TICKS):
        x = LEFT + (right - LEFT) * tick / (TICKS - 1)
        y = bottom - (bottom - TOP) * tick / (TICKS - 1)
        found.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="currentColor" opacity="0.15"/>')
        value = low + (high - low) * tick / (TICKS - 1)
        found.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
        found.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{most * tick / (TICKS - 1):.3g}</text>')
    middle = (LEFT + right) / 2
    found.append(f'<text x="{middle:.1f}" y="{HEIGHT - 6}" text-anchor="middle">epoch, {escape(y_name)} upwards</text>')
    return found

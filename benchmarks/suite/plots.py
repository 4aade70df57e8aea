"""Plots as SVG text, drawn by hand: bars with their spread, and curves. Readable on light and dark pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import log2

WIDTH = 720
OURS, OTHERS, TEXT, LINE = "#2a7de1", "#9aa5b1", "#7a828c", "#d0803c"
PALETTE = ("#9aa5b1", "#8a6fb0", "#5aa17f", "#c0785a", "#b0a04a", "#6f8fb0", "#a05a7f", "#5a7f5a", "#7f7f7f")
FONT = 'font-family="system-ui, sans-serif" font-size="12"'


@dataclass(frozen=True)
class Bar:
    label: str
    value: float
    least: float
    most: float
    ours: bool = False


def bars(title: str, unit: str, of: Sequence[Bar], ideal: float | None = None) -> str:
    """Horizontal bars, as they come; a line where the ideal is."""
    left, right, row, top = 240, 70, 22, 34
    height = top + row * len(of) + 26
    most = max([bar.most for bar in of] + ([ideal] if ideal else [])) or 1.0
    scale = (WIDTH - left - right) / most
    drawn = [_text(10, 18, title, weight="600")]
    for i, bar in enumerate(of):
        y = top + i * row
        color = OURS if bar.ours else OTHERS
        drawn.append(_text(left - 8, y + 14, bar.label, anchor="end", weight="600" if bar.ours else "400"))
        drawn.append(f'<rect x="{left}" y="{y + 3}" width="{bar.value * scale:.1f}" height="{row - 7}" fill="{color}" rx="2"/>')
        low, high, middle = left + bar.least * scale, left + bar.most * scale, y + row / 2 - 0.5
        drawn.append(f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}" stroke="{TEXT}" stroke-width="1.5"/>')
        drawn.append(_text(high + 6, y + 14, f"{bar.value:.3g}{unit}"))
    if ideal:
        x, end = left + ideal * scale, top + row * len(of)
        drawn.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 4}" y2="{end}" stroke="{LINE}" stroke-dasharray="4 3"/>')
        drawn.append(_text(x, end + 16, f"ideal {ideal:.3g}{unit}", anchor="middle"))
    return _svg(height, drawn)


def curves(title: str, across: str, unit: str, of: Mapping[str, Sequence[tuple[float, float]]], ours: str) -> str:
    """Both axes double from mark to mark: what scales in proportion is a straight line."""
    left, right, top, height = 56, 200, 36, 330
    points = [point for series in of.values() for point in series]
    xs, ys = sorted({x for x, _ in points}), [y for _, y in points]
    low, high = log2(min(ys)) - 0.2, log2(max(ys)) + 0.2
    wide = max(1e-9, log2(xs[-1]) - log2(xs[0]))

    def at(x: float, y: float) -> tuple[float, float]:
        across_ = (log2(x) - log2(xs[0])) / wide
        return left + across_ * (WIDTH - left - right), top + (high - log2(y)) / (high - low) * (height - top - 44)

    drawn = [_text(10, 18, title, weight="600")]
    for x in xs:
        drawn.append(_text(at(x, ys[0])[0], height - 26, f"{x:g}", anchor="middle"))
    drawn.append(_text((left + WIDTH - right) / 2, height - 8, across, anchor="middle"))
    for power in range(int(low) - 1, int(high) + 2):
        if low <= power <= high:
            y = at(xs[0], 2.0**power)[1]
            drawn.append(
                f'<line x1="{left}" x2="{WIDTH - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="{TEXT}" stroke-opacity=".2"/>'
            )
            drawn.append(_text(left - 6, y + 4, f"{2.0**power:g}{unit}", anchor="end"))
    ends: list[tuple[float, str, str]] = []
    others = [name for name in of if name != ours]
    for name, series in of.items():
        color = OURS if name == ours else PALETTE[others.index(name) % len(PALETTE)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in sorted(series)))
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{3 if name == ours else 1.5}"/>')
        ends.append((at(*max(series))[1], name, color))
    last = -1e9
    for y, name, color in sorted(ends):  # labels, pushed apart
        last = max(y, last + 15)
        drawn.append(_text(WIDTH - right + 8, last + 4, name, fill=color, weight="600" if name == ours else "400"))
    return _svg(height, drawn)


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "400", fill: str = TEXT) -> str:
    how = f'text-anchor="{anchor}" font-weight="{weight}" fill="{fill}" {FONT}'
    return f'<text x="{x:.1f}" y="{y:.1f}" {how}>{escape(text)}</text>'


def _svg(height: float, drawn: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" role="img">'
    return "\n".join([head, *drawn, "</svg>", ""])

"""A bar chart as SVG, legible on light and dark pages and on a phone, in the reader's fonts."""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import escape

from benchmarks.contenders import LIBRARY

ROW, GAP, LEFT, WIDTH, RIGHT = 18, 26, 190, 240, 50  # pixels
_STYLE = """
text { font: 12px sans-serif; fill: #333 } .title { font-weight: bold }
.bar { fill: #9aa3ad } .library { fill: #2a7de1 }
line { stroke: #333 } .floor { stroke-dasharray: 4 3 }
@media (prefers-color-scheme: dark) { text { fill: #ddd } line { stroke: #ddd } }
"""


def bar_chart(title: str, rows: dict[str, dict[str, Any]], columns: tuple[str, ...]) -> str:
    """Draw the ratios of a section, with a group of bars for each column.

    Args:
        title: The text above the bars.
        rows: The figures of each contender, by column.
        columns: The columns.
    """
    highs = [row[c].get("high", 0) for row in rows.values() for c in columns if c in row]
    largest = max(highs, default=0)
    scale = WIDTH / max(min(largest, 2.0), 1.1)
    parts, y = [f'<text class="title" x="0" y="14">{escape(title)}</text>'], GAP
    for column in columns:
        parts.append(f'<text class="title" x="0" y="{y + 14}">{escape(column)}</text>')
        top = y
        for name, figures in rows.items():
            if (figure := figures.get(column)) is None or "ratio" not in figure:
                continue
            parts += _bar(name, figure, y, scale)
            y += ROW
        floor = LEFT + scale
        parts.append(f'<line class="floor" x1="{floor:.0f}" x2="{floor:.0f}" y1="{top}" y2="{y}"/>')
        y += GAP - ROW
    content = "\n".join(parts)
    size = f'width="{LEFT + WIDTH + RIGHT}" height="{y}" viewBox="0 0 {LEFT + WIDTH + RIGHT} {y}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{_STYLE}</style>'
    return f"{head}\n{content}\n</svg>\n"


def _bar(name: str, figure: Any, y: int, scale: float) -> list[str]:
    width = min(figure["ratio"] * scale, WIDTH)  # a longer bar is cut off, its number is not
    low, high = (LEFT + min(figure[end] * scale, WIDTH) for end in ("low", "high"))
    kind = "bar library" if name.startswith(LIBRARY) else "bar"
    middle = y + ROW / 2
    return [
        f'<text x="{LEFT - 6}" y="{y + 13}" text-anchor="end">{escape(name)}</text>',
        f'<rect class="{kind}" x="{LEFT}" y="{y + 3}" width="{width:.1f}" height="{ROW - 6}"/>',
        f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}"/>',
        f'<text x="{LEFT + WIDTH + 8}" y="{y + 13}">× {figure["ratio"]:.2f}</text>',
    ]

"""A bar chart as a small SVG that reads on light and on dark pages."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

ROW = 26
LABEL = 230
WIDTH = 760


def bars(values: Sequence[tuple[str, float]], unit: str) -> str:
    """Horizontal bars in the order given; what begins with "underlay" is the reference and drawn pale."""
    most = max((value for _, value in values), default=1.0) or 1.0
    height = ROW * len(values) + 40
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="13">',
        "<style>text{fill:#333}.r{fill:#b8c4d0}.b{fill:#3572a5}"
        "@media(prefers-color-scheme:dark){text{fill:#ddd}.r{fill:#4a5560}.b{fill:#6aa5dd}}</style>",
        f'<text x="{LABEL}" y="18">{escape(unit)}</text>',
    ]
    for number, (label, value) in enumerate(values):
        y = 30 + number * ROW
        length = (WIDTH - LABEL - 70) * value / most
        kind = "r" if label.startswith("underlay") else "b"
        lines.append(f'<text x="{LABEL - 8}" y="{y + 13}" text-anchor="end">{escape(label)}</text>')
        lines.append(f'<rect class="{kind}" x="{LABEL}" y="{y}" width="{length:.1f}" height="18" rx="2"/>')
        lines.append(f'<text x="{LABEL + length + 6:.1f}" y="{y + 13}">{value:.2f}</text>')
    return "\n".join([*lines, "</svg>\n"])

"""Ablation curves as a picture: what each layer costs when it alone is cut, against what that saves. SVG, without a library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

WIDTH: Final = 960
HEIGHT: Final = 540
LEFT, RIGHT, TOP, BOTTOM = 70, 250, 40, 50
TICKS: Final = 4
LEGEND: Final = 32
"""Layers named beside the picture, the dearest first."""


def curves_svg(curves: Sequence[Mapping[str, Any]], title: str) -> str:
    """One line a layer through its cuts: `saved` multiply-adds of a row across, `loss` upwards (as facts["curves"] of a method has them)."""
    layers: dict[str, list[tuple[float, float]]] = {}
    for cut in curves:
        layers.setdefault(str(cut["layer"]), []).append((float(cut["saved"]), float(cut["loss"])))
    widest = max((saved for points in layers.values() for saved, _ in points), default=1.0) or 1.0
    highest = max((loss for points in layers.values() for _, loss in points), default=1.0) or 1.0
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(saved: float, loss: float) -> str:
        return f"{LEFT + width * saved / widest:.1f},{TOP + height * (1 - max(0.0, loss) / highest):.1f}"

    parts = [_text(LEFT, 24, title, "title"), _text(LEFT + width / 2, HEIGHT - 10, "multiply-adds saved, millions a row", "middle")]
    parts.append(f'<text transform="translate(18 {TOP + height / 2:.0f}) rotate(-90)" text-anchor="middle">loss of that cut alone</text>')
    for tick in range(TICKS + 1):
        x, y = LEFT + width * tick / TICKS, TOP + height * (1 - tick / TICKS)
        parts.append(f'<path class="grid" d="M{x:.1f},{TOP}v{height}M{LEFT},{y:.1f}h{width}"/>')
        parts.append(_text(x, HEIGHT - BOTTOM + 18, f"{widest * tick / TICKS / 1e6:.3g}", "middle"))
        parts.append(_text(LEFT - 8, y + 4, f"{highest * tick / TICKS:.3g}", "end"))
    dearest = sorted(layers, key=lambda layer: -max(loss for _, loss in layers[layer]))
    for number, layer in enumerate(dearest):
        colour = f"hsl({number * 137 % 360} 65% 40%)"
        points = sorted(layers[layer])
        line = " ".join(place(*point) for point in points)
        dots = "".join(f'<circle cx="{at[0]}" cy="{at[1]}" r="2.5"/>' for at in (place(*point).split(",") for point in points))
        parts.append(
            f'<g stroke="{colour}" fill="{colour}"><title>{escape(layer)}</title><polyline fill="none" points="{line}"/>{dots}</g>'
        )
        if number < LEGEND:
            y = TOP + 6 + number * (height / LEGEND)
            parts.append(f'<path stroke="{colour}" stroke-width="3" d="M{WIDTH - RIGHT + 16},{y:.1f}h14"/>')
            parts.append(_text(WIDTH - RIGHT + 36, y + 4, layer, "name"))
    style = "text{font:12px sans-serif;fill:#333}.title{font-size:15px}.middle{text-anchor:middle}.end{text-anchor:end}.grid{stroke:#ddd}.name{font-size:11px}"
    body = "".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{escape(title)}</title>'
        f'<style>{style}</style><rect width="100%" height="100%" fill="#fff"/>{body}</svg>'
    )


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'

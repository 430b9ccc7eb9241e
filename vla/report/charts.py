"""Charts as inline SVG and pixels, coloured by CSS variables so that they follow the reader's light or dark theme."""

from __future__ import annotations

import base64
import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

WIDTH, HEIGHT = 420, 210
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 10, 26
POINTS = 240
"""Points kept per line: more cannot be seen, and every one costs bytes."""


@dataclass
class Line:
    """One line of a chart. `tone` picks the colour (1..6); `style` is "line", "faint" or "dots"."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    tone: int = 1
    style: str = "line"
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    """Ends of an interval around each point, drawn as a band."""


def line_chart(title: str, lines: Sequence[Line], *, unit: str = "", floor: float | None = None, ceiling: float | None = None,
               log: bool = False, note: str = "") -> str:  # fmt: skip
    """A small chart with a legend; "" when there is nothing to draw. `unit` is appended to values, `note` to the title."""
    lines = [_thin(line) for line in lines if len(line.x)]
    if not lines:
        return ""
    values = [v for line in lines for part in (line.y, line.low or (), line.high or ()) for v in part]
    xs = [x for line in lines for x in line.x]
    low, high = min(values), max(values)
    log = log and low > 0 and high / low > 20
    if log:
        low, high = 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high))
        ticks = [10.0**k for k in range(round(math.log10(low)), round(math.log10(high)) + 1)]
    else:
        low, high = min(low, floor if floor is not None else low), max(high, ceiling if ceiling is not None else high)
        ticks = nice_ticks(low, high)
        low, high = min(low, ticks[0]), max(high, ticks[-1])
    x0, x1 = min(xs), max(max(xs), min(xs) + 1)

    def px(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        part = math.log(y / low) / math.log(high / low) if log else (y - low) / ((high - low) or 1)
        return HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)

    body = []
    for tick in ticks:
        body.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(tick):.1f}" y2="{py(tick):.1f}"/>')
        body.append(f'<text class="tick" x="{LEFT - 6}" y="{py(tick) + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    body.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">step</text>')
    for tick in nice_ticks(x0, x1, 4):
        if x0 <= tick and px(tick) < WIDTH - 60:
            body.append(f'<text class="tick" x="{px(tick):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{short(tick)}</text>')
    for line in lines:
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in zip(line.x, line.y, strict=True))
        if line.low is not None and line.high is not None:
            edge = [f"{px(x):.1f},{py(y):.1f}" for x, y in zip(line.x, line.high, strict=True)]
            edge += [f"{px(x):.1f},{py(y):.1f}" for x, y in zip(reversed(line.x), reversed(line.low), strict=True)]
            body.append(f'<polygon class="band t{line.tone}" points="{" ".join(edge)}"/>')
        if line.style != "dots" and len(line.x) > 1:
            body.append(f'<polyline class="{line.style} t{line.tone}" points="{path}"/>')
        if line.style == "dots" or len(line.x) == 1 or line.low is not None:
            body += [f'<circle class="dot t{line.tone}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="3"/>'
                     for x, y in zip(line.x, line.y, strict=True)]  # fmt: skip
    shown = [line for line in lines if line.style != "faint"]
    keys = "".join(f'<span class="key"><i class="t{line.tone}"></i>{escape(line.name)}</span>' for line in shown)
    last = ", ".join(f"{line.name} {short(line.y[-1])}{unit}" for line in shown)
    data = [
        {"n": line.name, "t": line.tone, "x": [round(v, 2) for v in line.x], "y": [float(f"{v:.4g}") for v in line.y]}
        for line in shown
    ]
    box = json.dumps({"x0": x0, "x1": x1, "l": LEFT, "r": RIGHT, "w": WIDTH, "u": unit, "s": data}, separators=(",", ":"))
    return (
        f'<figure class="card chart"><figcaption>{escape(title)}<small>{escape(note)}</small></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title}; last: {last}")}" '
        f'data-chart="{escape(box)}">{"".join(body)}<line class="cross" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>'
        f'<div class="keys">{keys}<output></output></div></figure>'
    )


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers that cover [low, high]."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / count
    scale = 10 ** math.floor(math.log10(raw))
    step = next(m * scale for m in (1, 2, 2.5, 5, 10) if m * scale >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(k * step, 10) for k in range(first, last + 1)]


def short(value: float) -> str:
    """A number for an axis: `12k`, `0.05`, `3.2`."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    return f"{value:.4g}" if size >= 1 or size == 0 else f"{value:.3g}"


def smooth(y: Sequence[float], window: int) -> list[float]:
    """Running mean over the last `window` values."""
    total = np.concatenate([[0.0], np.cumsum(np.asarray(y, np.float64))])
    end = np.arange(1, len(total))
    begin = np.maximum(0, end - window)
    return ((total[end] - total[begin]) / (end - begin)).tolist()


def _thin(line: Line) -> Line:
    """At most `POINTS` points, the last always among them; a curve keeps means so that no spike decides its shape."""
    if len(line.x) <= POINTS:
        return line
    keep = np.unique(np.linspace(0, len(line.x) - 1, POINTS).round().astype(int))
    low, high = ([part[i] for i in keep] if part is not None else None for part in (line.low, line.high))
    return Line(line.name, [line.x[i] for i in keep], [line.y[i] for i in keep], line.tone, line.style, low, high)


def interval_bar(part: Mapping[str, Any], kind: str) -> str:
    """`part`'s rate as a bar with its interval low..high, all in 0..1. `kind` (see `lines.KIND`) chooses the colour."""
    a, b, c = (round(100 * part[key], 2) for key in ("rate", "low", "high"))
    return (
        f'<svg class="bar {kind}" viewBox="0 0 100 12" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" width="100" height="12"/><rect class="fill" width="{a}" height="12"/>'
        f'<rect class="whisker" x="{b}" y="4.5" width="{max(round(c - b, 2), 0.5)}" height="3"/></svg>'
    )


def heat_strip(values: np.ndarray, kind: str) -> str:
    """One row (T,) as a data-URI image, one pixel per step. `kind` "value": [-1, 1] from blue over pale to orange;
    "confidence": [0, 1], the surer the more opaque."""
    values = np.nan_to_num(np.asarray(values, np.float64))
    if kind == "confidence":
        alpha = np.clip(values, 0, 1)
        pixels = np.stack([np.full_like(alpha, c) for c in (0x75, 0x6B, 0xB1)] + [255 * alpha], -1)
    else:
        stops = np.array(
            [[0x1F, 0x5A, 0xA6], [0x7F, 0xB3, 0xD9], [0xF4, 0xF1, 0xEA], [0xF2, 0xB0, 0x6B], [0xB4, 0x52, 0x06]], float
        )
        at = np.clip((values + 1) / 2, 0, 1) * (len(stops) - 1)
        pixels = np.stack([np.interp(at, range(len(stops)), stops[:, c]) for c in range(3)] + [np.full_like(at, 255.0)], -1)
    return "data:image/png;base64," + base64.b64encode(png(pixels.round().astype(np.uint8)[None])).decode()


def png(pixels: np.ndarray) -> bytes:
    """(h, w, 4) uint8 RGBA as a PNG file."""

    def block(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = pixels.shape
    raw = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(pixels))
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + block(b"IHDR", header) + block(b"IDAT", zlib.compress(raw, 9)) + block(b"IEND", b"")

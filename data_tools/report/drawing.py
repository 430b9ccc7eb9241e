"""Histograms, planes and film strips, as inline SVG and data URIs."""

from __future__ import annotations

import base64
import io
from html import escape

import numpy as np
from PIL import Image

from data_tools.report.facts import Plane, Spread
from vla.report.charts import nice_ticks, png, short

QUALITY = 62
HEAT = np.array(
    [[0, 0, 0, 0], [0x7F, 0xB3, 0xD9, 150], [0x1F, 0x5A, 0xA6, 220], [0xF2, 0xB0, 0x6B, 240], [0xC2, 0x57, 0x0C, 255]], float
)


def histogram(spread: Spread) -> str:
    """The values of one dimension, its declared limits as lines, what lies outside in red."""
    low, high = spread.edges
    width, height, bins = 240, 84, len(spread.counts)
    top = max(float(np.sqrt(spread.counts.max())), 1e-9)  # square roots, so that rare values can be seen

    def px(value: float) -> float:
        return (value - low) / (high - low) * width

    bars = []
    for n, share in enumerate(spread.counts):
        if share <= 0:
            continue
        tall = max(1.5, float(np.sqrt(share)) / top * (height - 20))
        at = low + (n + 0.5) * (high - low) / bins
        beyond = spread.limits is not None and not spread.limits[0] - 1e-9 <= at <= spread.limits[1] + 1e-9
        bars.append(f'<rect class="{"beyond" if beyond else "bin"}" x="{n * width / bins + 0.5:.1f}" '
                    f'y="{height - 16 - tall:.1f}" width="{width / bins - 1:.1f}" height="{tall:.1f}"/>')  # fmt: skip
    marks = ""
    for limit in spread.limits or ():
        if low - 1e-9 <= limit <= high + 1e-9:
            marks += f'<line class="limit" x1="{px(limit):.1f}" x2="{px(limit):.1f}" y1="2" y2="{height - 14}"/>'
    q = spread.quantiles
    marks += (
        f'<rect class="middle" x="{px(q["q01"]):.1f}" width="{max(1.5, px(q["q99"]) - px(q["q01"])):.1f}" '
        f'y="{height - 15}" height="3"/>'
    )
    marks += f'<text class="tick" x="0" y="{height - 1}">{short(low)}</text>'
    marks += f'<text class="tick" x="{width}" y="{height - 1}" text-anchor="end">{short(high)}</text>'
    unit = "" if spread.unit in ("-", "1") else f" ({spread.unit})" if spread.unit[:1].isdigit() else f" {spread.unit}"
    said = f"98 % within {short(q['q01'])} to {short(q['q99'])}{unit}"
    outside = f' <b class="bad">{spread.outside:.2%} outside</b>' if spread.outside else ""
    return (
        f'<figure class="card dim-card"><figcaption>{escape(spread.name)}<small>{escape(said)}{outside}</small></figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(f"{spread.name}: {said}")}">{"".join(bars)}{marks}</svg>'
        f"</figure>"
    )


def lengths(values: np.ndarray, fps: float) -> str:
    """Episode lengths in rows, seconds below."""
    width, height = 520, 120
    low, high = float(values.min()), float(max(values.max(), values.min() + 1))
    bins = int(min(40, max(5, high - low + 1)))
    counts = np.histogram(values, bins, (low, high + 1e-9))[0]
    bars = "".join(
        f'<rect class="bin" x="{n * width / bins + 1:.1f}" width="{width / bins - 2:.1f}" '
        f'y="{height - 24 - c / counts.max() * 90:.1f}" '
        f'height="{c / counts.max() * 90:.1f}"><title>{c} episodes</title></rect>'
        for n, c in enumerate(counts)
        if c
    )
    ticks = ""
    for tick in nice_ticks(low, high, 6):
        at = (tick - low) / (high - low) * width
        if 0 <= at <= width - 10:
            ticks += f'<text class="tick" x="{max(at, 12):.1f}" y="{height - 8}" text-anchor="middle">{short(tick)}</text>'
    said = f"{values.min()} to {values.max()} rows, median {np.median(values):.0f} ({np.median(values) / fps:.1f} s)"
    return (
        f'<figure class="card chart"><figcaption>Episode length in rows<small>{said}</small></figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{said}">{bars}{ticks}</svg></figure>'
    )


def plane(view: Plane) -> str:
    """A heat map of where the robot was, and where it started, coloured by instruction."""
    side, left, bottom = 320, 44, 26
    level = np.log1p(view.heat) / max(float(np.log1p(view.heat).max()), 1e-9)
    at = level * (len(HEAT) - 1)
    pixels = np.stack([np.interp(at, range(len(HEAT)), HEAT[:, c]) for c in range(4)], -1).round().astype(np.uint8)
    pixels[view.heat == 0] = 0
    image = "data:image/png;base64," + base64.b64encode(png(pixels)).decode()
    x0, x1, y0, y1 = view.extent
    dots = "".join(
        f'<circle class="start t{int(tone) % 6 + 1}" cx="{left + (x - x0) / (x1 - x0) * side:.1f}" '
        f'cy="{(y1 - y) / (y1 - y0) * side:.1f}" '
        'r="3"/>'
        for (x, y), tone in zip(view.starts, view.tones, strict=True)
    )
    ticks = ""
    for tick in nice_ticks(x0, x1, 4):
        if x0 <= tick <= x1:
            ticks += (f'<text class="tick" x="{left + (tick - x0) / (x1 - x0) * side:.1f}" y="{side + 16}" text-anchor="middle">'
                      f"{short(tick)}</text>")  # fmt: skip
    for tick in nice_ticks(y0, y1, 4):
        if y0 <= tick <= y1:
            ticks += (
                f'<text class="tick" x="{left - 6}" y="{(y1 - tick) / (y1 - y0) * side + 4:.1f}" '
                f'text-anchor="end">{short(tick)}</text>'
            )
    covered = float((view.heat > 0).mean())
    said = f"{view.x} across, {view.y} up; {covered:.0%} of the cells visited"
    return (
        f'<figure class="card chart"><figcaption>{escape(view.title)}<small>{escape(said)}</small></figcaption>'
        f'<svg viewBox="0 0 {side + left + 8} {side + bottom}" role="img" aria-label="{escape(said)}">'
        f'<rect class="track" x="{left}" width="{side}" height="{side}" rx="4"/>'
        f'<image href="{image}" x="{left}" width="{side}" height="{side}" preserveAspectRatio="none" '
        'style="image-rendering:pixelated"/>'
        f"{dots}{ticks}</svg></figure>"
    )


def strip(thumbs: list[bytes]) -> tuple[bytes, int, float]:
    """Pictures side by side in one WebP file: (bytes, pictures, width by height of one)."""
    pictures = []
    for data in thumbs:
        with Image.open(io.BytesIO(data)) as image:
            pictures.append(image.convert("RGB"))
    w, h = pictures[0].size
    sheet = Image.new("RGB", (w * len(pictures), h))
    for n, picture in enumerate(pictures):
        sheet.paste(picture, (n * w, 0))
    sink = io.BytesIO()
    sheet.save(sink, "WEBP", quality=QUALITY, method=4)
    return sink.getvalue(), len(pictures), w / h

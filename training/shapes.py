"""A pen over a skia canvas: filled and stroked shapes in portrait units, and colours as RGB triples.

The portrait fills a square of 512 x 512 units whose bottom edge is the picture's. A wider or taller picture shows
more of the place: `left`, `right` and `top` say how far it reaches, `BOTTOM` is always 512.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import skia
from numpy.typing import NDArray

UNITS = 512.0
BOTTOM = UNITS
CENTRE = UNITS / 2

RGB = tuple[float, float, float]
Point = tuple[float, ...]
WHITE: RGB = (252, 252, 252)
INK: RGB = (26, 22, 28)


def shade(colour: RGB, factor: float) -> RGB:
    return (colour[0] * factor, colour[1] * factor, colour[2] * factor)


def mix(a: RGB, b: RGB, t: float) -> RGB:
    """a at t = 0, b at t = 1."""
    return (a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t, a[2] + (b[2] - a[2]) * t)


def _argb(colour: RGB, alpha: float) -> int:
    red, green, blue = (int(min(255, max(0, v))) for v in colour)
    return int(skia.Color(red, green, blue, int(255 * alpha)))


class Pen:
    def __init__(self, width: int, height: int) -> None:
        self._surface = skia.Surface(width, height)
        self._canvas = self._surface.getCanvas()
        scale = min(width, height) / UNITS
        half, tall = width / scale / 2, height / scale
        self.left, self.right, self.top = CENTRE - half, CENTRE + half, BOTTOM - tall
        self._canvas.scale(scale, scale)
        self._canvas.translate(-self.left, -self.top)

    def pixels(self) -> NDArray[np.uint8]:
        """(height, width, 3) RGB."""
        picture = self._surface.makeImageSnapshot().toarray(colorType=skia.kRGB_888x_ColorType)
        return np.ascontiguousarray(picture[..., :3])

    @contextmanager
    def moved(self, dx: float, dy: float, scale: float = 1, turn: float = 0) -> Iterator[None]:
        """Draw inside as if the origin lay at (dx, dy), scaled and turned by degrees."""
        self._canvas.save()
        self._canvas.translate(dx, dy)
        self._canvas.rotate(turn)
        self._canvas.scale(scale, scale)
        yield
        self._canvas.restore()

    @contextmanager
    def clipped(self, *points: Point) -> Iterator[None]:
        """Draw inside the closed path only."""
        self._canvas.save()
        self._canvas.clipPath(_path(points, closed=True), True)
        yield
        self._canvas.restore()

    def oval(
        self,
        colour: RGB,
        x: float,
        y: float,
        rx: float,
        ry: float | None = None,
        *,
        stroke: float = 0,
        alpha: float = 1,
    ) -> None:
        ry = rx if ry is None else ry
        self._canvas.drawOval(skia.Rect.MakeLTRB(x - rx, y - ry, x + rx, y + ry), _paint(colour, stroke, alpha))

    def box(
        self,
        colour: RGB,
        left: float,
        top: float,
        right: float,
        bottom: float,
        *,
        radius: float = 0,
        stroke: float = 0,
        alpha: float = 1,
    ) -> None:
        rect = skia.Rect.MakeLTRB(left, top, right, bottom)
        self._canvas.drawRoundRect(rect, radius, radius, _paint(colour, stroke, alpha))

    def shape(self, colour: RGB, *points: Point, alpha: float = 1) -> None:
        """Fill a closed path. The first point is the start; then (x, y) is a line, (cx, cy, x, y) a quadratic and
        (ax, ay, bx, by, x, y) a cubic curve."""
        self._canvas.drawPath(_path(points, closed=True), _paint(colour, 0, alpha))

    def line(self, colour: RGB, width: float, *points: Point, alpha: float = 1) -> None:
        """Stroke an open path, its points as in `shape`."""
        self._canvas.drawPath(_path(points, closed=False), _paint(colour, width, alpha))

    def fill(self, colour: RGB) -> None:
        self._canvas.drawColor(_argb(colour, 1))

    def fade(self, upper: RGB, lower: RGB, top: float | None = None, bottom: float = BOTTOM) -> None:
        """A vertical gradient over the whole width from `top` (default: the picture's) to `bottom`."""
        start = self.top if top is None else top
        self._gradient(
            skia.GradientShader.MakeLinear(points=[(0, start), (0, bottom)], colors=[_argb(upper, 1), _argb(lower, 1)]),
            start,
            bottom,
        )

    def glow(
        self,
        inner: RGB,
        outer: RGB,
        x: float,
        y: float,
        radius: float,
        *,
        inner_alpha: float = 1,
        outer_alpha: float = 1,
    ) -> None:
        """A radial gradient over the whole picture."""
        self._gradient(
            skia.GradientShader.MakeRadial(
                center=(x, y), radius=radius, colors=[_argb(inner, inner_alpha), _argb(outer, outer_alpha)]
            ),
            self.top,
            BOTTOM,
        )

    def _gradient(self, shader: skia.Shader, top: float, bottom: float) -> None:
        paint = skia.Paint(AntiAlias=True, Dither=False)
        paint.setShader(shader)
        self._canvas.drawRect(skia.Rect.MakeLTRB(self.left, top, self.right, bottom), paint)


def _paint(colour: RGB, stroke: float, alpha: float) -> skia.Paint:
    paint = skia.Paint(AntiAlias=True, Color=_argb(colour, alpha))
    if stroke:
        paint.setStyle(skia.Paint.kStroke_Style)
        paint.setStrokeWidth(stroke)
        paint.setStrokeCap(skia.Paint.kRound_Cap)
        paint.setStrokeJoin(skia.Paint.kRound_Join)
    return paint


def _path(points: Sequence[Point], *, closed: bool) -> skia.Path:
    builder = skia.PathBuilder()
    builder.moveTo(*points[0])
    for point in points[1:]:
        {2: builder.lineTo, 4: builder.quadTo, 6: builder.cubicTo}[len(point)](*point)
    if closed:
        builder.close()
    return builder.detach()

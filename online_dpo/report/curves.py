"""Curves as inline SVG: axes, intervals as bands, and a title and table of values for readers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

_WIDTH, _HEIGHT = 350, 215
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 10, 12, 38
_MAX_POINTS = 240
_MAX_ROUND_MARKS = 12


@dataclass(frozen=True)
class Point:
    """A value at x, with the interval that belongs to it where there is one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None

    @property
    def bottom(self) -> float:
        return self.y if self.low is None else self.low

    @property
    def top(self) -> float:
        return self.y if self.high is None else self.high


@dataclass(frozen=True)
class Series:
    """One line of a chart, its points in order of x."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Chart:
    """What is drawn: at most three series over rounds or steps, and how values are written."""

    title: str
    y_label: str
    series: Sequence[Series]
    x_label: str = "round"
    note: str = ""
    write: Callable[[float], str] = field(default=lambda value: f"{value:.2f}")
    baseline: tuple[float, str] | None = None
    """A value to compare with, and its name."""
    includes: Sequence[float] = ()
    """Values that the range of y reaches to in any case."""
    bounds: tuple[float, float] | None = None
    """The range of y; that of the values where unset."""
    marks: Sequence[tuple[float, str]] = ()
    """Places on the x axis where something begins, with its name."""


@dataclass(frozen=True)
class _Scale:
    """From values to places in the picture."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        share = (value - self.x_low) / ((self.x_high - self.x_low) or 1.0)
        return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 2)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / ((self.y_high - self.y_low) or 1.0)
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 2)


def draw(chart: Chart) -> Markup:
    """The chart as an <svg> element; Markup("") where it has no point."""
    filled = [s for s in chart.series if s.points]
    if not filled:
        return Markup("")
    scale = _scale(chart, filled)
    parts = [_axes(chart, scale)]
    parts += [_line(series, index, scale, chart) for index, series in enumerate(filled)]
    described = Markup("<title>{}</title><desc>{}</desc>").format(chart.title, describe(chart))
    opening = Markup('<svg viewBox="0 0 {} {}" role="img" class="chart">').format(_WIDTH, _HEIGHT)
    return opening + described + Markup("").join(parts) + Markup("</svg>")


def describe(chart: Chart) -> str:
    """First and last value of every series, for those who do not see the curve."""
    texts = []
    for series in chart.series:
        if series.points:
            first, last = series.points[0], series.points[-1]
            texts.append(
                f"{series.name}: {chart.write(first.y)} at {chart.x_label} {first.x:g}, "
                f"{chart.write(last.y)} at {chart.x_label} {last.x:g}"
            )
    return ". ".join(texts) + "."


def thinned(points: Sequence[Point], limit: int = _MAX_POINTS) -> list[Point]:
    """At most `limit` points: means over stretches of equal length, at the stretch's last x."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(len(points) / limit)
    stretches = [points[start : start + size] for start in range(0, len(points), size)]
    return [Point(s[-1].x, math.fsum(p.y for p in s) / len(s)) for s in stretches]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within [low, high], about `count` of them."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def _scale(chart: Chart, filled: Sequence[Series]) -> _Scale:
    points = [point for series in filled for point in series.points]
    xs = [point.x for point in points] + [x for x, _ in chart.marks]
    x_low, x_high = min(xs), max(xs)
    if chart.bounds is not None:
        return _Scale(x_low, x_high, *chart.bounds)
    values = [v for point in points for v in (point.bottom, point.top)] + [*chart.includes]
    if chart.baseline is not None:
        values.append(chart.baseline[0])
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    floor = 0.0 if low >= 0 and low - room < 0 else low - room
    return _Scale(x_low, x_high, floor, high + room)


def _axes(chart: Chart, scale: _Scale) -> Markup:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for value in ticks(scale.y_low, scale.y_high):
        y = scale.y(value)
        parts.append(_rule(_LEFT, y, right, y, "grid"))
        parts.append(_text(_LEFT - 6, y + 4, _axis_number(value, chart), "end"))
    for value in _x_ticks(scale):
        parts.append(_text(scale.x(value), bottom + 16, f"{value:g}", "middle"))
    for x, name in _fewer(chart.marks):
        parts.append(_rule(scale.x(x), _TOP, scale.x(x), bottom, "mark"))
        parts.append(_text(scale.x(x) + 3, _TOP + 9, name, "start", "faint"))
    parts.append(_rule(_LEFT, bottom, right, bottom, "axis"))
    if chart.baseline is not None:
        value, name = chart.baseline
        parts.append(_rule(_LEFT, scale.y(value), right, scale.y(value), "baseline"))
        parts.append(_text(_LEFT + 4, scale.y(value) + 12, name, "start", "faint"))
    parts.append(_text((_LEFT + right) / 2, _HEIGHT - 6, chart.x_label, "middle", "label"))
    turned = Markup('<text class="label" text-anchor="middle" transform="{}">{}</text>')
    middle = (_TOP + bottom) / 2
    parts.append(turned.format(f"translate(12 {middle:g}) rotate(-90)", chart.y_label))
    return Markup("").join(parts)


def _axis_number(value: float, chart: Chart) -> str:
    return chart.write(value) if chart.bounds is not None else f"{value:g}"


def _x_ticks(scale: _Scale) -> list[float]:
    return [value for value in ticks(scale.x_low, scale.x_high, 7) if value == round(value)]


def _fewer(marks: Sequence[tuple[float, str]]) -> Sequence[tuple[float, str]]:
    return marks[:: math.ceil(len(marks) / _MAX_ROUND_MARKS) or 1]


def _line(series: Series, index: int, scale: _Scale, chart: Chart) -> Markup:
    points = series.points
    parts = [_band(points, scale)]
    for stretch in _stretches(points, [x for x, _ in chart.marks]):
        path = " ".join(f"{scale.x(p.x)},{scale.y(p.y)}" for p in stretch)
        parts.append(Markup('<polyline class="line" points="{}"/>').format(path))
    if len(points) <= 60:
        parts += [_dot(point, series, scale, chart) for point in points]
    return Markup('<g class="series s{}">').format(index) + Markup("").join(parts) + Markup("</g>")


def _stretches(points: Sequence[Point], breaks: Sequence[float]) -> list[list[Point]]:
    """The points between two breaks each: nothing leads from one round's last step to the next."""
    stretches: list[list[Point]] = []
    for point, before in zip(points, [None, *points[:-1]], strict=True):
        if before is None or any(before.x < place <= point.x for place in breaks):
            stretches.append([])
        stretches[-1].append(point)
    return stretches


def _band(points: Sequence[Point], scale: _Scale) -> Markup:
    """The interval as an area; as a whisker where there is one point only."""
    known = [p for p in points if p.low is not None and p.high is not None]
    if not known:
        return Markup("")
    if len(known) == 1:
        x = scale.x(known[0].x)
        return _rule(x, scale.y(known[0].bottom), x, scale.y(known[0].top), "whisker")
    above = [f"{scale.x(p.x)},{scale.y(p.top)}" for p in known]
    below = [f"{scale.x(p.x)},{scale.y(p.bottom)}" for p in reversed(known)]
    return Markup('<polygon class="band" points="{}"/>').format(" ".join(above + below))


def _dot(point: Point, series: Series, scale: _Scale, chart: Chart) -> Markup:
    interval = ""
    if point.low is not None and point.high is not None:
        interval = f" ({chart.write(point.low)} to {chart.write(point.high)})"
    text = f"{series.name}, {chart.x_label} {point.x:g}: {chart.write(point.y)}{interval}"
    return Markup('<circle class="dot" cx="{}" cy="{}" r="3.5"><title>{}</title></circle>').format(
        scale.x(point.x), scale.y(point.y), text
    )


def _rule(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(kind, x1, y1, x2, y2)


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> Markup:
    shape = Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>')
    return shape.format(kind, round(x, 2), round(y, 2), anchor, escape(text))

"""Curves of any length in little memory."""

import math

POINTS = 2000  # of a curve
Point = tuple[int, float]  # images seen, value


class Curve:
    """A curve of finite values over the images seen, thinned while it comes: of neighbours the lowest and the highest stay.

    So a spike is seen however long the curve is, which a mean or every n-th value would hide.

    Attributes:
        not_finite: How many values were none that can be drawn.
    """

    def __init__(self) -> None:
        self.not_finite = 0
        self._points: list[Point] = []
        self._waiting: list[Point] = []
        self._stride = 2

    def add(self, images: int, value: float) -> None:
        """Appends a value."""
        if not math.isfinite(value):
            self.not_finite += 1
            return
        self._waiting.append((images, value))
        if len(self._waiting) < self._stride:
            return
        self._points += _extremes(self._waiting)
        self._waiting.clear()
        if len(self._points) >= POINTS:
            self._points = [point for four in range(0, POINTS, 4) for point in _extremes(self._points[four : four + 4])]
            self._stride *= 2

    @property
    def points(self) -> list[Point]:
        """At most about `POINTS`, ordered by images; the newest is among them."""
        return sorted(self._points + _extremes(self._waiting) + self._waiting[-1:], key=lambda point: point[0])

    @property
    def last(self) -> float:
        """The newest value."""
        return self.points[-1][1]


def _extremes(points: list[Point]) -> list[Point]:
    """The lowest and the highest of `points`, in their order; of equal ones, the first and the last."""
    if len(points) <= 2:
        return list(points)
    numbers = range(len(points))
    ends = (min(numbers, key=lambda number: points[number][1]), max(reversed(numbers), key=lambda number: points[number][1]))
    return [points[number] for number in sorted(ends)]

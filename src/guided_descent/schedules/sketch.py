"""sketch: a curve drawn with characters, for a terminal or a log."""

from __future__ import annotations

from .curves import Curve, check_steps

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # a braille character: four rows of two dots


def sketch(curve: Curve, steps: int | None = None, *, width: int = 64, height: int = 10, peak: float = 1.0) -> str:
    """Return a curve as a drawing in braille dots, with its largest and least value and its length.

    Args:
        curve: what to draw.
        steps: how many of its steps; its length by default.
        width: columns of the drawing, without the labels; 64 by default.
        height: its rows; 10 by default.
        peak: what the factors are multiplied by, such as the learning rate.

    Raises:
        ValueError: a curve without an end and no ``steps``, or a size that is no positive integer.

    Example:
        >>> from guided_descent.schedules import curves
        >>> print(sketch(curves.warmup(10) >> curves.constant(20) >> curves.linear(30), width=16, height=3))
        1   ⢀⠎⠉⠉⠉⠉⠉⠑⠢⡀
            ⡎        ⠈⠑⢄⡀
        0  ⠜            ⠈⠑⢄
           0             60
    """
    steps = curve.length if steps is None else steps
    if steps is None:
        raise ValueError(f"{curve!r} has no end; give steps, the number of them to draw")
    for name, value in (("steps", steps), ("width", width), ("height", height)):
        check_steps(name, value)
    columns, rows = 2 * width, 4 * height
    places = [round(i * (steps - 1) / (columns - 1)) for i in range(columns)]
    values = [peak * curve(place) for place in places]
    low, high = min(0.0, min(values)), max(values)
    heights = [round((value - low) / ((high - low) or 1.0) * (rows - 1)) for value in values]
    cells = [[0] * width for _ in range(height)]
    for x, here in enumerate(heights):
        before = heights[x - 1] if x else here
        least, most = sorted((here, before + (here > before) - (here < before)))  # joined to the dot before
        for y in range(least, most + 1):
            row = rows - 1 - y
            cells[row // 4][x // 2] |= _DOTS[row % 4][x % 2]
    labels = [f"{high:.4g}", *[""] * (height - 2), f"{low:.4g}"][:height]
    margin = max(map(len, labels)) + 2
    lines = [
        f"{label:<{margin}}" + "".join(chr(0x2800 + dots) if dots else " " for dots in row)
        for label, row in zip(labels, cells)
    ]
    end = f"{steps:,}"
    lines.append(" " * margin + "0" + f"{end:>{width - 1}}")
    return "\n".join(line.rstrip() for line in lines)

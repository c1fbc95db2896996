"""The drawing has its dots where the curve is."""

from __future__ import annotations

import pytest

from guided_descent.schedules import curves, sketch


def dots(text, width, height):
    """The set of (x, y) of a drawing, y upwards."""
    margin = len(text.splitlines()[-1]) - len(text.splitlines()[-1].lstrip())
    found = set()
    bits = {
        0x01: (0, 0),
        0x08: (1, 0),
        0x02: (0, 1),
        0x10: (1, 1),
        0x04: (0, 2),
        0x20: (1, 2),
        0x40: (0, 3),
        0x80: (1, 3),
    }
    for row, line in enumerate(text.splitlines()[:height]):
        for column, sign in enumerate(line[margin:].ljust(width)):
            code = 0 if sign == " " else ord(sign) - 0x2800
            found |= {(2 * column + x, 4 * height - 1 - (4 * row + y)) for bit, (x, y) in bits.items() if code & bit}
    return found


@pytest.mark.parametrize(
    "text", ["linear(40)", "warmup(9) >> constant(20) >> cosine(60)", "step(0.5, every=30, steps=99)"]
)
def test_each_column_shows_the_value(text):
    curve, width, height = curves.parse(text), 30, 8
    drawn = dots(sketch(curve, width=width, height=height), width, height)
    for x in range(2 * width):
        step = round(x * (curve.length - 1) / (2 * width - 1))
        low = 0.0
        high = max(curve(t) for t in (round(i * (curve.length - 1) / (2 * width - 1)) for i in range(2 * width)))
        assert (x, round((curve(step) - low) / (high - low) * (4 * height - 1))) in drawn


def test_labels():
    text = sketch(0.5 * curves.linear(12_000), peak=3e-4, width=20, height=4)
    lines = text.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("0.00015 ")
    assert lines[3].startswith("0 ")
    assert lines[4].split() == ["0", "12,000"]
    assert max(map(len, lines)) <= 20 + len("0.00015  ")


def test_flat_and_short_ones():
    assert "⠉" in sketch(curves.constant(1), width=4, height=2)
    assert sketch(curves.constant(), 10, width=4, height=2).splitlines()[-1].split() == ["0", "10"]
    assert sketch(0 * curves.constant(3), width=4, height=1).splitlines()[0].split()[0] == "0"


def test_what_cannot_be_drawn_says_why():
    with pytest.raises(ValueError, match=r"constant\(\) has no end; give steps"):
        sketch(curves.constant())
    with pytest.raises(ValueError, match="width=0"):
        sketch(curves.linear(3), width=0)

"""Newton-Schulz coefficient tables: one (a, b, c) per step, each acting on a singular value as ax + bx³ + cx⁵.

``COEFFICIENTS`` holds the tables for X / ‖X‖_F. ``TURBO`` is apart, as it is only for input that AOL has rescaled. The
other published table for that scaling is left out on purpose: it maps singular values above 0.884 to negative ones, so
a rank-1 matrix would come back as -U Vᵀ.
"""

from __future__ import annotations

from dataclasses import dataclass

from guided_descent.linalg.minimax import Triple


@dataclass(frozen=True)
class Coefficients:
    """A schedule of quintic steps p(x) = ax + bx³ + cx⁵ and how to use it.

    Attributes:
        name: The key in ``COEFFICIENTS``.
        triples: (a, b, c) of each step, in order.
        source: Who computed them.
        safety: The input is divided by ``safety * norm``, so that rounding never leaves the domain [0, 1].
        tail: What a longer run repeats: ``"last"`` triple or the whole ``"cycle"``.
        rescaled: Whether the rows of the input must be scaled by AOL first.
    """

    name: str
    triples: tuple[Triple, ...]
    source: str
    safety: float = 1.0
    tail: str = "last"
    rescaled: bool = False

    def take(self, steps: int | None = None) -> tuple[Triple, ...]:
        """The triples of a run of ``steps`` steps (default: as many as the table holds).

        Example:
            >>> len(COEFFICIENTS["polar_express"].take()), len(COEFFICIENTS["jordan"].take(7))
            (5, 7)
        """
        if steps is None:
            return self.triples
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps={steps!r} must be an integer of at least 1; None takes the table's own number")
        n = len(self.triples)
        if self.tail == "cycle":
            return tuple(self.triples[i % n] for i in range(steps))
        return tuple(self.triples[min(i, n - 1)] for i in range(steps))


def _safe(triples: tuple[Triple, ...], s: float) -> tuple[Triple, ...]:
    """p(x / s) for every step but the last, so that rounding above 1 stays inside the domain."""
    return (*((a / s, b / s**3, c / s**5) for a, b, c in triples[:-1]), triples[-1])


_POLAR_EXPRESS: tuple[Triple, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)

COEFFICIENTS: dict[str, Coefficients] = {
    t.name: t
    for t in (
        Coefficients("jordan", ((3.4445, -4.7750, 2.0315),) * 5, "Jordan et al. 2024, the Muon post"),
        Coefficients(
            "polar_express",
            (
                (8.156554524902461, -22.48329292557795, 15.878769915207462),
                (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
            ),
            "Amsel, Persson, Musco, Gower 2025, arXiv:2505.16932: for 5 steps, cushion 2, safety 0.02",
            safety=1.01,  # the source divides by 1.02; 1.01 keeps [0.85, 1.15] down to 0.001
        ),
        Coefficients(
            "polar_express_raw",
            _safe(_POLAR_EXPRESS, 1.01),
            "Amsel, Persson, Musco, Gower 2025, arXiv:2505.16932: 8 steps, safety 0.01",
            safety=1.01,
        ),
        Coefficients(
            "you",
            (
                (4.0848, -6.8946, 2.9270),
                (3.9505, -6.3029, 2.6377),
                (3.7418, -5.5913, 2.3037),
                (2.8769, -3.1427, 1.2046),
                (2.8366, -3.0525, 1.2012),
            ),
            "You Jiacheng 2024, modded-nanogpt",
            tail="cycle",
        ),
        Coefficients(
            "cans",
            (
                (8.4703, -25.1081, 18.6293),
                (4.1828, -3.1087, 0.5806),
                (3.9619, -2.9541, 0.5630),
                (3.2866, -2.4647, 0.5074),
                (2.2737, -1.6447, 0.4162),
            ),
            "Grishina, Smirnov, Rakhuba 2025, arXiv:2506.10935; the safety is ours: the table leaves rounding no room",
            safety=1.02,
        ),
        Coefficients(
            "modula",
            tuple(
                (a / 1024, b / 1024, c / 1024)
                for a, b, c in (
                    (3955, -8306, 5008),
                    (3735, -6681, 3463),
                    (3799, -6499, 3211),
                    (4019, -6385, 2906),
                    (2677, -3029, 1162),
                    (2172, -1833, 682),
                )
            ),
            "Bernstein et al. 2025, modula: 6 steps",
        ),
        Coefficients(
            "deepseek_v4",
            ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2,
            "DeepSeek-V4 2026: 8 steps of Jordan, then 2 that converge",
        ),
        Coefficients("convergent", ((1.875, -1.25, 0.375),) * 12, "Newton-Schulz of order 5: to 1 exactly, slow"),
    )
}

TURBO = Coefficients(
    "turbo",
    (
        (4.6051, -9.6552, 5.6769),
        (4.7505, -6.0861, 2.1790),
        (2.7763, -2.3190, 0.5523),
        (2.4231, -2.2861, 0.8193),
    ),
    "Boissin et al. 2025, arXiv:2512.04632, Turbo-Muon; the coefficients of Dion's kernels",
    rescaled=True,
)


def table(name: str) -> Coefficients:
    """The table of this name.

    Raises:
        ValueError: The name is unknown; the message lists the valid ones.

    Example:
        >>> table("jordan").triples[0]
        (3.4445, -4.775, 2.0315)
    """
    tables = COEFFICIENTS | {TURBO.name: TURBO}
    try:
        return tables[name]
    except KeyError:
        valid = ", ".join(sorted(tables))
        raise ValueError(f"coefficients={name!r} is unknown; choose one of: adaptive, exact, fast, {valid}") from None

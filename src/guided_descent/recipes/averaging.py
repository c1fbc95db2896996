"""Methods that train at a point between a sequence and its average, and evaluate the average: Schedule-Free, GPA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from guided_descent.parts import (
    DECAYS,
    AdamMoments,
    Decoupled,
    Descend,
    FadingAverage,
    Part,
    Parts,
    RectifiedAverage,
    SecondMoment,
    UniformAverage,
)
from guided_descent.recipes.base import Recipe, decay_kind, hyper, recipe, static
from guided_descent.routing.roles import Block


@dataclass(frozen=True, kw_only=True)
class Free(Recipe):
    """What the Schedule-Free methods share: a direction without momentum, a step at y, and the average.

    ``z <- z - lr_t (u + wd y)``, ``x <- (1 - c) x + c z``, ``p <- y = (1 - b) z + b x``; ``lr_t`` over the warmup and
    the weights ``c`` are in ``parts.UniformAverage``.
    """

    beta: ClassVar[str] = "betas"

    lr: float = hyper(2.5e-3, ge=0, help="learning rate; it needs no schedule, but often a warmup")
    weight_decay: float = hyper(0.0, ge=0, help="decay at the point of the gradient")
    warmup_steps: int = hyper(0, ge=0, help="updates over which the steps grow to their length")
    r: float = hyper(0.0, ge=0, help="weight of the t-th z in the average: t^r")
    weight_lr_power: float = hyper(2.0, ge=0, help="and the largest learning rate so far to this power")
    decay: str = decay_kind()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_average(self, self.beta)

    def direction(self) -> tuple[Part, ...]:
        """What is made of the gradient."""
        return (SecondMoment(),)

    def average(self) -> Part:
        """What is made of the steps."""
        return UniformAverage(beta=self.beta)

    def parts(self, block: Block) -> Parts:
        """Direction, decay, step, average."""
        return Parts(*self.direction(), DECAYS[self.decay], Descend(), self.average())


def check_average(recipe: Recipe, key: str) -> None:
    """The weight of the average is not 0, since the average is found again by dividing by it.

    Raises:
        ValueError: It is.
    """
    value = recipe.values()[key]
    pair = isinstance(value, tuple | list)
    if not (value[0] if pair else value) > 0:
        raise ValueError(
            f"{key}={value!r} of {recipe.label}: {f'{key}[0]' if pair else key}, the weight of the average, must be "
            "> 0, since the average is found again by dividing by it; to do without an average use another recipe"
        )


@recipe(
    "schedule_free_sgd",
    paper="Defazio et al. 2024, arXiv:2405.15682",
    family="averaging",
    use="SGD of which the length is not known in advance",
    avoid="BatchNorm without re-estimated statistics",
    start="10 to 50 times SGD's lr, a warmup of 5 %",
)
@dataclass(frozen=True, kw_only=True)
class ScheduleFreeSGD(Free):
    """SGD that needs no schedule: its momentum is an average of the weights, which is evaluated.

    ``z <- z - lr (g + wd y)``, ``x <- (1 - c) x + c z``, ``p <- y = (1 - b) z + b x`` with ``b = momentum``. Evaluate
    in ``guided_descent.evaluating(model, optimizer)``, or between ``optimizer.eval()`` and ``optimizer.train()``.
    """

    beta: ClassVar[str] = "momentum"

    lr: float = hyper(1.0, ge=0, help="learning rate: 10 to 50 times that of SGD; no schedule, but often a warmup")
    momentum: float = hyper(0.9, ge=0, le=1, help="b, weight of the average in the point of the gradients; not 0")

    def direction(self) -> tuple[Part, ...]:
        """The gradient."""
        return ()


@recipe(
    "schedule_free_adamw",
    paper="Defazio et al. 2024, arXiv:2405.15682",
    family="averaging",
    use="runs that may stop at any step, without a schedule",
    avoid="evaluation of the raw weights: use evaluating(model, optimizer)",
    start="lr 2.5e-3, betas (0.9, 0.999), a warmup of 5 %",
)
@dataclass(frozen=True, kw_only=True)
class ScheduleFreeAdamW(Free):
    """AdamW that needs no schedule: in the place of its first moment stands an average of the weights.

    ``u = g / (sqrt(v / bc2) + eps)``; ``z <- z - lr (u + wd y)``, ``x <- (1 - c) x + c z``,
    ``p <- y = (1 - b) z + b x`` with ``b = betas[0]``. Evaluate as with ``schedule_free_sgd``.
    """

    betas: tuple[float, float] = hyper(
        (0.9, 0.999), ge=0, lt=1, help="weight of the average in y, not 0, and memory of the second moment"
    )
    eps: float = hyper(1e-8, ge=0, help="added to the root of the second moment")


@recipe(
    "schedule_free_radam",
    paper="Defazio et al. 2024, arXiv:2405.15682",
    family="averaging",
    use="schedule_free_adamw without a warmup",
    avoid="the same",
    start="lr 2.5e-3",
)
@dataclass(frozen=True, kw_only=True)
class ScheduleFreeRAdam(ScheduleFreeAdamW):
    """Schedule-Free AdamW with RAdam's rectification, so that it needs no warmup either.

    ``lr_t = lr r_t`` with ``r_t`` of RAdam, 0 while ``rho_t <= 4``: the first four steps only gather the second moment.
    """

    silent_sgd_phase: bool = static(True, help="False: steps of SGD, ``u = g`` and ``r_t = 1``, while ``rho_t <= 4``")

    def direction(self) -> tuple[Part, ...]:
        """Adaptive once there are squares enough."""
        return (SecondMoment(late=True),)

    def average(self) -> Part:
        """With the rectification."""
        return RectifiedAverage(silent=self.silent_sgd_phase)


@recipe(
    "gpa_adamw",
    paper="Defazio et al. 2025, arXiv:2512.17131",
    family="averaging",
    use="schedule-free averaging whose two mixtures are chosen apart",
    avoid="runs of unknown length without tuning mu_x",
    start="AdamW's lr",
)
@dataclass(frozen=True, kw_only=True)
class GPAAdamW(Recipe):
    """AdamW with generalised primal averaging: an exponential average of the weights, near which gradients are taken.

    ``z <- z (1 - lr wd) - lr (m / bc1) / (sqrt(v / bc2) + eps)``, ``x <- mu_x x + (1 - mu_x) z``,
    ``p <- y = mu_y x + (1 - mu_y) z``. Evaluate as with ``schedule_free_sgd``. The average begins at the first weights.
    """

    lr: float = hyper(1e-3, ge=0, help="learning rate")
    betas: tuple[float, float] = hyper((0.9, 0.999), ge=0, lt=1, help="memory of the first and second moment")
    eps: float = hyper(1e-8, ge=0, help="added to the root of the second moment")
    weight_decay: float = hyper(0.0, ge=0, help="decay; lr * weight_decay is taken off in a step")
    mu_x: float = hyper(0.9967, ge=0, lt=1, help="memory of the average; 0.9^(1/k) is like DiLoCo with k local steps")
    mu_y: float = hyper(0.7, ge=0, le=1, help="weight of the average in the point of the gradients; not 0")
    decay: str = decay_kind()
    decay_at: str = static("z", of=("z", "y"), help="what decays: the sequence of the steps, or the point y")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_average(self, "mu_y")
        if self.decay == "cautious" and self.decay_at == "z":
            raise ValueError("decay='cautious' of gpa_adamw looks at the point of the step: set decay_at='y' with it")

    def parts(self, block: Block) -> Parts:
        """Moments, step, average; decay of z or of y."""
        decay = DECAYS[self.decay]
        if self.decay_at == "y":
            return Parts(AdamMoments(), decay, Descend(), FadingAverage())
        assert isinstance(decay, Decoupled)
        return Parts(AdamMoments(), Descend(), FadingAverage(decay=decay))

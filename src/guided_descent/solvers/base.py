"""The shared base of all solvers: one flat vector of parameters, counters, the policy for non-finite values."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from guided_descent.engine.policies import PATIENCE, POLICIES, NonFiniteError
from guided_descent.solvers.curvature import Linearization
from guided_descent.solvers.objective import HOW, Objective, as_objective
from guided_descent.solvers.options import choice, number

Params: TypeAlias = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]]

ARMIJO = 1e-4  # sufficient decrease, the c1 of Nocedal and Wright
COUNTERS = ("steps", "rejected", "skipped", "skipped_in_row", "evaluations", "gradients", "products", "jacobians")
NONE, LOSS, CURVED = "closure", "loss", "curved"


@dataclass
class Start:
    """What is known at the point where a step starts.

    Attributes:
        x: The parameters, flat ``[P]``.
        loss: The loss.
        gradient: Its flat gradient ``[P]``.
        model: The linearization, for methods that need it.
        hessian: The Hessian, for methods that need it.
    """

    x: Tensor
    loss: Tensor
    gradient: Tensor
    model: Linearization | None = None
    hessian: Tensor | None = None

    @property
    def f(self) -> float:
        """The loss as a number."""
        return float(self.loss)


class Solver(torch.optim.Optimizer):
    """A method that sees all trainable parameters as one vector and evaluates the loss several times a step.

    ``step`` takes a plain closure where gradients are enough, and an ``Objective`` where the method needs more of the
    loss; what is missing is said. The objective must be deterministic: fixed batch, dropout and batch statistics off.

    ``param_groups`` has one group with every hyperparameter and counter, and ``state`` of the first parameter holds the
    vectors, so that a state dict loads with ``weights_only`` and a resumed run is bitwise equal. After a step every
    ``.grad`` holds the gradient at the step's start.

    A non-finite loss or gradient at the start of a step falls under the policy ``nonfinite``: ``skip`` changes nothing
    but the counters and raises after 25 in a row, ``raise`` raises, ``ignore`` goes on. At a trial point it is a
    rejection.

    Args:
        params: A model, or its parameters; those that require a gradient are taken. All of one real dtype and device.
        options: Hyperparameters, checked by the subclass.

    Raises:
        ValueError: No trainable parameter, several groups, mixed dtypes or devices, a value out of range.
    """

    needs: ClassVar[str] = NONE

    def __init__(self, params: Params, **options: Any) -> None:
        number("lr", options["lr"], above=0)
        choice("nonfinite", options["nonfinite"], POLICIES)
        group = {"params": trainable(params), **dict.fromkeys(COUNTERS, 0)}
        super().__init__([group], options)
        self._memory()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after construction: a solver has one group.

        Raises:
            ValueError: There is a group already.
        """
        if self.param_groups:
            raise ValueError(f"{type(self).__name__} has one group with all parameters; build a new one to add some")
        super().add_param_group(param_group)

    # -- what a method implements ----------------------------------------------------------------------------------

    def _slots(self) -> dict[str, Any]:
        """The state at the beginning: flat tensors and numbers by name."""
        return {}

    @abstractmethod
    def _advance(self, objective: Objective, start: Start) -> bool:
        """Move the parameters, or leave them bitwise as they were and return False."""

    def _start(self, objective: Objective) -> Start:
        loss, gradient = self._gradient(objective)
        return Start(self._read(), loss, gradient)

    # -- training --------------------------------------------------------------------------------------------------

    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Objective | Callable[[], Any] | None = None) -> Any:
        """One step.

        Args:
            closure: An ``Objective``, or a closure where that is enough: it computes the loss at the present
                parameters and returns it, with or without calling ``backward``.

        Returns:
            The loss at the start of the step, detached.

        Raises:
            TypeError: The objective is missing or does not say enough for this method.
            NonFiniteError: The policy is ``raise``, or ``skip`` has skipped 25 steps in a row.
        """
        objective = as_objective(closure)
        self._check(objective)
        start = self._start(objective)
        if self._passes(start):
            moved = self._advance(objective, start)
            self.param_groups[0]["steps"] += 1
            if not moved:
                self._write(start.x)
                self.param_groups[0]["rejected"] += 1
        for p, piece in zip(self._parameters, self._pieces(start.gradient)):
            p.grad = piece.view_as(p).clone(memory_format=torch.preserve_format)
        return start.loss

    def _check(self, objective: Objective) -> None:
        name = type(self).__name__
        if self.needs == CURVED and not objective.curved:
            raise TypeError(f"{name} needs the residuals or the outputs of the model, not the loss alone: pass {HOW}")

    def _passes(self, start: Start) -> bool:
        """Whether loss and gradient are finite; else what the policy says."""
        group = self.param_groups[0]
        if group["nonfinite"] == "ignore":
            return True
        if math.isfinite(start.f) and bool(torch.isfinite(start.gradient).all()):
            group["skipped_in_row"] = 0
            return True
        what = f"the loss is {start.f}" if not math.isfinite(start.f) else "the gradient holds NaN or infinity"
        if group["nonfinite"] == "raise":
            raise NonFiniteError(f"{what} at step {group['steps'] + 1}; nonfinite='skip' leaves such steps out")
        group["skipped"] += 1
        group["skipped_in_row"] += 1
        if group["skipped_in_row"] >= PATIENCE:
            raise NonFiniteError(f"{what}: {PATIENCE} steps in a row were skipped; check data, model and lr")
        return False

    # -- what there is to see --------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Steps that were not skipped; those that moved nothing are counted, too."""
        return int(self.param_groups[0]["steps"])

    @property
    def rejected(self) -> int:
        """Steps that moved nothing: no trial point was good enough."""
        return int(self.param_groups[0]["rejected"])

    @property
    def skipped(self) -> int:
        """Steps skipped because loss or gradient was not finite."""
        return int(self.param_groups[0]["skipped"])

    @property
    def evaluations(self) -> int:
        """Evaluations of the loss so far, with or without gradient."""
        return int(self.param_groups[0]["evaluations"])

    @property
    def gradients(self) -> int:
        """Gradients of the loss so far."""
        return int(self.param_groups[0]["gradients"])

    @property
    def products(self) -> int:
        """Products with ``J``, its transpose or the Hessian so far; a dense matrix made of them counts each."""
        return int(self.param_groups[0]["products"])

    @property
    def jacobians(self) -> int:
        """Calls of the objective's own ``jacobian`` so far."""
        return int(self.param_groups[0]["jacobians"])

    def __repr__(self) -> str:
        group = self.param_groups[0]
        hidden = {"params", "param_names", "initial_lr", *COUNTERS}
        numbers = ", ".join(f"{key}={value}" for key, value in group.items() if key not in hidden)
        return f"{type(self).__name__}({sum(self._sizes)} numbers; {numbers})"

    # -- the flat view ---------------------------------------------------------------------------------------------

    @property
    def _parameters(self) -> list[Tensor]:
        return list(self.param_groups[0]["params"])

    @property
    def _sizes(self) -> list[int]:
        return [p.numel() for p in self._parameters]

    def _pieces(self, flat: Tensor) -> tuple[Tensor, ...]:
        return torch.split(flat, self._sizes)

    def _read(self) -> Tensor:
        """A copy of all parameters as one vector."""
        return torch.cat([p.detach().reshape(-1) for p in self._parameters])

    def _write(self, x: Tensor) -> None:
        """Set all parameters from one vector."""
        for p, piece in zip(self._parameters, self._pieces(x)):
            p.copy_(piece.view_as(p))

    def _zeros(self) -> Tensor:
        first = self._parameters[0]
        return first.new_zeros(sum(self._sizes), requires_grad=False)

    def _memory(self) -> dict[str, Any]:
        """The method's state, allocated where it is missing."""
        state: dict[str, Any] = self.state[self._parameters[0]]
        if not state:
            state.update(self._slots())
            if not state:
                del self.state[self._parameters[0]]
        return state

    # -- evaluations, counted --------------------------------------------------------------------------------------

    def _count(self, name: str, n: int = 1) -> None:
        self.param_groups[0][name] += n

    def _gradient(self, objective: Objective) -> tuple[Tensor, Tensor]:
        """Loss and flat gradient at the present parameters."""
        self._count("evaluations")
        self._count("gradients")
        return objective.gradient(self._parameters)

    def _linearize(self, objective: Objective) -> Start:
        """Loss, gradient and Gauss-Newton model at the present parameters."""
        self._count("evaluations")
        self._count("gradients")
        model = Linearization(objective, self._parameters, lambda n: self._count("products", n))
        return Start(self._read(), model.loss, model.gradient(), model)

    def _dense(self, model: Linearization) -> Tensor:
        """The model's dense ``A``."""
        if model.objective.jacobian is not None:
            self._count("jacobians")
        return model.dense()

    def _try(self, objective: Objective, x: Tensor) -> float:
        """The loss at ``x``, which the parameters become; infinity where it is not finite."""
        self._write(x)
        self._count("evaluations")
        with torch.enable_grad():
            f = float(objective.value().detach())
        return f if math.isfinite(f) else math.inf

    def _backtrack(
        self, objective: Objective, start: Start, d: Tensor, *, shrink: float, most: int, known: float | None = None
    ) -> float:
        """The first of ``t = lr, lr shrink, ...`` with ``f(x + t d) <= f + 1e-4 t g.d``; 0 after ``most`` trials.

        Args:
            objective: The loss.
            start: Where the step started.
            d: The direction, flat.
            shrink: The ratio of successive trials.
            most: The number of trials.
            known: The loss at ``t = 1``, if it is known.
        """
        t, slope = float(self.param_groups[0]["lr"]), float(dot(start.gradient, d))
        for _ in range(most):
            if known is not None and t == 1.0:
                f = known
                self._write(start.x + d)
            else:
                f = self._try(objective, torch.add(start.x, d, alpha=t))
            if f <= start.f + ARMIJO * t * slope:
                return t
            t *= shrink
        return 0.0


def trainable(params: Params) -> list[Any]:
    """The parameters that require a gradient, named where names are known.

    Raises:
        ValueError: None, several groups, complex numbers, mixed dtypes or devices.
    """
    if isinstance(params, nn.Module):
        given: list[Any] = list(params.named_parameters())
    else:
        given = [params] if isinstance(params, Tensor) else list(params)
    if given and isinstance(given[0], dict):
        if len(given) > 1 or set(given[0]) - {"params"}:
            raise ValueError("a solver has one group without options of its own; pass the model or all its parameters")
        given = list(given[0]["params"])
    found = [item for item in given if (item[1] if isinstance(item, tuple) else item).requires_grad]
    tensors = [item[1] if isinstance(item, tuple) else item for item in found]
    if not tensors:
        raise ValueError("there are no parameters to train: none that was given requires a gradient")
    kinds = sorted({f"{str(p.dtype).removeprefix('torch.')} on {p.device}" for p in tensors})
    if len(kinds) > 1 or not tensors[0].is_floating_point():
        raise ValueError(
            f"a solver needs parameters of one real dtype on one device and got {', '.join(kinds)}: convert the model, "
            "or freeze what is not to be trained"
        )
    return found


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The dot product, summed in float64."""
    return a.double() @ b.double()

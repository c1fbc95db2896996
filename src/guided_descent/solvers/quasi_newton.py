"""BFGS and L-BFGS: curvature from differences of gradients."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from guided_descent.solvers.base import Params, Solver, Start, dot
from guided_descent.solvers.curvature import check_dense
from guided_descent.solvers.linesearch import Trial, strong_wolfe
from guided_descent.solvers.objective import Objective
from guided_descent.solvers.options import number, whole

_LEAST_EVALUATIONS = 25  # of the default max_eval: one search must be able to end
_POWELL = 0.2  # s.y' is at least this part of s.B s


class QuasiNewton(Solver):
    """What BFGS and L-BFGS share: iterations with a strong Wolfe search, and which pairs are kept.

    A step makes up to ``max_iter`` iterations ``x <- x + t d``, ``d = -H g``. The first of all has ``H = I`` and the
    first trial ``t = lr min(1, 1/|g|_1)``, later ones ``t = lr``. It ends early as ``torch.optim.LBFGS`` does: largest
    gradient component at most ``tolerance_grad``, slope above ``-tolerance_change``, no component moved by more than
    ``tolerance_change``, loss changed by less than that, or ``max_eval`` evaluations. The tolerances are absolute:
    lower them for losses below 1e-6.

    The pair ``s = t d``, ``y = g(x + s) - g(x)`` is made within one step, so both gradients are of one batch. It is
    kept if ``s.y > pair_eps |s| |y|``; with ``powell``, ``y`` is first replaced by
    ``theta y + (1 - theta) B s`` with the largest ``theta <= 1`` that gives ``s.y >= 0.2 s.B s``.
    A search that finds no lower point clears what was learned: the next iteration is steepest descent.
    """

    def __init__(self, params: Params, **options: Any) -> None:
        if options["max_eval"] is None:
            options["max_eval"] = max(_LEAST_EVALUATIONS, whole("max_iter", options["max_iter"]) * 5 // 4)
        whole("max_iter", options["max_iter"])
        whole("max_eval", options["max_eval"])
        number("tolerance_grad", options["tolerance_grad"], least=0)
        number("tolerance_change", options["tolerance_change"], least=0)
        number("pair_eps", options["pair_eps"], least=0, below=1)
        super().__init__(params, **options)

    @abstractmethod
    def _direction(self, g: Tensor) -> Tensor:
        """``-H g``."""

    @abstractmethod
    def _learn(self, s: Tensor, y: Tensor, sy: float) -> None:
        """Put a pair that was accepted into ``H``."""

    @abstractmethod
    def _forget(self) -> None:
        """Back to ``H = I``."""

    def _advance(self, objective: Objective, start: Start) -> bool:
        group, state = self.param_groups[0], self._memory()
        lr, change = float(group["lr"]), float(group["tolerance_change"])
        x, evaluations = start.x, 1
        now = Trial(0.0, start.f, 0.0, start.gradient)
        if now.g.abs().max() <= group["tolerance_grad"]:
            return True
        moved = False
        for _ in range(group["max_iter"]):
            d = self._direction(now.g)
            t = lr if state["iterations"] else lr * min(1.0, 1.0 / float(now.g.abs().sum()))
            state["iterations"] += 1
            now.t, now.slope = 0.0, float(dot(now.g, d))
            if not now.slope < -change:
                break
            counted = self.evaluations
            new = strong_wolfe(
                lambda t, x=x, d=d: self._at(objective, x, d, t),  # type: ignore[misc]
                now,
                t,
                float(d.abs().max()),
                tolerance=change,
                most=max(0, group["max_eval"] - evaluations),
            )
            evaluations += self.evaluations - counted
            if new.t == 0:
                self._write(x)
                self._forget()
                return moved
            moved = True
            s = d * new.t
            x = torch.add(x, d, alpha=new.t)
            self._write(x)
            self._pair(s, new.g - now.g, -new.t * now.g)  # s = -t H g, so B s = -t g
            drop, now = abs(new.f - now.f), new
            if (
                evaluations >= group["max_eval"]
                or now.g.abs().max() <= group["tolerance_grad"]
                or s.abs().max() <= change
                or drop < change
            ):
                break
        return True

    def _at(self, objective: Objective, x: Tensor, d: Tensor, t: float) -> Trial:
        self._write(torch.add(x, d, alpha=t))
        loss, g = self._gradient(objective)
        f = float(loss)
        finite = math.isfinite(f) and bool(torch.isfinite(g).all())
        return Trial(t, f if finite else math.inf, float(dot(g, d)) if finite else math.nan, g)

    def _pair(self, s: Tensor, y: Tensor, bs: Tensor) -> None:
        """Keep a pair, or not; ``bs`` is ``B s``."""
        group = self.param_groups[0]
        sy, s_bs = float(dot(s, y)), float(dot(s, bs))
        if group["powell"] and sy < _POWELL * s_bs:
            theta = (1 - _POWELL) * s_bs / (s_bs - sy)
            y = theta * y + (1 - theta) * bs
            sy = float(dot(s, y))
        if sy > group["pair_eps"] * float(s.norm()) * float(y.norm()):
            self._learn(s, y, sy)


class LBFGS(QuasiNewton):
    """L-BFGS: ``d = -H g`` by the two-loop recursion over the last ``history_size`` pairs ``(s, y)``.

    ``q = g``; newest to oldest ``a_i = s_i.q / (s_i.y_i)``, ``q -= a_i y_i``; ``q *= s.y / y.y`` of the newest pair;
    oldest to newest ``b = y_i.q / (s_i.y_i)``, ``q += s_i (a_i - b)``; ``d = -q``. With equal options the iterates are
    those of ``torch.optim.LBFGS(line_search_fn="strong_wolfe")`` in the full-batch case; see ``QuasiNewton`` for what
    differs. A plain closure is enough. Memory: ``2 history_size`` vectors.

    Args:
        params: A model, or its parameters.
        lr: First trial step of every iteration after the first.
        max_iter: Iterations per step.
        max_eval: Loss evaluations per step; None: 5/4 of ``max_iter``, at least 25.
        tolerance_grad: See ``QuasiNewton``.
        tolerance_change: See ``QuasiNewton``.
        history_size: Pairs kept; 5 to 20 are usual, torch's default is 100.
        pair_eps: A pair is kept if ``s.y > pair_eps |s| |y|``.
        powell: Mend pairs that would be refused.
        nonfinite: ``skip``, ``raise`` or ``ignore``.

    Raises:
        ValueError: A value out of range.

    Source: Liu and Nocedal 1989; Powell 1978 for the damping.

    Example:
        >>> net = torch.nn.Linear(2, 1)
        >>> opt = LBFGS(net)
        >>> x = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]])
        >>> for _ in range(2):
        ...     _ = opt.step(lambda: (net(x) - x.sum(1, keepdim=True)).square().mean())
        >>> bool((net.weight - 1).abs().max() < 1e-2)
        True
    """

    def __init__(
        self,
        params: Params,
        *,
        lr: float = 1.0,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        history_size: int = 20,
        pair_eps: float = 1e-8,
        powell: bool = False,
        nonfinite: str = "skip",
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            max_iter=max_iter,
            max_eval=max_eval,
            tolerance_grad=tolerance_grad,
            tolerance_change=tolerance_change,
            history_size=whole("history_size", history_size),
            pair_eps=pair_eps,
            powell=bool(powell),
            nonfinite=nonfinite,
        )

    def _slots(self) -> dict[str, Any]:
        zeros = self._zeros()
        size = self.param_groups[0]["history_size"]
        return {
            "iterations": 0,
            "pairs": 0,
            "newest": -1,
            "s": zeros.new_zeros(size, len(zeros)),
            "y": zeros.new_zeros(size, len(zeros)),
        }

    def _order(self) -> list[int]:
        """Rows of the history, oldest first."""
        state = self._memory()
        size = len(state["s"])
        return [(state["newest"] - back) % size for back in reversed(range(state["pairs"]))]

    def _direction(self, g: Tensor) -> Tensor:
        state = self._memory()
        s, y, order = state["s"], state["y"], self._order()
        q, known = g.clone(), {}
        for i in reversed(order):
            known[i] = float(dot(s[i], q)) / float(dot(s[i], y[i]))
            q.add_(y[i], alpha=-known[i])
        if order:
            newest = order[-1]
            q.mul_(float(dot(s[newest], y[newest])) / float(dot(y[newest], y[newest])))
        for i in order:
            b = float(dot(y[i], q)) / float(dot(s[i], y[i]))
            q.add_(s[i], alpha=known[i] - b)
        return q.neg_()

    def _learn(self, s: Tensor, y: Tensor, sy: float) -> None:
        state = self._memory()
        state["newest"] = (state["newest"] + 1) % len(state["s"])
        state["pairs"] = min(state["pairs"] + 1, len(state["s"]))
        state["s"][state["newest"]].copy_(s)
        state["y"][state["newest"]].copy_(y)

    def _forget(self) -> None:
        self._memory().update(iterations=0, pairs=0, newest=-1)


class BFGS(QuasiNewton):
    """BFGS with the dense inverse ``H`` ``[P, P]``: for problems of up to a few thousand parameters.

    ``H <- (I - s yᵀ/s.y) H (I - y sᵀ/s.y) + s sᵀ/s.y``; before the first pair ``H = (s.y / y.y) I``. A plain closure
    is enough.

    Args:
        params: A model, or its parameters.
        lr: First trial step of every iteration after the first.
        max_iter: Iterations per step.
        max_eval: Loss evaluations per step; None: 5/4 of ``max_iter``, at least 25.
        tolerance_grad: See ``QuasiNewton``.
        tolerance_change: See ``QuasiNewton``.
        pair_eps: A pair is kept if ``s.y > pair_eps |s| |y|``.
        powell: Mend pairs that would be refused.
        nonfinite: ``skip``, ``raise`` or ``ignore``.

    Raises:
        ValueError: A value out of range, or more parameters than a dense matrix holds.

    Source: Nocedal and Wright, Numerical Optimization, 2nd ed., equations 6.17 and 6.20.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
        >>> opt = BFGS([x])
        >>> for _ in range(3):
        ...     _ = opt.step(lambda: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2)
        >>> bool((x - 1).abs().max() < 1e-6)
        True
    """

    def __init__(
        self,
        params: Params,
        *,
        lr: float = 1.0,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        pair_eps: float = 1e-8,
        powell: bool = False,
        nonfinite: str = "skip",
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            max_iter=max_iter,
            max_eval=max_eval,
            tolerance_grad=tolerance_grad,
            tolerance_change=tolerance_change,
            pair_eps=pair_eps,
            powell=bool(powell),
            nonfinite=nonfinite,
        )

    def _slots(self) -> dict[str, Any]:
        zeros = self._zeros()
        check_dense("the inverse Hessian", len(zeros), len(zeros))
        eye = torch.eye(len(zeros), dtype=zeros.dtype, device=zeros.device)
        return {"iterations": 0, "pairs": 0, "inverse": eye}

    def _direction(self, g: Tensor) -> Tensor:
        direction: Tensor = -(self._memory()["inverse"] @ g)
        return direction

    def _learn(self, s: Tensor, y: Tensor, sy: float) -> None:
        state = self._memory()
        h = state["inverse"]
        if not state["pairs"]:
            h.zero_().diagonal().fill_(sy / float(dot(y, y)))
        state["pairs"] += 1
        hy = h @ y
        h.add_(torch.outer(s, s), alpha=(1 + float(dot(y, hy)) / sy) / sy)
        cross = torch.outer(s, hy)
        h.sub_(cross + cross.T, alpha=1 / sy)

    def _forget(self) -> None:
        state = self._memory()
        state.update(iterations=0, pairs=0)
        state["inverse"].zero_().diagonal().fill_(1)

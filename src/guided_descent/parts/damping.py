"""Damping of a curvature: how it enters, how it is chosen, and the quadratic model that judges a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from guided_descent.parts.base import Batch, Hyper, Part, Slot, State, key
from guided_descent.parts.rows import Number, Rows
from guided_descent.routing.roles import Block

#: Bounds on pi, for factors of which one is nearly zero.
PI = (1e-6, 1e6)
#: Elements of a product that are in float64 at once.
CHUNK = 1 << 18
#: Candidates of ``cross_validated``, as multiples of the mean eigenvalue: ten for each factor of ten.
GRID = torch.logspace(-6, 3, 91, dtype=torch.float64)


def _each(lam: Number) -> Number:
    """One damping for all, or one for each block as [B, 1, 1]."""
    return lam[:, None, None] if isinstance(lam, Tensor) and lam.ndim == 1 else lam


def add_joint(out: Tensor, left: Tensor | None, right: Tensor | None, lam: Number) -> Tensor:
    """Eigenvalues of ``B (x) A + lam I``: ``l_B l_A^T + lam``.

    Args:
        out: Where they go [B, m, n].
        left: l_B [B, m], or ``None`` for the identity.
        right: l_A [B, n], or ``None``.
        lam: Damping, a number or [B].
    """
    out.fill_(1.0)
    if left is not None:
        out.mul_(left[:, :, None])
    if right is not None:
        out.mul_(right[:, None, :])
    return out.add_(_each(lam))


def factored(out: Tensor, left: Tensor | None, right: Tensor | None, lam: Number) -> Tensor:
    """Eigenvalues of ``(B + sqrt(lam) / pi I) (x) (A + pi sqrt(lam) I)`` with ``pi^2 = (tr A / n) / (tr B / m)``.

    pi is kept within ``PI``, and is 1 where a trace is 0. Both sides are needed. Source: Martens and Grosse 2015,
    1503.05671, section 6.3.
    """
    assert left is not None
    assert right is not None
    top, bottom = right.mean(-1), left.mean(-1)
    known = (top > 0) & (bottom > 0)
    pi = torch.where(known, top / torch.where(known, bottom, 1.0), 1.0).sqrt().clamp(*PI)
    root = lam**0.5
    torch.mul((left + (root / pi)[:, None])[:, :, None], (right + (root * pi)[:, None])[:, None, :], out=out)
    return out


def dominant(g: Tensor, steps: int = 20) -> Tensor:
    """The leading left singular vector of each matrix [B, m, n], by power iteration from its largest column [B, m]."""
    largest = g.square().sum(-2).argmax(-1)
    u = g.gather(-1, largest[:, None, None].expand(-1, g.shape[-2], 1)).squeeze(-1)
    u = torch.nn.functional.normalize(u, dim=-1, eps=torch.finfo(g.dtype).tiny)
    for _ in range(steps):
        w = torch.nn.functional.normalize((u[:, None, :] @ g).squeeze(1), dim=-1, eps=torch.finfo(g.dtype).tiny)
        u = torch.nn.functional.normalize((g @ w[..., None]).squeeze(-1), dim=-1, eps=torch.finfo(g.dtype).tiny)
    return u


def cross_validated(values: Tensor, projected: Tensor, power: Tensor, rows: Tensor) -> Tensor:
    """The ridge that generalised cross-validation picks for ``min_v |y - X v|^2``, from second moments alone.

    With ``X^T X / n = Q diag(l) Q^T``, ``w = Q^T X^T y / n`` and the hat matrix H of the ridge lam,

    ``GCV(lam) = (1/n) |(I - H) y|^2 / (1 - tr H / n)^2``, where
    ``|(I - H) y|^2 / n = |y|^2 / n - sum_j [1 - (lam / (l_j + lam))^2] w_j^2 / l_j`` and
    ``tr H = sum_j l_j / (l_j + lam)``.

    For a layer X are its inputs and, since its gradient G is ``D^T X / n`` with output gradients D, ``y = D u`` with u
    the leading left singular vector of G: the regression whose solution is the direction in which the layer moves most.
    Candidates are ``GRID`` times the mean of l. Where the moments come from different batches the residual may fall
    below 0; it is kept above ``1e-6 |y|^2 / n``.

    Args:
        values: l [B, d], float64.
        projected: w^2 [B, d].
        power: ``|y|^2 / n`` [B].
        rows: n [B].

    Returns:
        lam [B]; not positive where there is no information.

    Source:
        Golub, Heath and Wahba 1979; its use as the damping of a layer follows from the ridge form of the one-step
        update in Zhang et al. 2025, 2502.01763.
    """
    grid = GRID.to(values.device) * values.mean(-1, keepdim=True)  # [B, L]
    l, lam = values[:, None, :], grid[..., None]
    floor = values.amax(-1)[:, None, None] * torch.finfo(torch.float64).eps * values.shape[-1]
    known = l > floor
    shrunk = lam / (l + lam).clamp(min=torch.finfo(torch.float64).tiny)
    explained = torch.where(known, (1 - shrunk.square()) * projected[:, None, :] / torch.where(known, l, 1.0), 0.0)
    residual = torch.maximum(power[:, None] - explained.sum(-1), 1e-6 * power[:, None])
    free = 1 - (1 - shrunk).sum(-1) / rows.clamp(min=1)[:, None]
    score = torch.where(free > 1e-6, residual / free.clamp(min=1e-6).square(), torch.inf)
    return grid.gather(-1, score.argmin(-1, keepdim=True)).squeeze(-1)


@dataclass(frozen=True)
class LevenbergMarquardt(Part):
    """Adapt the damping to how well the quadratic model has predicted the loss.

    In the update it notes ``q = g^T delta + delta^T F delta / 2`` for the step ``delta = -lr u`` that is about to be
    taken, with the Kronecker-factored F of ``Kfac`` without damping, over all blocks and ranks, or with ``exact`` that
    of the batch (``Part.directions``). Every
    ``damping_interval`` steps ``judge`` compares it with what the same batch's loss has done:
    ``rho = (f(p + delta) - f(p)) / q``; below 1/4 the group's ``damping_factor`` is divided by
    ``omega^interval``, above 3/4 multiplied by it, within ``[1e-8 / damping, 1e8]``. Decoupled weight decay and other
    groups' steps are no part of the model. State of the group: ``predicted_change``. Source: Martens and Grosse 2015,
    1503.05671, section 6.5 (omega = 19/20, interval 5).
    """

    slot: ClassVar[str] = "mask"
    lr: str = key("lr")
    damping: str = key("damping")
    interval: str = key("damping_interval")
    omega: str = key("damping_omega")
    exact: bool = False

    def slots(self, block: Block) -> dict[str, Slot]:
        """The predicted change of the loss."""
        return {"predicted_change": Slot("group", (), torch.float64)}

    def sums(self, x: Batch, s: State, h: Hyper) -> dict[str, Tensor]:
        """``g^T delta`` and ``delta^T F delta``."""
        u = x.spare("lm").copy_(x.u)
        rate = float(h[self.lr]) * x.lr_scale * x.factor
        found = {"slope": -rate * inner(x.g.list, u.list)}
        if not self.exact:
            found["bend"] = rate * rate * quadratic(x, s, u.whole, u.whole).sum()
        return found

    @property
    def multiplies(self) -> bool:
        """Where the model is exact."""
        return self.exact

    def directions(self, x: Batch, s: State, h: Hyper) -> tuple[Rows, ...]:
        """``delta``."""
        return (x.spare("lm").copy_(x.u).mul_(-float(h[self.lr]) * x.lr_scale * x.factor),)

    def combine(self, total: Mapping[str, Tensor], shared: State, h: Hyper) -> None:
        """Note the predicted change."""
        bend = total["products"][0, 0] if self.exact else total["bend"]
        shared["predicted_change"].copy_(total["slope"] + bend / 2)

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Leave the direction as it is."""

    def judges(self, h: Hyper, step: int) -> bool:
        """Whether the loss of the batch is wanted again after update number ``step``."""
        return step % int(h[self.interval]) == 0

    def judge(self, shared: State, h: Hyper, before: float, after: float) -> None:
        """Move the damping by the ratio of the actual to the predicted change of the loss."""
        predicted, factor = float(shared["predicted_change"]), shared["damping_factor"]
        rho = (after - before) / predicted if predicted < 0 else -1.0  # a model that predicts no descent is distrusted
        change = float(h[self.omega]) ** int(h[self.interval])
        if not rho >= 0.25:  # not a number counts as failure
            factor.div_(change)
        elif rho > 0.75:
            factor.mul_(change)
        factor.clamp_(1e-8 / max(float(h[self.damping]), 1e-30), 1e8)


@dataclass(frozen=True)
class QuadraticStep(Part):
    """Choose step size and momentum by a quadratic model: ``delta = alpha d + mu v``, d = -u, v the last delta.

    ``(alpha, mu)`` minimise ``M(delta) = g^T delta + delta^T (F + (lam + wd) I) delta / 2``, that is

    ``[d^T M d, d^T M v; d^T M v, v^T M v] (alpha, mu)^T = -(g^T d, g^T v)^T``,

    with sums over all blocks, groups and ranks in float64; v is dropped where the system is singular. With ``exact`` F
    is the Gauss-Newton matrix of the batch, as in the paper, at the price of a forward and about five backward passes
    (``Part.directions``); else it is the Kronecker-factored Fisher of ``Kfac`` with its running factors, without
    products between layers. The direction becomes ``-delta``, so that the learning rate is a multiplier: 1
    takes the model at its word. ``coupled`` names the key of a coupled decay wd, which is then a part of g and of M.
    State: ``last_step``, shaped like the parameter. Source: Martens and Grosse 2015, 1503.05671, section 7.
    """

    slot: ClassVar[str] = "momentum"
    damping: str = key("damping")
    rule: str = "fixed"
    coupled: str = key("")
    exact: bool = False

    @property
    def reads_parameter(self) -> bool:
        """Where decay is a part of the model."""
        return bool(self.coupled)

    def slots(self, block: Block) -> dict[str, Slot]:
        """The last step, as this part chose it."""
        return {"last_step": Slot()}

    def sums(self, x: Batch, s: State, h: Hyper) -> dict[str, Tensor]:
        """The products of the model, with u in place of d."""
        u, v = x.take().whole, x.spare("quadratic").copy_(s["last_step"])
        ridge = torch.as_tensor(strength(s, h, self.damping, self.rule), dtype=torch.float64, device=u.device)
        slope_u, slope_v = inner(x.g.list, x.u.list), inner(x.g.list, v.list)
        if self.coupled:
            decay = float(h[self.coupled])
            scales = x.wd_scale if isinstance(x.wd_scale, list) else [x.wd_scale] * len(x.u)
            for p, a, b, scale in zip(x.p.list, x.u.list, v.list, scales):
                slope_u += decay * scale * torch.sum(p * a, dtype=torch.float64)
                slope_v += decay * scale * torch.sum(p * b, dtype=torch.float64)
            ridge = ridge + decay
        found = {"gu": slope_u, "gv": slope_v}
        for name, a, b in (("uu", u, u), ("uv", u, v.whole), ("vv", v.whole, v.whole)):
            plain = torch.sum(a * b, dim=(-2, -1), dtype=torch.float64)
            bend = 0.0 if self.exact else quadratic(x, s, a, b)
            found[name] = (bend + ridge * plain).sum()
        return found

    @property
    def multiplies(self) -> bool:
        """Where the model is exact."""
        return self.exact

    def directions(self, x: Batch, s: State, h: Hyper) -> tuple[Rows, ...]:
        """``u`` and ``v``."""
        return x.take(), x.spare("quadratic").copy_(s["last_step"])

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Make ``-delta`` the direction and keep delta."""
        alpha, mu = two_steps(total)
        x.take().mul_(alpha).add_(s["last_step"], alpha=-mu)
        s["last_step"].copy_(x.u).neg_()

    def flops(self, block: Block) -> float:
        """Three products with both factors."""
        m, n = block.shape[-2:]
        return 6.0 * (m * m * n + m * n * n)


def two_steps(total: Mapping[str, Tensor]) -> tuple[float, float]:
    """``alpha`` and ``mu`` of ``QuadraticStep`` from the products with u = -d; ``mu = 0`` where they are dependent."""
    uu, uv, vv, gu, gv = (float(total[name]) for name in ("uu", "uv", "vv", "gu", "gv"))
    if "products" in total:
        exact = total["products"].tolist()
        uu, uv, vv = uu + exact[0][0], uv + exact[0][1], vv + exact[1][1]
    if not uu > 0:
        return 0.0, 0.0
    det = uu * vv - uv * uv
    if det > 1e-10 * uu * vv:  # with d = -u: [uu, -uv; -uv, vv] (alpha, mu) = (gu, -gv)
        return (gu * vv - gv * uv) / det, (gu * uv - gv * uu) / det
    return gu / uu, 0.0


def strength(s: State, h: Hyper, key: str, rule: str) -> Number:
    """The damping lam under a rule: one number, or one for each block [B]."""
    if rule == "gcv":
        value: Tensor = s["damping"]
        return value
    lam: Number = h[key]
    return lam * s["damping_factor"] if rule == "lm" else lam


# -- the quadratic model -----------------------------------------------------------------------------------------------


def inner(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """``<a, b>`` over all rows, multiplied and added in float64, some elements at a time."""
    products = []
    for p, q in zip(a, b):
        size = CHUNK if p.device.type == "cpu" else 16 * CHUNK  # what stays in a cache, or is worth a kernel
        pairs = zip(torch.split(p.reshape(-1), size), torch.split(q.reshape(-1), size))
        products += [torch.dot(x.double(), y.double()) for x, y in pairs]
    return torch.stack(products).sum()


def quadratic(x: Batch, s: State, a: Tensor, b: Tensor) -> Tensor:
    """``<a, F b>`` of each block [B] in float64, with ``F = B (x) A`` (row-major) of ``Kfac``'s factors."""
    turned = b
    for side, left in (("left", True), ("right", False)):
        if side not in s:
            continue
        factor = s[side]
        if factor.ndim == 2:
            turned = factor[:, :, None] * turned if left else turned * factor[:, None, :]
        else:
            turned = factor @ turned if left else turned @ factor
    return torch.sum(a * turned, dim=(-2, -1), dtype=torch.float64)

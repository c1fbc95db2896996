"""Inverse-free natural gradient: structured roots of the inverse Kronecker factors, moved by products alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from guided_descent.parts.base import Batch, Hyper, Slot, State, key
from guided_descent.parts.geometry.kronecker import SIDES
from guided_descent.parts.geometry.reading import Reading, admit, finite, gather, hold_uncaptured, over
from guided_descent.routing.roles import Block

if TYPE_CHECKING:
    from guided_descent.capture import LayerIO

#: The structures of the roots; see ``Structure``.
STRUCTURES = ("dense", "diag", "block_diag", "tril", "hierarchical", "toeplitz")


@dataclass(frozen=True)
class Structure:
    """A set of d x d matrices closed under products, kept as its free numbers [..., size].

    - ``dense``: all matrices; ``diag``; ``block_diag``: blocks of ``width`` along the diagonal;
    - ``tril``: lower triangular; ``toeplitz``: lower triangular with equal numbers along each diagonal;
    - ``hierarchical``: ``[[P, *, *], [0, D, 0], [0, *, R]]`` with P and R dense of side ``width`` and D diagonal.

    ``project`` is the natural gradient step of the metric ``tr((M + M^T)^2)`` within the set, for a symmetric matrix S:
    entries whose mirror image is in the set as well are kept, those whose mirror image is not are doubled, and a
    Toeplitz diagonal takes their mean.
    """

    kind: str
    d: int
    width: int = 32

    @property
    def size(self) -> int:
        """Free numbers."""
        return self.d if self.kind in ("diag", "toeplitz") else len(_places(self.kind, self.d, self.width)[0])

    def unpack(self, free: Tensor) -> Tensor:
        """The matrices [..., d, d]."""
        if self.kind == "diag":
            return torch.diag_embed(free)
        made = free.new_zeros(*free.shape[:-1], self.d * self.d)
        if self.kind == "toeplitz":
            rows, columns = torch.tril_indices(self.d, self.d, device=free.device)
            made[..., rows * self.d + columns] = free[..., rows - columns]
        else:
            places, _ = _places(self.kind, self.d, self.width)
            made[..., places.to(free.device)] = free
        return made.view(*free.shape[:-1], self.d, self.d)

    def pack(self, matrix: Tensor) -> Tensor:
        """The free numbers of a matrix of the set."""
        if self.kind == "diag":
            return matrix.diagonal(dim1=-2, dim2=-1).clone()
        if self.kind == "toeplitz":
            return matrix[..., :, 0].clone()
        places, _ = _places(self.kind, self.d, self.width)
        return matrix.flatten(-2)[..., places.to(matrix.device)]

    def project(self, symmetric: Tensor) -> Tensor:
        """The projection of a symmetric matrix [..., d, d], as free numbers."""
        if self.kind == "toeplitz":
            sums = [symmetric.diagonal(-k, -2, -1).mean(-1) * (2 if k else 1) for k in range(self.d)]
            return torch.stack(sums, -1)
        if self.kind == "diag":
            return symmetric.diagonal(dim1=-2, dim2=-1).clone()
        _, weights = _places(self.kind, self.d, self.width)
        return self.pack(symmetric) * weights.to(symmetric)

    def gram(self, rows: Tensor) -> Tensor:
        """The projection of ``W^T W`` for rows W [..., r, d]; a diagonal never makes a matrix of it."""
        return rows.square().sum(-2) if self.kind == "diag" else self.project(rows.mT @ rows)

    def identity(self, like: Tensor) -> Tensor:
        """The free numbers of the identity, in the dtype and on the device of a tensor."""
        eye = torch.eye(self.d, dtype=like.dtype, device=like.device)
        return torch.ones_like(eye[0]) if self.kind == "diag" else self.pack(eye)

    def after(self, rows: Tensor, free: Tensor, *, transposed: bool = False) -> Tensor:
        """``W K`` or ``W K^T`` for rows W [..., r, d]."""
        if self.kind == "diag":
            return rows * free.unsqueeze(-2)
        matrix = self.unpack(free)
        return rows @ (matrix.mT if transposed else matrix)

    def moved(self, free: Tensor, m: Tensor, rate: Tensor) -> Tensor:
        """``K (I - rate M)``, with a rate by row [...]."""
        if self.kind == "diag":
            return free * (1 - rate[..., None] * m)
        k = self.unpack(free)
        return self.pack(k - rate[..., None, None] * (k @ self.unpack(m)))

    def largest(self, free: Tensor) -> Tensor:
        """The largest absolute row sum, which bounds every eigenvalue [...]."""
        return free.abs().amax(-1) if self.kind == "diag" else self.unpack(free).abs().sum(-1).amax(-1)


@lru_cache(maxsize=256)
def _places(kind: str, d: int, width: int) -> tuple[Tensor, Tensor]:
    """Flat places of the free numbers, and their weights: 1 where the mirror image is free too, else 2."""
    free = torch.zeros(d, d, dtype=torch.bool)
    if kind == "dense":
        free[:] = True
    elif kind == "tril":
        free = torch.ones(d, d, dtype=torch.bool).tril()
    elif kind == "block_diag":
        block = torch.arange(d) // width
        free = block[:, None] == block[None, :]
    elif kind == "hierarchical":
        head, tail = min(width, d), max(d - width, min(width, d))
        free[:head] = True
        free[head:tail, head:tail] = torch.eye(tail - head, dtype=torch.bool)
        free[tail:, head:] = True
    else:
        raise ValueError(f"structure {kind!r} does not exist; choose one of {', '.join(STRUCTURES)}")
    places = free.flatten().nonzero().flatten()
    return places, torch.where(free.T.flatten()[places], 1.0, 2.0)


@dataclass(frozen=True)
class InverseFree(Reading):
    """``u <- C C^T u K K^T`` with ``C C^T (x) K K^T ~ (B (x) A + lam I)^-1``, found without inverses or eigenvectors.

    With K-FAC's A [n, n] and B [m, m] of the captured batch, ``H_K = K^T A K`` and ``H_C = C^T B C``, at each capture

    ``m_K <- a m_K + 1/2 Pi[ tr(H_C)/m H_K + lam tr(C^T C)/m K^T K - I ]``, ``K <- K (I - b m_K)``, and for C with K
    and C, m and n exchanged; both read the old K and C. ``b = factor_lr / max(1, ||m||_inf)`` with the largest row sum,
    so that the factor stays invertible for ``factor_lr < 1``. ``adaptive=False`` sets the traces over m and n to 1
    (IKFAC), for which ``K K^T -> (A + lam I)^-1`` and ``C C^T -> (B + lam I)^-1``. Pi projects onto the structure; see
    ``Structure``. K and C begin as the identity. H is projected while it is observed, from the rows ``a K``, so that a
    diagonal root never needs a d x d matrix. A block that no capture has reached makes no update (``uncaptured``); a
    capture that is not finite is left out (``repairs``). ``staggered``: the blocks take turns to be captured.

    State: ``left_root``, ``right_root``, ``left_motion``, ``right_motion`` as free numbers, and ``captures``. Source:
    Lin et al. 2023, 2302.09738; structures Lin et al. 2024, 2312.05705 (the factors 1 and 2 of Pi are derived from the
    Gaussian metric; the starting roots are this library's choice).
    """

    damping: str = key("damping")
    factor_lr: str = key("factor_lr")
    motion: str = key("factor_momentum")
    every: str = key("factor_frequency")
    approx: str = key("approx")
    fisher: str = key("fisher")
    structure: str = "dense"
    width: int = 32
    adaptive: bool = True
    staggered: bool = False

    def of(self, d: int) -> Structure:
        """The structure of a side of length d."""
        return Structure(self.structure, d, self.width)

    @property
    def observes_state(self) -> bool:
        """The roots with which it turns what it sees."""
        return True

    def slots(self, block: Block) -> dict[str, Slot]:
        """Roots and their momenta."""
        slots = super().slots(block)
        for side, d in zip(SIDES, block.shape):
            slots[f"{side}_root"] = slots[f"{side}_motion"] = Slot("factor", (self.of(d).size,))
        return slots

    def observes(self, h: Hyper, step: int) -> bool:
        """Every ``factor_frequency`` steps, or some block in every step."""
        return self.staggered or super().observes(h, step)

    def turns(self, h: Hyper) -> int:
        """The period, where the blocks take turns."""
        return int(h[self.every]) if self.staggered else 1

    def capture_flops(self, block: Block) -> float:
        """Two products of each root with itself and its motion; rows of data count as one side more."""
        return sum(6.0 * d**3 if self.structure != "diag" else 6.0 * d for d in block.shape)

    def observe(self, seen: dict[str, Tensor], io: LayerIO, s: State, block: Block, h: Hyper) -> None:
        """Add the projected sums ``Pi[K^T a a^T K]`` and ``Pi[C^T d d^T C]``, their traces and counts."""
        m, n = block.shape
        for side, rows, count in self.rows(io, n, h[self.approx]):
            structure = self.of(m if side == "left" else n)
            root = s[f"{side}_root"]
            if int(s["captures"]) == 0:
                root = structure.identity(root)
            turned = structure.after(rows.to(root.dtype), root)
            gather(seen, side, structure.gram(turned))
            gather(seen, f"{side}.trace", turned.square().sum())
            gather(seen, f"{side}.count", root.new_tensor(float(count)))

    @staticmethod
    def rows(io: LayerIO, n: int, approx: str) -> list[tuple[str, Tensor, int]]:
        """The data of each side as rows, and the count that makes their Gram matrix a mean."""
        wide = torch.promote_types(io.a.dtype, torch.float32)
        found = []
        if io.fresh:
            a = io.a.to(wide)
            a = a if approx == "expand" else a.mean(1, keepdim=True)
            a = a.reshape(a.shape[0] * a.shape[1] * io.groups, -1)  # groups of a convolution are data
            if io.bias and a.shape[1] == n - 1:
                a = torch.cat([a, a.new_ones(len(a), 1)], 1)
            found.append(("right", a, len(a)))
        if io.d is not None:
            d = io.d.to(wide)
            d = d if approx == "expand" else d.sum(1, keepdim=True)
            d = d.flatten(0, 1)
            if io.groups > 1:  # blocks on the output side: a row has zeros outside its group
                apart = d.view(len(d), io.groups, -1).transpose(0, 1)
                if len(d) > apart.shape[2]:  # fewer rows with the same sums of products
                    apart = torch.linalg.qr(apart, mode="r").R
                made = d.new_zeros(io.groups, apart.shape[1], io.groups, apart.shape[2])
                made.diagonal(dim1=0, dim2=2).copy_(apart.permute(1, 2, 0))
                d = made.flatten(2).flatten(0, 1)
            found.append(("left", d, io.terms * io.fresh))
        return found

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Move the roots if there are statistics, and precondition the direction."""
        if x.seen is not None and {"left", "right"} <= x.seen.keys():
            self.learn(x, x.seen, s, h)
        if hold_uncaptured(x, s):
            return
        m, n = x.shape
        u = x.take().whole
        right, left = self.of(n), self.of(m)
        value = right.after(right.after(u, s["right_root"]), s["right_root"], transposed=True).mT
        value = left.after(left.after(value, s["left_root"]), s["left_root"], transposed=True).mT
        u.copy_(value * over(s["captures"] > 0, u))

    def learn(self, x: Batch, seen: Mapping[str, Tensor], s: State, h: Hyper) -> None:
        """Admit the captures, and move the roots of the blocks that have one."""
        fresh = torch.stack([seen[f"{side}.count"] > 0 for side in SIDES]).all(0)
        good = admit(x, s, fresh, torch.stack([finite(seen[side]) for side in SIDES]).all(0))
        if bool(good.all()):
            self.move(x.shape, seen, s, h)
        elif bool(good.any()):
            names = [f"{side}_{kind}" for side in SIDES for kind in ("root", "motion")]
            some = {name: s[name][good] for name in (*names, "captures")}
            self.move(x.shape, {name: value[good] for name, value in seen.items()}, some, h)
            for name in names:
                s[name][good] = some[name]

    def move(self, shape: tuple[int, ...], seen: Mapping[str, Tensor], s: State, h: Hyper) -> None:
        """One step of the recursion; ``captures`` counts this one already."""
        structures = {side: self.of(d) for side, d in zip(SIDES, shape)}
        first = s["captures"] == 1
        factor, traces, lengths, grams = {}, {}, {}, {}
        for side, structure in structures.items():
            root = s[f"{side}_root"]
            root.copy_(torch.where(first[:, None], structure.identity(root), root))
            share = 1 / seen[f"{side}.count"]
            if side == "left" and self.empirical(h):
                share = share * seen["count"].square()
            factor[side] = seen[side].to(root.dtype) * share[:, None].to(root.dtype)
            traces[side] = seen[f"{side}.trace"].to(root.dtype) * share.to(root.dtype) / structure.d
            whole = structure.unpack(root) if structure.kind != "diag" else root
            lengths[side] = whole.square().flatten(1).sum(1) / structure.d
            grams[side] = root.square() if structure.kind == "diag" else structure.project(whole.mT @ whole)
        lam = h[self.damping]
        for side, other in (("left", "right"), ("right", "left")):
            structure, root, motion = structures[side], s[f"{side}_root"], s[f"{side}_motion"]
            curvature, ridge = (traces[other], lam * lengths[other]) if self.adaptive else (1.0, lam)
            push = _by(curvature) * factor[side] + _by(ridge) * grams[side] - structure.identity(root)
            motion.mul_(h[self.motion]).add_(push, alpha=0.5)
            rate = h[self.factor_lr] / structure.largest(motion).clamp(min=1.0)
            root.copy_(structure.moved(root, motion, rate))

    def flops(self, block: Block) -> float:
        """Two products with each root; the captured sums depend on the data."""
        m, n = block.shape
        return 4.0 * m * n * (2 if self.structure == "diag" else m + n)

    def scratch(self, block: Block) -> int:
        """Two matrices, and the roots as matrices, in float32."""
        m, n = block.shape
        return 4 * (2 * m * n + m * m + n * n)


def _by(value: Tensor | float) -> Tensor | float:
    return value[:, None] if isinstance(value, Tensor) and value.ndim == 1 else value

"""Low-rank natural gradient: the covariance of recent gradients, kept as a few columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from guided_descent.parts.base import Batch, Hyper, Part, Slot, State, Unit, key
from guided_descent.routing.roles import Block

#: What one covariance covers: a whole layer, or each row of its matrix (a neuron and its inputs).
SPANS = ("layer", "neuron")


@dataclass(frozen=True)
class LowRankNatural(Part):
    """``u <- (C + lam I)^-1 u`` with ``C = gamma C + u u^T``, kept as ``X X^T`` with few columns; ``u`` is the newest.

    ``X <- [sqrt(gamma) X, u]``, and since u is the last column, ``(lam I + X X^T)^-1 u = X (X^T X + lam I)^-1 e``: a
    system of ``rank + every`` unknowns. Every ``every`` updates the Gram matrix ``X^T X = V D V^T`` is decomposed and
    the ``rank`` leading directions ``X V`` replace the columns. The covariance is block-diagonal: one block a layer, or
    one for each row of the matrix (``span`` ``neuron``). It is not normalised by ``1 - gamma``. The small system is
    solved in float64, scaled by the longest column, with the rounding error of the Gram matrix added to lam.

    ``staggered``: the rows take turns, so that an update decomposes one ``every``-th of them; row j of a matrix is
    ``j mod every`` updates ahead.

    State: ``columns`` [rank + every, numel], or [m, rank + every, n]. Counted: ``truncations``, the updates in which a
    covariance of the block was cut, and ``fallbacks`` where the solver failed and the newest columns were kept. Source:
    Le Roux, Manzagol and Bengio 2007.
    """

    slot: ClassVar[str] = "geometry"
    unit: ClassVar[Unit] = "matrix"
    damping: str = key("damping")
    gamma: str = key("gamma")
    span: str = "neuron"
    rank: int = 5
    every: int = 10
    staggered: bool = False

    def slots(self, block: Block) -> dict[str, Slot]:
        """The columns of each covariance, as rows."""
        groups, length = self.split(block)
        return {"columns": Slot("factor", (groups, self.rank + self.every, length))}

    def split(self, block: Block) -> tuple[int, int]:
        """The number of covariances and their side."""
        return (block.numel // block.shape[-1], block.shape[-1]) if self.span == "neuron" else (1, block.numel)

    def since(self, x: Batch, device: torch.device) -> Tensor:
        """How many updates each covariance is past its last decomposition [B, groups]."""
        groups, _ = self.split(x.blocks[0])
        rows = torch.arange(groups if self.staggered else 1, device=device) % x.shape[-2]
        return ((x.step - 1 + rows) % self.every).long().expand(len(x.blocks), groups)

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        """Put the direction in as the newest column and solve."""
        columns = s["columns"]
        u = x.take().whole
        turns = self.since(x, u.device)
        place = (turns + self.rank)[..., None]
        columns.mul_(h[self.gamma] ** 0.5)
        newest = u.view(*columns.shape[:2], 1, -1)
        columns.scatter_(2, place[..., None].expand(*newest.shape), newest)
        scaled = x.work.take("tonga", columns.shape, columns.dtype, columns.device)
        gram, scale = self.gram(columns, scaled)
        system = x.work.take("tonga.system", gram.shape, gram.dtype, gram.device).copy_(gram)
        lam = h[self.damping] / scale.square()
        noise = torch.finfo(columns.dtype).eps * system.shape[-1]
        system.diagonal(dim1=-2, dim2=-1).add_((lam + noise)[..., None])
        unit = torch.zeros(system.shape[:-1], dtype=system.dtype, device=u.device).scatter_(2, place, 1.0)
        factor = x.work.take("tonga.factor", gram.shape, gram.dtype, gram.device).mT  # columns first, as LAPACK writes
        info = x.work.take("tonga.info", gram.shape[:-2], torch.int32, gram.device)
        torch.linalg.cholesky_ex(system, out=(factor, info))
        weights = torch.cholesky_solve(unit[..., None], factor).squeeze(-1) / scale[..., None]
        torch.div(columns, scale[..., None, None].to(columns.dtype), out=scaled)
        torch.matmul(weights.to(columns.dtype).unsqueeze(-2), scaled, out=newest)
        ended = turns == self.every - 1
        if bool(ended.any()):
            x.tick("truncations", ended.any(1).long().tolist())
            if not self.truncate(columns, gram, ended):
                x.tick("fallbacks")

    @staticmethod
    def gram(columns: Tensor, scaled: Tensor) -> tuple[Tensor, Tensor]:
        """``X^T X`` over the square of the longest column's length, in float64, and that length [B, groups].

        ``scaled`` becomes X over that length. The division goes by way of ``max |X|``, so that no square is lost.
        """
        flat = columns.flatten(-2)  # vector_norm of order inf would take 25 times as long
        peak = torch.maximum(flat.amax(-1), -flat.amin(-1)).clamp(min=torch.finfo(columns.dtype).tiny)
        torch.div(columns, peak[..., None, None], out=scaled)
        length = torch.linalg.vector_norm(scaled, dim=-1).amax(-1).clamp(min=1.0)
        scaled.div_(length[..., None, None])
        return (scaled @ scaled.mT).double(), peak.double() * length.double()

    def truncate(self, columns: Tensor, gram: Tensor, ended: Tensor) -> bool:
        """Keep the leading directions; where the decomposition fails, the newest columns. Whether it did not.

        ``ended`` [B, groups] says of which covariances.
        """
        part = columns if bool(ended.all()) else columns[ended]
        try:
            vectors = torch.linalg.eigh(gram if part is columns else gram[ended]).eigenvectors
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            vectors = None
        kept = part[..., -self.rank :, :].clone()
        if vectors is not None:
            torch.matmul(vectors[..., -self.rank :].mT.to(part.dtype), part, out=kept)
        part[..., : self.rank, :] = kept
        part[..., self.rank :, :] = 0
        if part is not columns:
            columns[ended] = part
        return vectors is not None

    def flops(self, block: Block) -> float:
        """The Gram matrix, the solution and the combination of the columns."""
        groups, length = self.split(block)
        c = self.rank + self.every
        return groups * (2.0 * c * c * length + c**3 / 3 + 2.0 * c * length)

    def scratch(self, block: Block) -> int:
        """The scaled columns."""
        return 4 * block.numel * (self.rank + self.every)

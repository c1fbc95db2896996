"""How near a step comes to its bare matrix products and factorisations.

The operations of some steps are recorded with their shapes; then each is timed bare, ``torch.mm`` or ``torch.bmm`` or
``torch.linalg``'s solver, on contiguous operands of the same shape and dtype, and the two sums are compared.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addbmm"}
SOLVERS = {"_linalg_eigh", "linalg_qr", "geqrf", "orgqr", "linalg_eigh", "linalg_cholesky_ex", "_linalg_svd"}
#: Solvers under the name of the public call.
BARE: dict[str, Callable[[Tensor], Any]] = {
    "_linalg_eigh": torch.linalg.eigh,
    "linalg_eigh": torch.linalg.eigh,
    "linalg_qr": torch.linalg.qr,
    "linalg_cholesky_ex": torch.linalg.cholesky_ex,
    "_linalg_svd": torch.linalg.svd,
}


@dataclass
class Rates:
    """Sums over the recorded steps, in CPU seconds of one thread.

    Attributes:
        products: Spent in matrix products.
        bare_products: The same products, bare.
        solvers: Spent in factorisations.
        bare_solvers: The same factorisations, bare.
        flops: Floating point operations of the products.
        longest: Spent in the longest factorisation, a batch being one.
    """

    products: float
    bare_products: float
    solvers: float
    bare_solvers: float
    flops: float
    longest: float

    def row(self) -> dict[str, float]:
        """Plain numbers: rates in GFLOP/s, the share of the bare rate, and the cost over the bare factorisations."""
        return {
            "gflop": self.flops / 1e9,
            "gflops": self.flops / 1e9 / max(self.products, 1e-12),
            "bare_gflops": self.flops / 1e9 / max(self.bare_products, 1e-12),
            "share_of_bare_products": self.bare_products / max(self.products, 1e-12),
            "factorisation_ms": 1e3 * self.solvers,
            "over_bare_factorisations": self.solvers / self.bare_solvers if self.bare_solvers else 0.0,
        }


class Recorder(TorchDispatchMode):
    """Times every matrix product and factorisation, by operation and shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.times: Counter[Any] = Counter()
        self.counts: Counter[Any] = Counter()
        self.longest = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name not in PRODUCTS | SOLVERS:
            return function(*args, **(kwargs or {}))
        tensors = [value for value in args if isinstance(value, Tensor)]
        operands = tensors[-2:] if name in PRODUCTS else tensors[:1]
        key = (name, tuple(tuple(value.shape) for value in operands), operands[0].dtype)
        start = time.process_time()
        result = function(*args, **(kwargs or {}))
        spent = time.process_time() - start
        self.times[key] += spent
        self.counts[key] += 1
        if name in SOLVERS:
            self.longest = max(self.longest, spent)
        return result


def measure(step: Callable[[], Any], steps: int) -> Rates:
    """Record some steps and time what they are made of."""
    with Recorder() as recorder:
        for _ in range(steps):
            step()
    totals = {"products": 0.0, "bare_products": 0.0, "solvers": 0.0, "bare_solvers": 0.0, "flops": 0.0}
    for key, count in recorder.counts.items():
        name, shapes, dtype = key
        kind = "products" if name in PRODUCTS else "solvers"
        totals[kind] += recorder.times[key]
        totals[f"bare_{kind}"] += count * _bare(name, shapes, dtype)
        if kind == "products":
            *batch, m, k = shapes[0]
            n = shapes[1][-1]
            totals["flops"] += count * 2.0 * m * k * n * (batch[0] if batch else 1)
    return Rates(**totals, longest=recorder.longest)


def _bare(name: str, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, least: float = 0.05) -> float:
    """CPU seconds of one bare call: the median of several."""
    made = torch.Generator().manual_seed(0)
    operands = [torch.randn(shape, generator=made).to(dtype) for shape in shapes]
    if name in PRODUCTS:
        product = torch.mm if len(shapes[0]) == 2 else torch.bmm
        out = product(*operands)

        def call() -> Any:
            return product(*operands, out=out)
    else:
        a = operands[0] @ operands[0].mT if name != "linalg_qr" else operands[0]

        def call() -> Any:
            return BARE[name](a)

    call()
    times: list[float] = []
    while sum(times) < least or len(times) < 3:
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return sorted(times)[len(times) // 2]

"""Dense float64 references of curvature: Gauss-Newton blocks, per-sample gradients and Kronecker factors, by loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, vmap
from torch.nn import functional as F

#: One loss term of an output vector at an arbitrary target (class 0, or 0); its Hessian does not depend on the target.
TERMS: dict[str, Callable[[Tensor], Tensor]] = {
    "cross_entropy": lambda out: out.logsumexp(-1) - out[0],
    "mse": lambda out: out.square().mean(),
    "half_mse": lambda out: 0.5 * out.square().sum(),
    "sum_mse": lambda out: out.square().sum(),
    "bce": lambda out: F.softplus(out).mean(),
}


def output_hessians(out: Tensor, loss: str) -> Tensor:
    """[T, C, C], the Hessian of each term of an output [*terms, C]."""
    return torch.stack([hessian(TERMS[loss])(row) for row in out.detach().reshape(-1, out.shape[-1])])


def ggn(model: nn.Module, x: Tensor, names: Sequence[str], loss: str) -> Tensor:
    """1/T sum_t J_t^T H_t J_t over the named parameters, flattened row-major and put one after the other."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    chosen = {name: params[name] for name in names}
    jac = jacrev(lambda some: functional_call(model, {**params, **some}, (x,)))(chosen)
    out = model(x).detach()
    flat = [jac[name].reshape(out.numel(), -1) for name in names]
    j = torch.cat(flat, 1).reshape(-1, out.shape[-1], sum(f.shape[1] for f in flat))
    total = torch.zeros(j.shape[-1], j.shape[-1], dtype=torch.float64)
    for jt, ht in zip(j, output_hessians(out, loss), strict=True):
        total += jt.T @ ht @ jt
    return total / len(j)


def per_sample_gradients(
    model: nn.Module, x: Tensor, loss: Callable[..., Tensor], *others: Tensor
) -> dict[str, Tensor]:
    """[N, *shape] by parameter: the gradient of ``loss(out, *others)`` of each sample alone, summed over its terms."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def one(values: dict[str, Tensor], sample: Tensor, *more: Tensor) -> Tensor:
        return loss(functional_call(model, values, (sample.unsqueeze(0),)), *(m.unsqueeze(0) for m in more))

    return vmap(grad(one), in_dims=(None, 0, *(0 for _ in others)))(params, x, *others)


def kfac(a: Tensor, d: Tensor, terms: int, bias: bool, approx: str) -> tuple[Tensor, Tensor]:
    """A and B of inputs [N, R, d_in] and gradients [N, R, d_out] of the sum over terms, one outer product at a time."""
    n, r = a.shape[:2]
    if bias:
        a = torch.cat([a, a.new_ones(n, r, 1)], 2)
    left, right = a.new_zeros(a.shape[2], a.shape[2]), d.new_zeros(d.shape[2], d.shape[2])
    for i in range(n):
        if approx == "reduce":
            left += torch.outer(a[i].mean(0), a[i].mean(0)) / n
            right += torch.outer(d[i].sum(0), d[i].sum(0)) / terms
            continue
        for s in range(r):
            left += torch.outer(a[i, s], a[i, s]) / (n * r)
            right += torch.outer(d[i, s], d[i, s]) / terms
    return left, right


def plain_factors(
    model: nn.Module, layers: Sequence[str], x: Tensor, loss: Callable[[Tensor], Tensor], terms: int, approx: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of Linear and Conv2d layers (one group) from one plain pass; ``loss`` is summed over terms."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    outputs: dict[str, list[Tensor]] = {name: [] for name in layers}

    def record(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inputs[name].append(args[0].detach().clone())
            outputs[name].append(output)
            return output.clone()  # so that nobody changes it in place

        return hook

    handles = [model.get_submodule(name).register_forward_hook(record(name)) for name in layers]
    total = loss(model(x))
    found = {}
    for name, handle in zip(layers, handles, strict=True):
        handle.remove()
        module = model.get_submodule(name)
        grads = torch.autograd.grad(total, outputs[name], retain_graph=True)
        sides = []
        for value, gradient in zip(inputs[name], grads, strict=True):
            if isinstance(module, nn.Conv2d):
                value = F.unfold(value, module.kernel_size, module.dilation, module.padding, module.stride).mT
                gradient = gradient.flatten(2).mT
            elif value.dim() == 2:
                value, gradient = value.unsqueeze(1), gradient.unsqueeze(1)
            sides.append((value, gradient))
        a, d = (torch.cat([side[i] for side in sides], 1).double() for i in (0, 1))
        found[name] = kfac(a, d, terms, module.bias is not None, approx)
    return found

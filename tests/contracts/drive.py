"""What the contract tests share: a small model, data that depends on the step alone, and a loop for any recipe."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import guided_descent as gd
from guided_descent.build import RoutedOptimizer
from guided_descent.parts import Distance, DistanceByLayer
from guided_descent.parts.base import Parts
from guided_descent.recipes import REGISTRY, Recipe
from guided_descent.routing.roles import Block, Piece, Role

#: Options that make slow work happen in a short test and fix its dtype, for recipes that have them.
SMALL: dict[str, Any] = {
    "precondition_frequency": 3,
    "update_proj_gap": 3,
    "factor_frequency": 2,
    "hessian_frequency": 2,
    "start_preconditioning_step": 3,
    "ns_dtype": "float32",
    "d0": 0.01,  # what finds its learning rate begins with steps that a few updates show
    "growth_rate": 1.02,
    "r_eps": 0.01,
    "warmup_steps": 10,
    "silent_sgd_phase": False,
}
#: Sizes that mean something on small tensors, for recipes whose own are larger.
SIZES: dict[str, int] = {"rank": 4, "min_dim_size_to_factor": 3}
#: Options under which a method that finds its learning rate stays at the first one, so that steps follow lr alone.
STEADY: dict[str, Any] = {"d_coef": 1e-9, "growth_rate": 1.0, "r_eps": 1.0}
TOKENS = 11


class Net(nn.Module):
    """Every common role: embedding, two matrices of one shape and one of another, norm, biases, a scalar, a head."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(1)
        self.embed = nn.Embedding(TOKENS, 6)
        self.up = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.mix = nn.Linear(8, 6, bias=False)
        self.wide = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)
        self.gain = nn.Parameter(torch.tensor(1.0))
        self.head = nn.Linear(6, TOKENS)
        with torch.no_grad():
            for p in self.parameters():
                if p.ndim:
                    p.copy_(torch.randn(p.shape, generator=made) * 0.5)
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.mix(torch.tanh(self.norm(self.up(x))))
        x = x + self.down(torch.tanh(self.wide(x)))
        return self.head(x * self.gain)


class Plain(nn.Module):
    """Two matrices and a bias: the least that shows a hybrid recipe, for tests that take thousands of steps."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(2)
        self.first = nn.Linear(3, 4, dtype=dtype)
        self.second = nn.Linear(4, 3, bias=False, dtype=dtype)
        self.out = nn.Linear(3, 2, bias=False, dtype=dtype)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=made))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.first(x)))


class Lone(nn.Module):
    """A matrix as the weight of a hidden layer, under a head that does not train."""

    def __init__(self, name: str, p: nn.Parameter) -> None:
        super().__init__()
        layer = nn.Linear(p.shape[1], p.shape[0], bias=False, dtype=p.dtype)
        layer.weight = p
        self.add_module(name, layer)
        self.head = nn.Linear(p.shape[0], 4, bias=False, dtype=p.dtype).requires_grad_(False)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(4, p.shape[0], generator=torch.Generator().manual_seed(3)))

    def forward(self, x: Tensor) -> Tensor:
        first, head = self.children()
        return head(first(x))


def options(key: str, **more: Any) -> dict[str, Any]:
    """Small options of a recipe; more ones replace them."""
    fields = {item.name: item.default for item in dataclasses.fields(REGISTRY[key].cls)}
    sizes = {name: size for name, size in SIZES.items() if fields.get(name, 0) > size}
    return {name: value for name, value in SMALL.items() if name in fields} | sizes | more


def make(key: str, params: Any, sign: float = 1.0, **more: Any) -> RoutedOptimizer:
    """An optimizer of this recipe with small options, taught where it needs curvature."""
    if reads_layers(key) and isinstance(params, nn.Module):
        more = {"loss": "cross_entropy"} | more
    if recipe_of(key).parametrization and isinstance(params, nn.Module) and not readable(params):
        more = {"parametrization": "flat"} | more
    return teach(gd.optimizer(key, params, **options(key, **more)), sign)


def teach(opt: RoutedOptimizer, sign: float = 1.0) -> RoutedOptimizer:
    """Give it a curvature before each step that wants one: that of a quadratic, see ``diagonal``.

    The passes of a test lead to its gradients, which are often no gradients of any loss.
    """

    def show(opt: RoutedOptimizer, *_: Any) -> None:
        pairs = [(rows, diagonal(rows)) for rows in map(real, trainable(opt))]
        if opt.due("hessian"):
            opt.hessian_pass(sign * sum((c * p.square()).double().sum() / 2 for p, c in pairs))
        elif opt.due() and opt._engine.observer is None:
            opt.curvature_pass(sum((c * p).double().sum() for p, c in pairs).reshape(1, 1), Certain())

    opt.register_step_pre_hook(show)
    return opt


class Certain:
    """A loss of which the only draw is 1."""

    def terms(self, out: Tensor) -> int:
        return 5

    def sample(self, out: Tensor, generator: torch.Generator) -> Tensor:
        return torch.ones_like(out)


def real(p: Tensor) -> Tensor:
    """Complex numbers as pairs of reals, differentiable."""
    return torch.view_as_real(p) if p.is_complex() else p


def trainable(opt: RoutedOptimizer) -> list[Tensor]:
    """The parameters that take a gradient."""
    return [p for group in opt.param_groups for p in group["params"] if p.requires_grad]


def diagonal(p: Tensor) -> Tensor:
    """Numbers of both signs, by the last index alone: those of a matrix are those of its rows. In frozen files, too."""
    place = torch.arange(p.shape[-1] if p.ndim else 1, dtype=torch.float64)
    row = (0.5 + place % 7 / 7) * (1 - 2 * (place % 2))
    return row.to(p.dtype).reshape(p.shape[-1:]).expand(p.shape)


class Unscaled:
    """A parametrization that leaves learning rates alone, so that a weight and its parts take steps of one length."""

    def apply(self, blocks: Any, needed: Any) -> Any:
        return dict(blocks)


def readable(model: nn.Module) -> bool:
    """Whether the forward pass of a model of these tests tells how its weights are put together."""
    try:
        gd.modula.read(model)
    except ValueError:
        return False
    return True


def lone(key: str, name: str, p: nn.Parameter) -> Any:
    """A named matrix as a recipe takes it: in a list, or in a model for those that read layers."""
    return Lone(name, p) if reads_layers(key) else [(name, p)]


def refuses_lists(key: str) -> bool:
    """Whether it takes no list with a matrix in it, which is then proved here, for tests of what only lists can do."""
    if not reads_layers(key):
        return False
    with pytest.raises(TypeError, match="pass the model itself, not its parameters"):
        make(key, [("p", nn.Parameter(torch.ones(3, 3)))])
    return True


# -- kinds of recipes: what they do, and never what they are called ------------------------------------------------


def recipe_of(key: str) -> type[Recipe]:
    """The class of a recipe."""
    return REGISTRY[key].cls


def parts_of(key: str) -> Parts:
    """The parts that it gives to a hidden matrix, at its defaults."""
    return recipe_of(key)().parts(Block("w", (Piece("w", (6, 8)),), (6, 8), Role.MATRIX))


def reads_layers(key: str) -> bool:
    """Whether it reads the inputs and output gradients of layers."""
    return recipe_of(key).reads_layers


def has_sums(key: str) -> bool:
    """Whether it sums over all parameters before it can step: it runs in stages and is never compiled."""
    return any(part.has_sums for part in parts_of(key))


def finds_rate(key: str) -> bool:
    """Whether it finds its learning rate, which is then no number of the group; see ``steady``."""
    return any(isinstance(part, Distance | DistanceByLayer) for part in parts_of(key))


def always(key: str) -> dict[str, Any]:
    """Options under which it reads the diagonal of the curvature in every step, whichever the number of the step."""
    return {"hessian_frequency": 1} if parts_of(key).curvature else {}


def per_tensor(key: str) -> bool:
    """Whether it is for any tensor and yet acts on each as a whole: on a stack or a fused map as on one."""
    return not recipe_of(key).matrix and parts_of(key).unit != "element"


def takes_biases(key: str) -> bool:
    """Whether a recipe for matrices keeps biases for itself."""
    made = recipe_of(key)()
    return made.route(Block("b", (Piece("b", (6,)),), (6,), Role.BIAS)) is made


def structure(key: str) -> tuple[Any, ...]:
    """What the engine sees of a recipe: recipes that agree here take the same way through it."""
    cls, parts = recipe_of(key), parts_of(key)
    group = cls().values() | {"seed": 0}
    block = Block("w", (Piece("w", (6, 8)),), (6, 8), Role.MATRIX)
    return (
        cls.matrix,
        cls.reads_layers,
        parts.unit,
        bool(parts.curvature),
        parts.evaluations,
        has_sums(key),
        any(part.policy(group).period > 0 for part in parts),
        frozenset(slot.layout for slot in parts.slots(block).values()),
    )


def representatives() -> set[str]:
    """One recipe of each structure, the first in the registry."""
    found: dict[tuple[Any, ...], str] = {}
    for key in REGISTRY:
        found.setdefault(structure(key), key)
    return set(found.values())


def has(key: str, field: str) -> bool:
    """Whether a recipe has a hyperparameter of this name."""
    return field in REGISTRY[key].cls.numbers()


def exact(key: str) -> dict[str, Any]:
    """Options under which two routes to one update agree to rounding in float64."""
    if key == "ekfac":  # its factors have rank 1 here, and rounding would choose the scales of a refreshed null space
        return {"precondition_frequency": 50}
    if parts_of(key).curvature:  # probes of +-1 see a diagonal as it is, whatever is drawn
        return {"probe": "rademacher"} if has(key, "probe") else {}
    return {"ns_dtype": "float64"} if has(key, "ns_dtype") else {}


def steady(key: str) -> dict[str, Any]:
    """Options under which lr alone sets the length of its steps, from the first one."""
    found = {name: value for name, value in STEADY.items() if has(key, name)} if finds_rate(key) else {}
    return found | ({"warmup_steps": 0} if has(key, "warmup_steps") else {})


def undrawn(key: str) -> dict[str, Any]:
    """Options under which no labels are drawn, so that two routes see the same curvature."""
    return {"fisher": "exact"} if reads_layers(key) and recipe_of(key)().values()["fisher"] == "mc" else {}


def evaluations(opt: RoutedOptimizer) -> int:
    """Gradient evaluations that a step takes."""
    return max(bucket.parts.evaluations for bucket in opt._engine.bind().buckets)


def loss_of(model: nn.Module, step: int, rows: slice = slice(None), size: int = 8) -> Tensor:
    """The mean loss of a batch that depends on the step alone."""
    made = torch.Generator().manual_seed(1000 + step)
    pairs = torch.randint(0, TOKENS, (size, 2), generator=made)[rows]
    return F.cross_entropy(model(pairs[:, 0]).float() if half(model) else model(pairs[:, 0]), pairs[:, 1])


def half(model: nn.Module) -> bool:
    """Whether the model computes in half precision."""
    return next(model.parameters()).dtype in (torch.bfloat16, torch.float16)


def take(opt: Any, closure: Any, passes: int) -> Any:
    """One step: with the closure where the recipe evaluates several times, else after calling it."""
    if passes > 1:
        return opt.step(closure)
    loss = closure()
    opt.step()
    return loss


def drive(opt: RoutedOptimizer, model: nn.Module, steps: int, first: int = 0) -> list[float]:
    """Train; the loss of each step."""
    passes = evaluations(opt)
    losses = []
    for number in range(first, first + steps):

        def closure(number: int = number) -> Tensor:
            opt.zero_grad()
            loss = loss_of(model, number)
            loss.backward()
            return loss

        losses.append(float(take(opt, closure, passes)))
    return losses


def feed(opt: RoutedOptimizer, closure: Any, seed: int = 0) -> Any:
    """One step on gradients that a closure writes; recipes that read layers are shown a forward pass before."""
    if opt._engine.observer is not None and opt.due():
        look(opt, seed)
    return take(opt, closure, evaluations(opt))


def fill(params: Any, seed: int, scale: float = 1.0) -> None:
    """Random gradients, equal for equal seeds."""
    made = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=made, dtype=torch.float64) * scale).to(p.dtype)


def push(opt: RoutedOptimizer, steps: int = 1, seed: int = 0, scale: float = 1.0) -> None:
    """Steps on random gradients that do not depend on the parameters."""
    params = [p for group in opt.param_groups for p in group["params"] if p.requires_grad]
    for number in range(7919 * seed, 7919 * seed + steps):
        feed(opt, lambda number=number: fill(params, number, scale), number)


def sequence(opt: RoutedOptimizer, decaying: bool = False) -> dict[str, Any]:
    """Copies of what the steps move, by name: the parameters, or the z of a recipe that averages; or of what decays."""
    found: dict[str, Any] = {}
    for bucket in opt._engine.bind().buckets:
        average = bucket.parts.average
        own = average is not None and (not decaying or getattr(average, "decay", None) is not None)
        for p in (p for owners in bucket.owners for p in owners):
            found[p.name] = (opt.state[p.tensor]["z"] if own else p.tensor.detach()).clone()
    return found


def look(opt: RoutedOptimizer, seed: int) -> None:
    """A forward pass on random inputs, and a backward pass for recipes that read the true labels."""
    capture = opt._engine.observer.capture
    if type(capture.root).forward is nn.Module.forward:
        return  # a model that cannot run: nothing is captured, and every block is held
    out = capture.root(inputs_of(capture.root, torch.Generator().manual_seed(seed)))
    if capture.fisher == "empirical":
        opt.zero_grad()
        F.cross_entropy(out.float(), torch.zeros(len(out), dtype=torch.long)).backward()
        opt.zero_grad()


#: More than any side of the small models, so that no factor is singular: a basis of its null space is arbitrary.
SAMPLES = 64


def inputs_of(model: nn.Module, made: torch.Generator) -> Tensor:
    """Random inputs of a model of these tests, by its own ``sample`` or by its first layer."""
    dtype = next(model.parameters()).dtype
    if hasattr(model, "sample"):
        return model.sample(made).to(dtype)
    first = next(module for module in model.modules() if isinstance(module, nn.Embedding | nn.Linear | nn.Conv2d))
    if isinstance(first, nn.Embedding):
        return torch.randint(0, first.num_embeddings, (SAMPLES,), generator=made)
    size = (first.in_features,) if isinstance(first, nn.Linear) else (first.in_channels, 5, 5)
    return torch.randn(SAMPLES, *size, generator=made).to(dtype)


def snapshot(opt: RoutedOptimizer, model: nn.Module | None = None) -> dict[str, Any]:
    """Copies of every parameter, state tensor and counter."""
    found: dict[str, Any] = {}
    for index, group in enumerate(opt.param_groups):
        for name, p in zip(group["param_names"], group["params"]):
            found[name] = p.detach().clone()
            for key, value in opt.state.get(p, {}).items():
                found[f"{name}/{key}"] = value.clone() if isinstance(value, Tensor) else value
        for key in ("steps", "skipped"):
            found[f"{index}/{key}"] = group[key]
        for key, value in group["extra"].items():
            found[f"{index}/extra/{key}"] = value.clone() if isinstance(value, Tensor) else value
    for name, p in model.named_parameters() if model is not None else ():
        found[f"model/{name}"] = p.detach().clone()
    return found


def identical(a: Any, b: Any) -> bool:
    """Equal to the bit, dtype and shape included; NaN equals NaN."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape or a.device != b.device:
            return False
        return bool(torch.equal(bits(a), bits(b)))
    return bool(a == b)


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor.detach()


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Two snapshots are equal to the bit."""
    assert a.keys() == b.keys()
    differ = [name for name in a if not identical(a[name], b[name])]
    assert not differ, f"not bitwise equal: {differ[:5]}"


def parameters(model: nn.Module) -> dict[str, Any]:
    """Copies of a model's parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_close(a: dict[str, Any], b: dict[str, Any], tolerance: float) -> None:
    """Two models are equal to a tolerance, relative to the largest element of each tensor."""
    assert a.keys() == b.keys()
    for name in a:
        x, y = a[name].double(), b[name].double()
        size = max(float(x.abs().max()) if x.numel() else 0.0, 1e-30)
        assert float((x - y).abs().max() if x.numel() else 0.0) <= tolerance * size, name

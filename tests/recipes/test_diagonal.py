"""AdaHessian and Sophia: references on known diagonals, identities, draws, and every way to the curvature of a loss."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import guided_descent as gd
from guided_descent.capture import CrossEntropy, Masked
from guided_descent.solvers import Likelihood, Objective
from oracles import diagonal as oracle
from oracles.training import far, stream

SHAPES = [(4, 5), (6,), (3, 2, 2, 2), ()]
PATHS: list[dict[str, bool]] = [{}, {"foreach": False}, {"compile": True}]
IDS = ["lists", "plain", "compiled"]


def curve(t: int, shape: Sequence[int], seed: int) -> Tensor:
    """A diagonal of both signs that changes with the step."""
    made = torch.Generator().manual_seed(10_000 * (seed + 1) + t)
    return torch.randn(tuple(shape), generator=made, dtype=torch.float64)


class Given:
    """A loss whose only draw is 1, with as many terms as it is told."""

    count = 7

    def terms(self, out: Tensor) -> int:
        return type(self).count

    def sample(self, out: Tensor, generator: torch.Generator) -> Tensor:
        return torch.ones_like(out)


def feed(opt: Any, ps: Sequence[Tensor], t: int) -> None:
    """Give the curvature of step t: a quadratic with this diagonal, or for labels a sum with these gradients."""
    if opt.due("hessian"):
        opt.hessian_pass(sum((curve(t, p.shape, i) * p.square()).sum() / 2 for i, p in enumerate(ps)))
    elif opt.due():
        Given.count = 5 + t
        opt.curvature_pass(sum((curve(t, p.shape, i) * p).sum() for i, p in enumerate(ps)).reshape(1, 1), Given())


def run(opt: Any, ps: Sequence[nn.Parameter], steps: int) -> list[list[Tensor]]:
    """Train on the streams of the tensors; the path of each."""
    grads = [stream(tuple(p.shape), i) for i, p in enumerate(ps)]
    paths: list[list[Tensor]] = [[] for _ in ps]
    for t in range(1, steps + 1):
        feed(opt, ps, t)
        for p, grad in zip(ps, grads):
            p.grad = grad(t, p)
        opt.step()
        for path, p in zip(paths, ps):
            path.append(p.detach().clone())
    return paths


# -- references ------------------------------------------------------------------------------------------------------

#: Recipe, what differs from its defaults, and the same for the reference.
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("adahessian", {}, {}),
    ("adahessian", {"betas": (0.8, 0.95), "eps": 1e-2, "weight_decay": 0.2}, {"betas": (0.8, 0.95), "eps": 1e-2}),
    ("adahessian", {"hessian_power": 0.5, "hessian_frequency": 3}, {"power": 0.5}),
    ("adahessian", {"spatial_averaging": False, "hessian_power": 0}, {"power": 0.0, "kernel": False}),
    ("sophia_h", {"probe": "rademacher", "weight_decay": 0.0}, {}),
    ("sophia_h", {"probe": "rademacher", "hessian_frequency": 3, "gamma": 2.0}, {"gamma": 2.0}),
    ("sophia_h", {"probe": "rademacher", "betas": (0.5, 0.8), "eps": 0.1}, {"betas": (0.5, 0.8), "eps": 0.1}),
    ("sophia_g", {"weight_decay": 0.0}, {"gamma": 0.04}),
    ("sophia_g", {"betas": (0.5, 0.8), "hessian_frequency": 3, "gamma": 0.5}, {"betas": (0.5, 0.8), "gamma": 0.5}),
]


@pytest.mark.parametrize("path", PATHS, ids=IDS)
@pytest.mark.parametrize(("name", "options", "same"), CASES)
def test_the_references_steps(name: str, options: dict[str, Any], same: dict[str, Any], path: dict[str, bool]) -> None:
    starts = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    ps = [nn.Parameter(p.clone()) for p in starts]
    opt = gd.optimizer(name, [{"params": ps[:2]}, {"params": ps[2:]}], lr=0.05, **options, **path)
    if path.get("compile"):
        opt._engine.compiled.backend = "eager"
    values = opt.param_groups[0]
    found = run(opt, ps, 40)
    for i, (start, got) in enumerate(zip(starts, found)):

        def estimate(t: int, i: int = i, shape: Sequence[int] = start.shape) -> Tensor | None:
            if (t - 1) % values["hessian_frequency"]:
                return None
            return curve(t, shape, i) if name != "sophia_g" else (curve(t, shape, i) / (5 + t)) ** 2

        grad, more = stream(tuple(start.shape), i), dict(same, weight_decay=values["weight_decay"])
        if name == "adahessian":
            more.setdefault("kernel", start.ndim == 4)
            more["kernel"] = more["kernel"] and start.ndim == 4
            want = oracle.adahessian(start, grad, estimate, 40, 0.05, **more)
        else:
            labels = (lambda t: 5 + t) if name == "sophia_g" else None
            want = oracle.sophia(start, grad, estimate, 40, 0.05, labels=labels, **more)
        assert far(got, want) < 1e-11


# -- identities ------------------------------------------------------------------------------------------------------


def test_adahessian_on_a_diagonal_quadratic_holds_its_diagonal() -> None:
    c = torch.tensor([[0.5, -2.0, 3.0], [1e-3, 10.0, 0.0]], dtype=torch.float64)
    p = nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
    opt = gd.AdaHessian([p], lr=1e-3)
    for t in range(1, 20):
        loss = (c * p.square()).sum() / 2
        opt.zero_grad()
        opt.hessian_pass(loss)
        loss.backward()
        opt.step()
        torch.testing.assert_close(opt.state[p]["exp_hessian_sq"], (1 - 0.999**t) * c**2, rtol=1e-12, atol=0)


def test_adahessian_with_gradients_for_a_diagonal_is_adam() -> None:
    """The second moment is Adam's: with D = g the steps are Adam's."""
    p, q = (nn.Parameter(curve(1, (4, 5), 0)) for _ in "ab")
    opt = gd.AdaHessian([p], lr=0.05, betas=(0.8, 0.95), eps=1e-8)
    adam = gd.AdamW([q], lr=0.05, betas=(0.8, 0.95), eps=1e-8, weight_decay=0.0)
    grad = stream((4, 5), 3)
    for t in range(1, 41):
        p.grad, q.grad = grad(t, p), grad(t, q)
        opt.hessian_pass((p.grad * p.square()).sum() / 2)
        opt.step()
        adam.step()
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=1e-13)


def test_newtons_step_on_a_quadratic() -> None:
    """Without memory, and with k = 1, lr = 1, AdaHessian goes to the minimum of a convex diagonal quadratic at once."""
    p = nn.Parameter(torch.randn(7, dtype=torch.float64))
    opt = gd.AdaHessian([p], lr=1.0, betas=(0.0, 0.0), eps=0.0)
    loss = (torch.arange(1.0, 8.0) * (p - 3).square()).sum()
    opt.hessian_pass(loss)
    loss.backward()
    opt.step()
    torch.testing.assert_close(p.detach(), torch.full_like(p, 3.0))


@pytest.mark.parametrize("name", ["sophia_h", "sophia_g"])
def test_sophia_without_curvature_descends_by_signs(name: str) -> None:
    p, q = (nn.Parameter(torch.ones(4, 5, dtype=torch.float64)) for _ in "ab")
    opt = gd.optimizer(name, [p], lr=0.01, weight_decay=0.1, gamma=0.0, betas=(0.9, 0.99))
    average, grad = torch.zeros_like(q), stream((4, 5), 3)
    for t in range(1, 31):
        feed(opt, [p], t)
        p.grad = grad(t, p)
        opt.step()
        average = 0.9 * average + 0.1 * grad(t, q)
        with torch.no_grad():
            q.mul_(1 - 0.01 * 0.1).sub_(0.01 * average.sign())
        torch.testing.assert_close(p.detach(), q.detach())


def test_the_means_over_kernels_are_those_of_convolutions_alone() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3, 4)).double()
    opt = gd.AdaHessian(net)
    c = {p: curve(1, p.shape, i) for i, p in enumerate(net.parameters())}
    opt.hessian_pass(sum((c[p] * p.square()).sum() / 2 for p in c))
    for p in c:
        p.grad = torch.ones_like(p)
    opt.step()
    for p, d in c.items():
        want = d.abs().mean((2, 3), keepdim=True).expand_as(d) if p.ndim == 4 else d
        torch.testing.assert_close(opt.state[p]["exp_hessian_sq"], 0.001 * want**2)


# -- draws -----------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A small network with curvature across its layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up, self.down = nn.Linear(3, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def batch(step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(step)
    return torch.randn(size, 3, generator=made, dtype=torch.float64), torch.randint(0, 3, (size,), generator=made)


def loss_of(net: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    return F.cross_entropy(net(x), y)


def dense(net: nn.Module, step: int) -> Tensor:
    """The Hessian of a batch, in the order of the parameters."""
    named, (x, y) = dict(net.named_parameters()), batch(step)
    sizes = [p.numel() for p in named.values()]

    def value(flat: Tensor) -> Tensor:
        parts = [part.view_as(p) for part, p in zip(torch.split(flat, sizes), named.values())]
        return F.cross_entropy(torch.func.functional_call(net, dict(zip(named, parts)), (x,)), y)

    return torch.func.hessian(value)(torch.cat([p.detach().flatten() for p in named.values()]))


def probes(opt: Any) -> Tensor:
    """The probe of the next step, flat."""
    wanted = opt._engine.diagonal.wanted("hessian").values()
    return torch.cat([opt._engine.diagonal.probe(p, kind).flatten() for p, kind in wanted])


def seen(opt: Any) -> Tensor:
    """What the passes have told, flat."""
    diagonal = opt._engine.diagonal
    return torch.cat([diagonal.sums[p.name].flatten() for p, _ in diagonal.wanted("hessian", "labels").values()])


@pytest.mark.parametrize("groups", [1, 2])
def test_a_pass_is_the_probe_times_its_product(groups: int) -> None:
    net = Net()
    ps = list(net.named_parameters())
    split = [ps] if groups == 1 else [ps[:1], ps[1:]]
    opt = gd.AdaHessian([{"params": group} for group in split])
    z = probes(opt)
    assert set(z.tolist()) == {1.0, -1.0}
    h = dense(net, 0)
    opt.hessian_pass(loss_of(net, 0))
    torch.testing.assert_close(seen(opt), z * (h @ z), rtol=1e-10, atol=1e-12)
    opt._engine.diagonal.clear()
    for micro in range(2):  # micro-batches add up to the whole: the probe is the same
        x, y = (part.chunk(2)[micro] for part in batch(0))
        opt.hessian_pass(F.cross_entropy(net(x), y) / 2)
    torch.testing.assert_close(seen(opt), z * (h @ z), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
def test_the_mean_over_probes_is_the_diagonal(kind: str) -> None:
    net = Net()
    total, h = torch.zeros(31, dtype=torch.float64), dense(net, 0)
    for seed in range(1500):
        opt = gd.SophiaH(net, seed=seed, probe=kind)
        total += (z := probes(opt)) * (h @ z)
    error = (total / 1500 - h.diagonal()).norm() / h.diagonal().norm()
    assert float(error) < (0.1 if kind == "rademacher" else 0.15)


def test_probes_depend_on_seed_name_and_step_alone() -> None:
    def draw(seed: int = 0, step: int = 0, workspace_mb: float = 64, split: bool = False) -> Tensor:
        net = Net()
        named = list(net.named_parameters())
        groups = [{"params": named[:2]}, {"params": named[2:]}] if split else [{"params": named}]
        opt = gd.AdaHessian(groups, seed=seed, workspace_mb=workspace_mb)
        for group in opt.param_groups:
            group["steps"] = step
        return probes(opt)

    assert torch.equal(draw(), draw())
    assert torch.equal(draw(), draw(split=True, workspace_mb=1e-3))
    assert not torch.equal(draw(), draw(seed=1))
    assert not torch.equal(draw(), draw(step=1))
    flat = draw()
    assert not torch.equal(flat[:12], flat[16:28])  # two weights of 12 elements


def test_labels_are_drawn_and_counted() -> None:
    """By the same draw: the gradient of the mean loss at the labels that the generator gives."""
    net, (x, _) = Net(), batch(0)
    opt = gd.SophiaG(net, loss="cross_entropy")
    out = net(x)
    assert opt._engine.diagonal.labels == 8
    from guided_descent.parts.base import generator

    made = generator(0, "rank 0", 1, "labels 0", torch.device("cpu"))
    drawn = torch.multinomial(out.detach().softmax(-1), 1, generator=made).flatten()
    loss = F.cross_entropy(out, drawn)
    want = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    torch.testing.assert_close(seen(opt) / 8, torch.cat([g.flatten() for g in want]))
    loss.backward()
    opt.step()
    for p, g in zip(net.parameters(), want):
        torch.testing.assert_close(opt.state[p]["hessian"], 0.01 * g**2)
    assert float(opt.param_groups[0]["extra"]["labels"]) == 8


class Labelled(CrossEntropy):
    """Draws the labels it is told."""

    labels: Tensor

    def sample(self, out: Tensor, generator: torch.Generator) -> Tensor:
        return out.softmax(-1) - F.one_hot(type(self).labels, out.shape[-1])


def test_the_mean_over_all_labels_is_the_diagonal_of_gauss_newton() -> None:
    """Every labelling of two samples with three classes, by its probability: B E[g^2] = diag G."""
    net, (x, _) = Net(), batch(0, 2)
    ps = list(net.parameters())
    total = torch.zeros(31, dtype=torch.float64)
    p = net(x).detach().softmax(-1)
    for labels in itertools.product(range(3), repeat=2):
        opt = gd.SophiaG(net)
        Labelled.labels = torch.tensor(labels)
        opt.curvature_pass(net(x), Labelled())
        assert opt._engine.diagonal.labels == 2
        total += float(p[0, labels[0]] * p[1, labels[1]]) * 2 * (seen(opt) / 2) ** 2
    want = torch.zeros(31, dtype=torch.float64)
    out = net(x)
    for i in range(2):
        j = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(out[i, k], ps, retain_graph=True)])
                         for k in range(3)])  # fmt: skip
        want += (j.T @ (torch.diag(p[i]) - torch.outer(p[i], p[i])) @ j).diagonal() / 2
    torch.testing.assert_close(total, want)


def test_masked_labels_do_not_count_and_micro_batches_add_up() -> None:
    net, (x, y) = Net(), batch(0)
    opt = gd.SophiaG(net)
    mask = torch.arange(8) % 4 > 0
    Labelled.labels = y
    opt.curvature_pass(net(x), Masked(Labelled(), mask))
    whole, count = seen(opt), opt._engine.diagonal.labels
    assert count == 6
    opt._engine.diagonal.clear()
    for rows in (slice(0, 4), slice(4, 8)):
        Labelled.labels = y[rows]
        opt.curvature_pass(net(x[rows]), Masked(Labelled(), mask[rows]))
    torch.testing.assert_close(seen(opt), whole)
    assert opt._engine.diagonal.labels == 6


def test_more_labels_of_the_same_kind_make_the_same_step() -> None:
    """The number of labels is a factor on h: a batch twice over has the same expected h, and so the same clipping."""
    found = []
    for copies in (1, 4):
        net, (x, y) = Net(), batch(0)
        opt = gd.SophiaG(net, betas=(0.9, 0.0), gamma=1.0, eps=1e-12, lr=0.1)
        Labelled.labels = y.repeat(copies)
        opt.curvature_pass(net(x.repeat(copies, 1)), Labelled())
        loss_of(net, 0).backward()
        opt.step()
        h = torch.cat([opt.state[p]["hessian"].flatten() for p in net.parameters()])
        found.append(h * float(opt.param_groups[0]["extra"]["labels"]))
    torch.testing.assert_close(found[1], 4 * found[0])  # one draw of equal labels is four times as surprising


# -- ways to the curvature -------------------------------------------------------------------------------------------


def by_pass(opt: Any, net: nn.Module, step: int) -> None:
    opt.zero_grad()
    loss = loss_of(net, step)
    if opt.due("hessian"):
        opt.hessian_pass(loss)
    loss.backward()
    opt.step()


def by_graph(opt: Any, net: nn.Module, step: int) -> None:
    opt.zero_grad()
    loss_of(net, step).backward(create_graph=opt.due("hessian"))
    opt.step()
    assert not any(p.grad.requires_grad for p in net.parameters())  # no cycle is left


def by_closure(opt: Any, net: nn.Module, step: int) -> None:
    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_of(net, step)
        loss.backward(create_graph=opt.due("hessian"))
        return loss

    opt.step(closure)


def by_objective(opt: Any, net: nn.Module, step: int) -> None:
    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_of(net, step)
        loss.backward()
        return loss

    opt.step(Objective(loss=lambda: loss_of(net, step), closure=closure))


def by_outputs(opt: Any, net: nn.Module, step: int) -> None:
    x, y = batch(step)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_of(net, step)
        loss.backward()
        return loss

    opt.step(Objective(outputs=lambda: net(x), likelihood=Likelihood("cross_entropy", y), closure=closure))


def by_halves(opt: Any, net: nn.Module, step: int) -> None:
    opt.zero_grad()
    for micro in range(2):
        x, y = (part.chunk(2)[micro] for part in batch(step))
        loss = F.cross_entropy(net(x), y) / 2
        if opt.due("hessian"):
            opt.hessian_pass(loss)
        loss.backward()
    opt.step()


def by_scaler(opt: Any, net: nn.Module, step: int) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    opt.zero_grad()
    loss = loss_of(net, step)
    opt.hessian_pass(loss)  # does nothing where it is not due
    scaler.scale(loss).backward()
    scaler.step(opt)
    scaler.update()


WAYS = [by_pass, by_graph, by_closure, by_objective, by_outputs, by_halves, by_scaler]


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("name", ["adahessian", "sophia_h"])
@pytest.mark.parametrize("way", WAYS[1:])
def test_every_way_makes_the_same_steps(name: str, way: Callable[[Any, nn.Module, int], None]) -> None:
    nets = []
    for how in (by_pass, way):
        net = Net()
        opt = gd.optimizer(name, net, hessian_frequency=3, lr=0.01, gamma=1.0) if name == "sophia_h" else None
        opt = opt or gd.AdaHessian(net, hessian_frequency=3, lr=0.01)
        for step in range(8):
            how(opt, net, step)
        nets.append(net)
    for p, q in zip(nets[0].parameters(), nets[1].parameters()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_outputs_of_an_objective_draw_the_labels_of_sophia_g() -> None:
    nets = []
    for how in ("objective", "pass", "model"):
        net = Net()
        opt = gd.SophiaG(net, hessian_frequency=3, **({"loss": "cross_entropy"} if how == "model" else {}))
        for step in range(8):
            if how == "objective":
                by_outputs(opt, net, step)
                continue
            opt.zero_grad()
            x, y = batch(step)
            out = net(x)
            if how == "pass":
                opt.curvature_pass(out, "cross_entropy")
            F.cross_entropy(out, y).backward()
            opt.step()
        nets.append(net)
    for other in nets[1:]:
        assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), other.parameters()))


def test_evaluation_draws_nothing_and_a_compiled_model_is_read() -> None:
    net, (x, y) = Net(), batch(0)
    opt = gd.SophiaG(net, loss="cross_entropy")
    with torch.no_grad():
        net(x)
    assert opt._engine.diagonal.labels == 0
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager")
    for step in range(12):
        x, y = batch(step)
        opt.zero_grad()
        F.cross_entropy(compiled(x), y).backward()
        assert opt._engine.diagonal.labels == (8 if step in (0, 10) else 0)
        opt.step()
    assert opt.steps == 12


def test_some_parameters_alone() -> None:
    net = Net()
    opt = gd.AdaHessian(net, rules=[gd.rule("down.*", recipe="adamw")])
    assert [p.name for p, _ in opt._engine.diagonal.wanted("hessian").values()] == ["up.weight", "up.bias"]
    h, z = dense(net, 0)[:16, :16], probes(opt)
    opt.hessian_pass(loss_of(net, 0))
    torch.testing.assert_close(seen(opt), z * (h @ z), rtol=1e-10, atol=1e-12)


def test_a_parameter_without_curvature_counts_as_flat() -> None:
    p, q = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in "ab")
    opt = gd.SophiaH([p, q], lr=0.1, weight_decay=0.0)
    loss = p.square().sum() + q.sum()  # linear in q
    opt.hessian_pass(loss)
    loss.backward()
    opt.step()
    assert not opt.state[q]["hessian"].any()
    torch.testing.assert_close(q.detach(), torch.full_like(q, 0.9))


def test_attention_in_its_plain_form() -> None:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(4, 12)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.q(x).chunk(3, -1)
            return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])

    net, x = Attend(), torch.randn(2, 5, 4)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        return loss

    opt = gd.AdaHessian(net)
    opt.step(Objective(loss=lambda: net(x).square().mean(), closure=closure))
    assert opt.steps == 1
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        loss = net(x).square().mean()
    with pytest.raises(RuntimeError, match=r"no second derivative.*sdpa_kernel\(SDPBackend\.MATH\)"):
        opt.hessian_pass(loss)


# -- errors ----------------------------------------------------------------------------------------------------------


def unchanged(opt: Any, net: nn.Module, act: Callable[[], object], error: type[Exception], match: str) -> None:
    before = [p.detach().clone() for p in net.parameters()]
    state = copy.deepcopy(opt.state_dict())
    with pytest.raises(error, match=match):
        act()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before))
    now = opt.state_dict()
    for number, values in state["state"].items():
        assert all(torch.equal(v, now["state"][number][name]) for name, v in values.items())
    assert opt.steps == state["param_groups"][0]["steps"]


def test_a_missing_pass_is_an_error_before_anything_changes() -> None:
    net = Net()
    for name in ("adahessian", "sophia_h"):
        opt = gd.optimizer(name, net)
        loss_of(net, 0).backward()
        unchanged(opt, net, opt.step, ValueError, r"needs the product of the Hessian.*hessian_pass\(loss\).*Objective")
        unchanged(opt, net, lambda o=opt: o.step(lambda: None), ValueError, "needs the product")
    opt = gd.SophiaG(net)
    unchanged(opt, net, opt.step, ValueError, r"labels drawn from the model.*loss='cross_entropy'.*curvature_pass")
    opt = gd.SophiaG(net, loss="cross_entropy", hessian_frequency=2)
    net(batch(0)[0])
    opt.step()
    opt.step()  # not due
    unchanged(opt, net, opt.step, ValueError, "labels drawn from the model")
    other, twin = copy.deepcopy((net, opt))
    loss_of(other, 0).backward()
    unchanged(twin, other, twin.step, ValueError, r"optimizer\.watch\(model, loss=")
    twin.watch(other, loss="cross_entropy")
    other(batch(0)[0])
    twin.step()
    assert twin.steps == 3


def test_wrong_passes() -> None:
    net, x = Net(), batch(0)[0]
    opt = gd.AdaHessian(net)
    loss = loss_of(net, 0)
    for wrong, what in (
        (net(x), r"a tensor of shape \[8, 3\]"),
        (3.0, "a float"),
        (loss.detach(), "a tensor"),
    ):
        with pytest.raises(TypeError, match=f"hessian_pass got {what}"):
            opt.hessian_pass(wrong)
    loss.backward()
    with pytest.raises(RuntimeError, match=r"no second derivative.*before backward"):
        opt.hessian_pass(loss)
    with pytest.raises(RuntimeError, match="no recipe of this optimizer reads the Hessian"):
        gd.AdamW(net).hessian_pass(loss_of(net, 0))
    with pytest.raises(RuntimeError, match="reads layers or samples labels"):
        opt.curvature_pass(net(x), "cross_entropy")
    with pytest.raises(ValueError, match=r"due\('labels'\): choose one of 'curvature', 'hessian'"):
        opt.due("labels")
    opt = gd.SophiaG(net)
    with pytest.raises(ValueError, match="no loss is known"):
        opt.curvature_pass(net(x))
    opt = gd.SophiaG(net, loss="cross_entropy")
    out = net(x)
    opt.curvature_pass(out)  # has been drawn in the forward pass
    assert opt._engine.diagonal.labels == 8
    with pytest.raises(ValueError, match="draw from the loss given at build"):
        opt.curvature_pass(out, "mse")
    with pytest.raises(TypeError, match="no method 'terms'"):
        gd.SophiaG(net, loss=F.cross_entropy)
    with pytest.raises(ValueError, match="adahessian does not"):
        gd.AdaHessian(net, loss="cross_entropy")
    for power in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"hessian_power=.* must be >= 0 and <= 1"):
            gd.AdaHessian(net, hessian_power=power)


@pytest.mark.parametrize("name", ["adahessian", "sophia_h", "sophia_g"])
def test_curvature_that_is_not_finite_skips_the_step(name: str) -> None:
    net, clean = Net(), Net()
    opt, other = gd.optimizer(name, net), gd.optimizer(name, clean)

    def bad(opt: Any, net: nn.Module) -> None:
        loss_of(net, 0).backward()
        root = (net.up.weight - net.up.weight.detach()).square().sum().sqrt()  # a gradient of 0 / 0
        if name == "sophia_g":
            opt.curvature_pass(root.reshape(1, 1) * 0, Given())
        else:
            opt.hessian_pass(loss_of(net, 0) + root)
        opt.step()

    before = [p.detach().clone() for p in net.parameters()]
    bad(opt, net)
    assert (opt.steps, opt.skipped) == (0, 1)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before))
    for each, model in ((opt, net), (other, clean)):
        each.zero_grad()
        if name == "sophia_g":
            by_outputs(each, model, 0)
        else:
            by_pass(each, model, 0)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), clean.parameters()))
    opt = gd.optimizer(name, net, nonfinite="raise")
    with pytest.raises(gd.NonFiniteError, match=r"non-finite gradient or curvature in up\.weight at step 1"):
        bad(opt, net)


# -- the run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adahessian", {"hessian_frequency": 2}),
        ("sophia_h", {"hessian_frequency": 3, "gamma": 10.0}),
        ("sophia_h", {"hessian_frequency": 3, "gamma": 10.0, "probe": "rademacher"}),
        ("sophia_g", {"hessian_frequency": 3, "gamma": 10.0, "loss": "cross_entropy"}),
    ],
)
def test_a_run_that_is_resumed_equals_one_that_is_not(name: str, options: dict[str, Any]) -> None:
    net, opt = (net := Net()), gd.optimizer(name, net, seed=5, **options)
    for step in range(5):
        by_pass(opt, net, step)
    other = Net()
    other.load_state_dict(net.state_dict())
    resumed = gd.optimizer(name, other, seed=5, **options)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for step in range(5, 14):
        by_pass(opt, net, step)
        by_pass(resumed, other, step)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters()))
    moved = Net()
    seeded = gd.optimizer(name, moved, seed=6, **options)
    for step in range(14):
        by_pass(seeded, moved, step)
    assert not all(torch.equal(p, q) for p, q in zip(net.parameters(), moved.parameters()))


@pytest.mark.parametrize("name", ["adahessian", "sophia_h", "sophia_g"])
def test_training_with_its_own_curvature(name: str) -> None:
    net = Net()
    more = {"loss": "cross_entropy"} if name == "sophia_g" else {}
    lr = {"adahessian": 0.05}.get(name, 0.01)
    opt = gd.optimizer(name, net, lr=lr, weight_decay=0.0, **more)
    first = loss_of(net, 0).item()
    for _ in range(150):
        by_pass(opt, net, 0)
    assert loss_of(net, 0).item() < 0.5 * first


def test_the_clipped_elements_are_counted() -> None:
    p = nn.Parameter(torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    opt = gd.SophiaH([("p", p)], lr=0.0, gamma=1.0, betas=(0.0, 0.0), probe="rademacher", hessian_frequency=2)
    for _ in range(3):
        opt.hessian_pass((torch.tensor([0.5, 1.5, 4.0, -1.0]) * p.square()).sum() / 2)
        p.grad = torch.ones_like(p)  # quotients of 2, 2/3, 1/4 and a negative curvature
        opt.step()
    assert opt.audit()["p"] == {"clipped": 4, "measured": 8}  # in the steps 1 and 3


def test_maximising_turns_the_curvature_round() -> None:
    p = nn.Parameter(torch.ones(2, dtype=torch.float64))
    opt = gd.SophiaH([p], maximize=True, probe="rademacher")
    loss = -p.square().sum()  # concave: what is minimised is convex
    opt.hessian_pass(loss)
    loss.backward()
    opt.step()
    torch.testing.assert_close(opt.state[p]["hessian"], torch.full_like(p, 0.01 * 2))


def test_groups_share_the_number_of_labels() -> None:
    net = Net()
    named = list(net.named_parameters())
    opt = gd.SophiaG([{"params": named[:2]}, {"params": named[2:], "gamma": 0.1}])
    opt.curvature_pass(net(batch(0)[0]), "cross_entropy")
    loss_of(net, 0).backward()
    opt.step()
    assert opt.param_groups[0]["extra"]["labels"] is opt.param_groups[1]["extra"]["labels"]
    assert float(opt.param_groups[1]["extra"]["labels"]) == 8

"""Parts that read layers get raw sums of the right rows, once for each step that asks, whatever the loop looks like."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import guided_descent as gd
from guided_descent.capture import LOSSES, LayerIO
from guided_descent.parts import Batch, Decoupled, Descend, Hyper, Needs, Part, Parts, Slot, State
from guided_descent.parts.base import Unit
from guided_descent.recipes import AdamW, Recipe, hyper, static
from guided_descent.routing import Block
from ranks import leave


@dataclass(frozen=True)
class Moments(Part):
    """Keeps the last means of a a^T and d d^T and leaves the direction alone."""

    slot: ClassVar[str] = "geometry"
    unit: ClassVar[Unit] = "matrix"
    needs: ClassVar[Needs] = Needs(layer_io=True)

    @property
    def keys(self) -> tuple[str, ...]:
        return ("every", "fisher")

    def slots(self, block: Block) -> dict[str, Slot]:
        m, n = block.shape
        return {"inner": Slot("factor", (n,) if block.role == "embedding" else (n, n)), "outer": Slot("factor", (m, m))}

    def observes(self, h: Hyper, step: int) -> bool:
        return (step - 1) % h["every"] == 0

    def observe(self, seen: dict[str, Tensor], io: LayerIO, s: State, block: Block, h: Hyper) -> None:
        for name, (total, count) in {"A": io.gram_inputs(), "B": io.gram_gradients()}.items():
            seen[name] = seen.get(name, 0) + total
            seen[f"{name}_count"] = seen.get(f"{name}_count", 0) + torch.tensor(float(count))

    def update(self, x: Batch, s: State, h: Hyper, total: Mapping[str, Tensor]) -> None:
        if x.seen is None:
            return
        scale = x.seen["count"] ** 2 if h["fisher"] == "empirical" else 1.0
        s["inner"].copy_(x.seen["A"] / x.seen["A_count"].view(-1, 1, 1))
        s["outer"].copy_((x.seen["B"] / x.seen["B_count"].view(-1, 1, 1)).mul_(torch.as_tensor(scale).view(-1, 1, 1)))


@dataclass(frozen=True, kw_only=True)
class Watcher(Recipe):
    """SGD that watches."""

    matrix = True
    reads_layers = True
    joins_bias = True

    lr: float = hyper(0.1, ge=0)
    weight_decay: float = hyper(0.0, ge=0)
    every: int = hyper(1, ge=1)
    fisher: str = static("empirical")
    aux: Recipe = field(default_factory=lambda: AdamW(lr=0.0))

    def route(self, block: Block) -> Recipe:
        return self if block.is_matrix or block.role == "head" else self.aux

    def parts(self, block: Block) -> Parts:
        return Parts(Moments(), Decoupled(), Descend())


def net(**kwargs: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 4, bias=False), nn.Linear(4, 2)).to(
        torch.float64
    )


def data(n: int = 12) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, generator=made, dtype=torch.float64), torch.randint(0, 2, (n,), generator=made)


def dense(model: nn.Sequential, x: Tensor, y: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every linear layer from the per-sample losses, sample by sample."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for xi, yi in zip(x, y):
        values: dict[str, tuple[Tensor, Tensor]] = {}
        h = xi
        for i, layer in enumerate(model):
            before, h = h, layer(h)
            if isinstance(layer, nn.Linear):
                values[str(i)] = (before, h)
        loss = F.cross_entropy(h, yi)
        for name, (a, out) in values.items():
            [d] = torch.autograd.grad(loss, out, retain_graph=True)
            a = a.detach()
            if model[int(name)].bias is not None:
                a = torch.cat([a, a.new_ones(1)])
            A, B = found.get(name, (0.0, 0.0))
            found[name] = (A + torch.outer(a, a) / len(x), B + torch.outer(d, d) / len(x))
    return found


def check(opt: Any, model: nn.Sequential, expected: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    for name, (A, B) in expected.items():
        state = opt.state[model[int(name)].weight]
        torch.testing.assert_close(state["inner"], A, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(state["outer"], B, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("parts", [1, 4])
def test_sums_of_a_step_and_of_accumulated_micro_batches(parts: int) -> None:
    model, (x, y) = net(), data()
    opt = gd.build(model, Watcher())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = dense(model, x, y)
    for xi, yi in zip(x.chunk(parts), y.chunk(parts)):
        (F.cross_entropy(model(xi), yi) / parts).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    opt.step()
    check(opt, model, expected)
    for name, p in model.named_parameters():  # weight and bias of a joint block both take the plain step
        moved = 0.0 if name.startswith("2.") else 0.1
        torch.testing.assert_close(p.detach(), before[name] - moved * grads[name])


def test_a_weight_and_its_bias_are_one_block_and_only_the_weight_decays() -> None:
    model, (_x, _y) = net(), data()
    opt = gd.build(model, Watcher(lr=0.5, weight_decay=0.1))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    assert [float(model[i].weight[0, 0].detach()) for i in (0, 3)] == pytest.approx([0.95, 0.95])
    assert bool((model[0].bias == 1).all())
    assert bool((model[4].bias == 1).all())
    lines = {line.parameter: line for line in gd.explain(opt).lines}
    assert lines["0.weight"].view == (5, 4)
    assert "0.bias" in lines["0.weight"].aliases
    assert "0.bias" not in lines
    assert gd.explain(opt).state_bytes == opt.state_bytes()
    assert sum(line.state_bytes for line in lines.values()) == opt.state_bytes()


def test_due_steps_and_nothing_between() -> None:
    model, (x, y) = net(), data()
    opt = gd.build(model, Watcher(every=3))
    due: list[bool] = []
    expected: dict[str, tuple[Tensor, Tensor]] = {}
    for _ in range(7):
        opt.zero_grad()
        due.append(opt.due("curvature"))
        if due[-1]:
            expected = dense(model, x, y)
        F.cross_entropy(model(x), y).backward()
        opt.step()
        check(opt, model, expected)
    assert due == [True, False, False, True, False, False, True]
    with pytest.raises(ValueError, match="choose one of 'curvature'"):
        opt.due("loss")


def test_a_skipped_step_forgets_what_it_saw() -> None:
    model, (x, y) = net(), data()
    opt = gd.build(model, Watcher())
    F.cross_entropy(model(x), y).backward()
    model[0].weight.grad[0, 0] = float("nan")
    opt.step()
    assert opt.skipped == 1
    assert not any(opt.state[p]["inner"].any() for p in (model[0].weight, model[4].weight))
    opt.zero_grad()
    expected = dense(model, x, y)
    F.cross_entropy(model(x), y).backward()
    opt.step()
    check(opt, model, expected)


class Attention(nn.Module):
    """A fused projection and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 4)
        self.qkv = nn.Linear(4, 12)
        self.out = nn.Linear(4, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(self.embed(tokens)).chunk(3, -1)
        return self.out(torch.softmax(q @ k.mT / 2, -1) @ v)


def test_blocks_of_a_fused_layer_see_their_rows() -> None:
    model = Attention().double()
    opt = gd.build(model, Watcher(), rules=[gd.rule("qkv.weight", split=3)])
    tokens = torch.randint(0, 7, (3, 5), generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    out = model.qkv.register_forward_hook(lambda module, args, y: y.register_hook(seen.append) and None)
    inputs = torch.cat([model.embed(tokens).detach(), torch.ones(3, 5, 1).double()], -1).flatten(0, 1)
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    out.remove()
    opt.step()
    state = opt.state[model.qkv.weight]
    d = seen[0].flatten(0, 1) * 15
    names = [key.removesuffix(".outer") for key in state if key.endswith(".outer")]
    for i, part in enumerate(names):
        rows = d[:, 4 * i : 4 * i + 4]
        torch.testing.assert_close(state[f"{part}.outer"], rows.T @ rows / 15)
        torch.testing.assert_close(state[f"{part}.inner"], inputs.T @ inputs / 15)
    assert "qkv.bias" in {name for line in gd.explain(opt).lines for name in line.aliases}
    assert len(names) == 3


def test_what_cannot_be_read_goes_to_the_auxiliary_recipe_and_says_why() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 4)
            self.grouped = nn.Conv1d(4, 4, 3, groups=2, padding=1)
            self.back = nn.ConvTranspose1d(4, 4, 3, padding=1)
            self.attention = nn.MultiheadAttention(4, 2)
            self.last = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.back(self.grouped(self.first(x))))

    opt = gd.build(Odd(), Watcher())
    lines = {line.parameter: line for line in gd.explain(opt).lines}
    assert lines["first.weight"].recipe == "Watcher"
    assert (lines["grouped.weight"].recipe, lines["grouped.weight"].view) == ("Watcher", (4, 7))
    assert lines["back.weight"].recipe == "adamw"
    assert "ConvTranspose1d is not one of the exact types" in lines["back.weight"].why
    fused = [line for name, line in lines.items() if name.startswith("attention.in_proj_weight")]
    assert fused
    assert all("not preconditioned" in line.why for line in fused)


def test_a_list_of_parameters_is_refused() -> None:
    with pytest.raises(TypeError, match="pass the model itself"):
        gd.build(list(net().parameters()), Watcher())
    opt = gd.build(net(), Watcher())
    with pytest.raises(TypeError, match="pass the model itself"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(3, 3))]})
    with pytest.raises(ValueError, match="recipes that read layers"):
        gd.AdamW(net(), loss="mse")


def test_a_copy_watches_again_when_it_is_told_to() -> None:
    model, (x, y) = net(), data()
    opt = gd.build(model, Watcher())
    F.cross_entropy(model(x), y).backward()
    opt.step()
    twin_model, twin = copy.deepcopy((model, opt))
    twin_model.zero_grad()
    F.cross_entropy(twin_model(x), y).backward()
    with pytest.raises(RuntimeError, match=r"call optimizer\.watch"):
        twin.step()
    twin.watch(twin_model)
    opt.zero_grad()
    for each, its in ((model, opt), (twin_model, twin)):
        each.zero_grad()
        F.cross_entropy(each(x), y).backward()
        its.step()
    for a, b in zip(model.parameters(), twin_model.parameters()):
        assert torch.equal(a, b)
    check(twin, twin_model, {name: tuple(opt.state[model[int(name)].weight][k] for k in ("inner", "outer"))
                             for name in ("0", "3", "4")})  # fmt: skip


def test_sampled_labels_by_themselves_and_by_hand() -> None:
    model, (x, y) = net(), data(400)
    states = []
    for by_hand in (False, True):
        opt = gd.build(model, Watcher(fisher="mc", lr=0.0), loss=None if by_hand else "cross_entropy")
        model.zero_grad()
        out = model(x)
        if by_hand:
            opt.curvature_pass(out, "cross_entropy")
        assert all(p.grad is None for p in model.parameters())
        F.cross_entropy(out, y).backward()
        opt.step()
        states.append(opt.state[model[4].weight]["outer"].clone())
    assert torch.equal(*states)
    p = torch.softmax(model(x), -1).detach()
    exact = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)).mean(0)
    torch.testing.assert_close(states[0], exact, rtol=0.2, atol=0.02)
    with pytest.raises(RuntimeError, match="no recipe"):
        gd.AdamW(net()).curvature_pass(out)


def _rank(rank: int, world: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.set_num_threads(1)
    model, (x, y) = net(), data()
    ddp = nn.parallel.DistributedDataParallel(model)
    opt = gd.build(ddp, Watcher())
    expected = dense(model, x, y)
    mine = slice(6 * rank, 6 * rank + 6)
    with ddp.no_sync():
        (F.cross_entropy(ddp(x[mine][:3]), y[mine][:3]) / 2).backward()
    (F.cross_entropy(ddp(x[mine][3:]), y[mine][3:]) / 2).backward()
    opt.step()
    check(opt, model, expected)
    leave()


def test_ranks_of_a_distributed_model_add_their_sums(tmp_path: Any) -> None:
    torch.multiprocessing.spawn(_rank, args=(2, str(tmp_path)), nprocs=2)


class Direct(nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.around = nn.Linear(4, 4, bias=False)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) @ self.around.weight.T)


def test_a_layer_that_is_not_called_is_an_error_before_anything_changes() -> None:
    model, (x, y) = Direct().double(), data()
    opt = gd.build(model, Watcher())
    F.cross_entropy(model(x), y).backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"'around.weight' has a gradient, but its layer 'around' was not called"):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    opt = gd.build(model, Watcher(), rules=[gd.rule("around.weight", recipe="adamw")])
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    opt.step()


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_a_loss_that_cannot_be_used_is_an_error_at_the_build(fisher: str) -> None:
    with pytest.raises(ValueError, match="loss='cross_entropie' is unknown"):
        gd.build(net(), Watcher(fisher=fisher), loss="cross_entropie")
    for wrong in (F.cross_entropy, nn.CrossEntropyLoss(), nn.CrossEntropyLoss, LOSSES["mse"].terms):
        with pytest.raises(TypeError, match=r"has no method 'terms'.*one of 'cross_entropy'"):
            gd.build(net(), Watcher(fisher=fisher), loss=wrong)
    opt = gd.build(net(), Watcher(fisher=fisher), loss=LOSSES["cross_entropy"])
    with pytest.raises(ValueError, match="is unknown"):
        opt.watch(net(), loss="cross_entropie")
    with pytest.raises(TypeError, match="has no method"):
        opt.watch(net(), loss=F.mse_loss)


@pytest.mark.parametrize(("fisher", "method"), [("mc", "sample"), ("exact", "sqrt_hessian")])
def test_a_loss_of_the_users_own_needs_what_fisher_asks(fisher: str, method: str) -> None:
    class Half:
        def terms(self, out: Tensor) -> int:
            return len(out)

    with pytest.raises(TypeError, match=f"loss=Half has no method '{method}', which fisher='{fisher}' needs"):
        gd.build(net(), Watcher(fisher=fisher), loss=Half())
    gd.build(net(), Watcher(), loss=Half())


def test_a_watch_that_fails_leaves_the_last_one_in_place() -> None:
    model, (x, y) = net(), data()
    opt = gd.build(model, Watcher())
    with pytest.raises(TypeError, match="has no method"):
        opt.watch(model, loss=F.cross_entropy)
    with pytest.raises(ValueError, match="is unknown"):
        opt.watch(model, loss="cross_entropie")
    expected = dense(model, x, y)
    F.cross_entropy(model(x), y).backward()
    opt.step()
    check(opt, model, expected)


def test_sampled_labels_of_no_loss_are_an_error_at_the_step() -> None:
    model, (x, y) = net(), data()
    opt = gd.build(model, Watcher(fisher="mc"))
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="must know the loss"):
        opt.step()

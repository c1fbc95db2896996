"""CLARS against the gradients of single samples taken one by one, and beside LARS."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import guided_descent as gd


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Net(nn.Module):
    """A convolution, a layer that is called twice, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.mix = nn.Linear(12, 12)
        self.head = nn.Linear(12, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y = F.avg_pool2d(torch.tanh(self.conv(x)), 2).flatten(1)
        return self.head(torch.tanh(self.mix(torch.tanh(self.mix(y)))))


class Words(nn.Module):
    """Positions share every weight; the head has the embedding's table."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(x))))


def images(t: int) -> tuple[Tensor, Tensor]:
    return rand(6, 2, 4, 4, seed=t), torch.arange(6) % 4


def sentences(t: int) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(t)
    return torch.randint(0, 7, (5, 4), generator=made), torch.randint(0, 7, (5, 4), generator=made)


def loss_of(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net(x).flatten(0, -2) if y.ndim > 1 else net(x), y.flatten())


def sample_norms(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """The mean over samples of the norm of each parameter's gradient of that sample's own mean loss."""
    total: dict[str, float] = {name: 0.0 for name, _ in net.named_parameters()}
    for i in range(len(x)):
        loss = loss_of(net, x[i : i + 1], y[i : i + 1])
        grads = torch.autograd.grad(loss, list(net.parameters()))
        for (name, _), g in zip(net.named_parameters(), grads):
            total[name] += float(g.norm()) / len(x)
    return total


ETA, MU, WD, LR = 0.02, 0.9, 0.01, 0.5


def reference(net: nn.Module, batches: list[tuple[Tensor, Tensor]], nesterov: bool) -> None:
    """The rule, one tensor at a time: matrices by their samples' norms, vectors at the rate itself."""
    buffers: dict[str, Tensor] = {}
    for x, y in batches:
        norms = sample_norms(net, x, y)
        grads = torch.autograd.grad(loss_of(net, x, y), list(net.parameters()))
        for (name, p), g in zip(net.named_parameters(), grads):
            if p.ndim > 1:
                lam = ETA * float(p.detach().norm()) / (norms[name] + WD * float(p.detach().norm()))
                u = lam * (g + WD * p.detach())
            else:
                u = g
            b = buffers[name] = MU * buffers[name] + u if name in buffers else u
            p.data -= LR * (u + MU * b if nesterov else b)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("kind", ["images", "sentences"])
def test_it_takes_the_steps_of_the_rule(kind: str, nesterov: bool) -> None:
    make = Net if kind == "images" else lambda: Words(tied=False)
    data = images if kind == "images" else sentences
    batches = [data(t) for t in range(35)]
    expected, net = make(), make()
    reference(expected, batches, nesterov)
    numbers = {"lr": LR, "momentum": MU, "trust_coefficient": ETA, "nesterov": nesterov}
    opt = gd.CLARS(net, weight_decay=WD, aux=gd.recipes.LARS(**numbers), **numbers)
    for x, y in batches:
        opt.zero_grad()
        loss_of(net, x, y).backward()
        opt.step()
    for p, q in zip(net.parameters(), expected.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


def one_step(net: nn.Module, x: Tensor, y: Tensor, parts: int = 1, **options: Any) -> Any:
    opt = gd.CLARS(net, **options)
    for a, b in zip(x.chunk(parts), y.chunk(parts)):
        (loss_of(net, a, b) / parts).backward()
    opt.step()
    return opt


def test_micro_batches_add_up_to_the_batch() -> None:
    x, y = images(1)
    one, two = Net(), Net()
    a, b = one_step(one, x, y), one_step(two, x, y, parts=3)
    for p, q in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(p, q)
    expected = sample_norms(Net(), x, y)
    for opt in (a, b):
        state = {
            name: s for g in opt.param_groups for name, s in zip(g["param_names"], map(opt.state.get, g["params"]))
        }
        for name in ("conv.weight", "mix.weight", "head.weight"):
            torch.testing.assert_close(float(state[name]["sample_norm"]), expected[name], rtol=1e-10, atol=0)


def test_equal_samples_make_it_lars_and_others_a_shorter_step() -> None:
    x, y = images(2)
    for same in (True, False):
        if same:
            x, y = x[:1].expand(6, -1, -1, -1), y[:1].expand(6)
        else:
            x, y = images(2)
        ours, theirs, start = Net(), Net(), Net()
        one_step(ours, x, y, momentum=0.0, trust_coefficient=0.01)
        other = gd.LARS(theirs, momentum=0.0, trust_coefficient=0.01)
        loss_of(theirs, x, y).backward()
        other.step()
        for name in ("conv.weight", "mix.weight", "head.weight"):
            p, q, r = (net.get_parameter(name).detach() for net in (ours, theirs, start))
            if same:
                torch.testing.assert_close(p, q)
            else:
                torch.testing.assert_close((p - r) / (p - r).norm(), (q - r) / (q - r).norm())
                assert float((p - r).norm()) < 0.99 * float((q - r).norm())


def test_a_tied_table_has_the_norms_of_both_uses() -> None:
    x, y = sentences(3)
    net = Words(tied=True)
    apart = Words(tied=False)
    apart.embed.weight.data.copy_(net.embed.weight)
    apart.head.weight.data.copy_(net.embed.weight)
    for name, p in apart.mix.named_parameters():
        p.data.copy_(net.mix.get_parameter(name))
    norms = sample_norms(apart, x, y)
    opt = one_step(net, x, y)
    found = float(opt.state[net.embed.weight]["sample_norm"])
    assert found == pytest.approx(norms["embed.weight"] + norms["head.weight"], rel=1e-10)
    assert found >= sample_norms(Words(tied=True), x, y)["embed.weight"]


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match="nesterov=True of clars needs momentum > 0"):
        gd.recipes.CLARS(nesterov=True, momentum=0.0)
    with pytest.raises(TypeError, match="pass the model itself"):
        gd.CLARS(list(Net().parameters()))


def test_samples_are_looked_at_as_often_as_asked() -> None:
    net = Net()
    opt = gd.CLARS(net, factor_frequency=3)
    kept = []
    for t in range(7):
        opt.zero_grad()
        loss_of(net, *images(t)).backward()
        opt.step()
        kept.append(float(opt.state[net.mix.weight]["sample_norm"]))
    assert [kept[t] != kept[t - 1] for t in range(1, 7)] == [False, False, True, False, False, True]
    assert opt.audit()["mix.weight"]["captures"] == 3

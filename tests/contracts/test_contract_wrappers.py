"""Frameworks' wrappers: what is called through them must reach the real optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drive import Net, assert_same, drive, evaluations, loss_of, make, snapshot, take


class Lightning:
    """A dynamic subclass of the optimizer's class with a copy of its dictionary, as Lightning makes one."""

    def __init__(self, optimizer: Any) -> None:
        cls = type(optimizer)
        self.__dict__ = {name: value for name, value in optimizer.__dict__.items() if name != "step"}
        self.__class__ = type("Lightning" + cls.__name__, (Lightning, cls), {})
        self._real = optimizer

    def step(self, closure: Any = None) -> Any:
        return self._real.step(closure)


class Accelerated(torch.optim.Optimizer):
    """A wrapper that forwards, and reloads the state once at construction, as Accelerate does."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        optimizer.load_state_dict(optimizer.state_dict())

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)
    defaults = property(lambda self: self.optimizer.defaults)

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> Any:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.optimizer.load_state_dict(state_dict)

    def train(self) -> None:
        self.optimizer.train()

    def eval(self) -> None:
        self.optimizer.eval()


@pytest.mark.parametrize("wrap", [Lightning, Accelerated])
def test_a_wrapper_drives_the_real_optimizer(key: str, wrap: Any) -> None:
    net, other = Net(), Net()
    opt, plain = make(key, net), make(key, other)
    wrapped = wrap(opt)
    assert isinstance(wrapped, torch.optim.Optimizer)
    passes = evaluations(opt)
    for number in range(4):
        take(wrapped, lambda n=number: (wrapped.zero_grad(), loss_of(net, n).backward())[1], passes)
    drive(plain, other, 4)
    assert_same(snapshot(opt, net), snapshot(plain, other))

    saved = wrapped.state_dict()
    assert saved["param_groups"][0]["steps"] == 4
    drive(plain, other, 2, first=4)
    wrapped.load_state_dict(plain.state_dict())
    assert opt.steps == 6

    wrapped.eval()
    assert {group["mode"] for group in opt.param_groups} == {"eval"}
    with pytest.raises(RuntimeError, match="evaluation mode"):
        opt.step(lambda: loss_of(net, 0).backward())
    wrapped.train()
    assert {group["mode"] for group in opt.param_groups} == {"train"}
    opt.step(lambda: loss_of(net, 0).backward())

    scheduler = torch.optim.lr_scheduler.LambdaLR(wrapped, lambda step: 0.5**step)
    rate = float(opt.param_groups[0]["lr"])
    scheduler.step()
    assert float(opt.param_groups[0]["lr"]) == pytest.approx(rate / 2)


def test_the_class_is_a_torch_optimizer_with_a_signature(key: str) -> None:
    import inspect

    opt = make(key, Net())
    assert isinstance(opt, torch.optim.Optimizer)
    names = list(inspect.signature(type(opt)).parameters)
    assert names[0] == "params"
    assert set(type(opt).recipe_class.numbers()) < set(names)  # type: ignore[union-attr]
    assert {"lr", "params"} <= set(opt.param_groups[0])
    assert key in repr(opt)


def test_a_note_by_a_wrapped_name_is_that_of_the_module(key: str) -> None:
    opt = make(key, Net())
    opt.note("max_logits", {"module.mix": torch.tensor([1.0, 5.0])})
    opt.note("max_logits", {"mix": torch.tensor([2.0, 3.0])})
    assert opt._engine.notes["max_logits"].keys() == {"mix"}
    assert opt._engine.notes["max_logits"]["mix"].tolist() == [2.0, 5.0]

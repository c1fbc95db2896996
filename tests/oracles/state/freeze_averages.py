"""Write the frozen averages and schedules: once for each format, and never again.

    python tests/oracles/state/freeze_averages.py

The file holds, for each average, its state after some steps and what it is after more of them; and the state of
schedules in the middle of a run, with the numbers that follow.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from guided_descent import averaging, schedules
from guided_descent.averaging import ramps

PATH = Path(__file__).parent / "averages-1.pt"

AVERAGES = {
    "ema": lambda model: averaging.EMA(model, half_life=5),
    "ramp": lambda model: averaging.EMA(model, decay=0.99, ramp=ramps.share(0.1)),
    "polynomial": lambda model: averaging.PolynomialAverage(model, gamma=3, buffers=True),
    "power": lambda model: averaging.PowerEMA(model, sigma=0.1, start=2),
    "swa": lambda model: averaging.SWA(model, every=3, dtype=torch.float64),
    "lawa": lambda model: averaging.LAWA(model, window=3, every=2, buffers=True),
    "posthoc": lambda model: averaging.PostHocEMA(model, every=4),
}
TOKENS = schedules.Tokens(6000, per_step={0: 100, 20: 200})
SCHEDULES = {
    "wsd": lambda opt: schedules.wsd(opt, 40, warmup=5, cooldown=10),
    "tokens": lambda opt: schedules.cosine(opt, TOKENS, warmup=500, floor=0.1),
    "one_cycle": lambda opt: schedules.one_cycle(opt, 40),
    "betas": lambda opt: schedules.Schedule(opt, schedules.curves.linear(40), key="betas", index=1),
}


def net() -> nn.Module:
    """A model with running statistics."""
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def place(model: nn.Module, step: int) -> None:
    """Put weights and buffers where they are at a step."""
    made = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for tensor in (*model.parameters(), model[1].running_mean, model[1].running_var):
            tensor.copy_(torch.rand(tensor.shape, generator=made))


def shown(average: object, model: nn.Module) -> dict[str, torch.Tensor]:
    """What it would evaluate."""
    if isinstance(average, averaging.PostHocEMA):
        return dict(average.synthesize(sigma=0.12).weights)
    return {name: tensor.clone() for name, tensor in average.evaluation_weights(model).items()}


def optimizer() -> torch.optim.Optimizer:
    """An optimizer that counts no steps."""
    return torch.optim.AdamW([nn.Parameter(torch.zeros(2))], lr=0.5, betas=(0.9, 0.99))


def numbers(opt: torch.optim.Optimizer) -> list[float]:
    """What schedules drive."""
    group = opt.param_groups[0]
    return [group["lr"], *group["betas"]]


def freeze() -> None:
    """Write the file."""
    if PATH.exists():
        raise SystemExit(f"{PATH} exists: a frozen file is never rewritten")
    saved: dict[str, dict[str, object]] = {"averages": {}, "schedules": {}}
    for name, make in AVERAGES.items():
        model = net()
        average = make(model)
        for step in range(11):
            place(model, step)
            average.update()
        state = torch.utils._pytree.tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, average.state_dict())
        for step in range(11, 16):
            place(model, step)
            average.update()
        saved["averages"][name] = {"state": state, "expected": shown(average, model)}
    for name, make in SCHEDULES.items():
        opt = optimizer()
        schedule = make(opt)
        for _ in range(17):
            opt.step()
            schedule.step()
        state, seen = schedule.state_dict(), []
        for _ in range(20):
            seen.append(numbers(opt))
            opt.step()
            schedule.step()
        saved["schedules"][name] = {"state": state, "numbers": seen}
    torch.save(saved, PATH)


if __name__ == "__main__":
    freeze()
    print(PATH)

"""Write the frozen checkpoint of a recipe: once, in the commit that adds it, and never again for the same format.

    python tests/oracles/state/freeze.py adamw muon
    python tests/oracles/state/freeze.py kfac+cholesky      # once more, where a default has come to choose other state

A file holds the parameters and state dict after some steps, three sets of gradients and the parameters that follow.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent / "contracts"))

from drive import Net, evaluations, fill, has, make, parameters, push, take  # noqa: E402
from drive import options as small  # noqa: E402

from guided_descent.recipes import REGISTRY  # noqa: E402


def freeze(name: str) -> Path:
    """Make the file of one recipe; what follows a + in the name tells its files apart."""
    torch.set_num_threads(1)
    key = name.partition("+")[0]
    path = HERE / "format-1" / f"{name}.pt"
    if path.exists():
        raise SystemExit(f"{path} exists: a frozen file is never rewritten")
    net = Net()
    options = REGISTRY[key].cls().values()  # all of them: a default may change, what was saved may not
    options |= small(key)
    options |= {"momentum": 0.9} if has(key, "momentum") else {}
    opt = make(key, net, **options)
    push(opt, 8, seed=1)
    saved = {
        "options": options,
        "model": {name: value.clone() for name, value in net.state_dict().items()},
        "optimizer": opt.state_dict(),
        "steps": opt.steps,
        "gradients": [],
    }
    saved["optimizer"]["state"] = {
        number: {name: value.clone() for name, value in values.items()}
        for number, values in saved["optimizer"]["state"].items()
    }
    for number in range(3):

        def closure(number: int = number) -> None:
            fill(net.parameters(), 100 + number)

        take(opt, closure, evaluations(opt))
        saved["gradients"].append({name: p.grad.clone() for name, p in net.named_parameters()})
    torch.save(saved | {"expected": parameters(net)}, path)
    return path


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(freeze(name))

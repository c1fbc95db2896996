"""Run as a program by the resume test: load what another process saved, train on, save the result, run by run."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from drive import Net, drive, make, snapshot


def finish(folder: Path, name: str, steps: int) -> None:
    """Finish one run."""
    saved = torch.load(folder / f"{name}.saved.pt", weights_only=True)
    net = Net(getattr(torch, saved["dtype"]))
    net.load_state_dict(saved["model"])
    opt = make(saved["key"], net, **saved["options"])
    opt.load_state_dict(saved["optimizer"])
    drive(opt, net, steps, first=opt.steps)
    torch.save(snapshot(opt, net), folder / f"{name}.result.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        finish(Path(sys.argv[1]), line.strip(), int(sys.argv[2]))
        print(line, end="", flush=True)

"""Run as a program by the resume test: load what another process saved, train on, save the result."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from drive import Net, drive, make, snapshot


def main(folder: Path, steps: int) -> None:
    torch.set_num_threads(1)
    for path in sorted(folder.glob("*.saved.pt")):
        saved = torch.load(path, weights_only=True)
        net = Net(getattr(torch, saved["dtype"]))
        net.load_state_dict(saved["model"])
        opt = make(saved["key"], net, **saved["options"])
        opt.load_state_dict(saved["optimizer"])
        drive(opt, net, steps, first=opt.steps)
        torch.save(snapshot(opt, net), path.with_suffix("").with_suffix(".result.pt"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

"""Write the frozen run of the checkpoint format that is current: once, in the commit that adds it, and never again.

    python tests/oracles/runs/freeze.py

``format-<n>/run`` is the folder of a run that a SIGTERM stopped after 6 of 12 steps, with what it left there;
``format-<n>/expected.json`` holds the weights at its checkpoint, and the losses and weights of a run that went through.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent / "bench"))

from guided_descent.bench import session  # noqa: E402
from guided_descent.bench.checkpoint import Checkpoints  # noqa: E402
from guided_descent.bench.runner import train  # noqa: E402
from guided_descent.bench.store import OptimizerSpec, RunStore  # noqa: E402

SPEC = OptimizerSpec("adamw", {"lr": 0.05})
STOP = 6


def freeze() -> Path:
    """Make the folder of the current format."""
    torch.set_num_threads(1)
    session.TICK_SECONDS = 0.0
    out = Path(tempfile.mkdtemp())

    def stop(tick: session.Tick) -> None:
        if tick.step == STOP:
            signal.raise_signal(signal.SIGTERM)

    assert train("tasks:frozen", SPEC, out=out / "a", progress=stop).status == "interrupted"
    assert train("tasks:frozen", SPEC, out=out / "b").status == "complete"
    run, whole = (RunStore(folder).path("tasks:frozen", SPEC.label, 0) for folder in (out / "a", out / "b"))
    manifest = json.loads((run / "checkpoints" / f"step-{STOP:08d}" / "manifest.json").read_text())
    target = HERE / f"format-{manifest['format']}"
    if target.exists():
        raise SystemExit(f"{target} exists: a frozen run is never rewritten")
    shutil.copytree(run, target / "run" / run.relative_to(out / "a"), ignore=shutil.ignore_patterns(".lock"))
    config = target / "run" / run.relative_to(out / "a") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"machine": {}, "git": None}, indent=1) + "\n")
    middle, end = (Checkpoints(path / "checkpoints").latest() for path in (run, whole))
    assert middle is not None
    assert end is not None
    losses = [json.loads(line).get("loss") for line in (whole / "metrics.jsonl").read_text().splitlines()]
    expected = {
        "saved": {name: value.tolist() for name, value in middle[1]["model"].items()},
        "losses": [loss for loss in losses if loss is not None],
        "final": {name: value.tolist() for name, value in end[1]["model"].items()},
    }
    (target / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    shutil.rmtree(out)
    return target


if __name__ == "__main__":
    print(freeze())

"""A task of your own in one function; in this folder run `guided-descent compare my_task:make`."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from guided_descent.bench import Problem


def make(seed: int) -> Problem:
    """1,797 handwritten digits of 8 x 8 pixels, a small network; the last 397 digits are held out."""
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    def batches(step: int):  # depends on seed and step alone: every optimizer sees the same data
        rows = torch.randint(1400, (128,), generator=torch.Generator().manual_seed(100_000 * seed + step))
        return x[rows], y[rows]

    def loss(model, batch):
        return cross_entropy(model(batch[0]), batch[1])

    def evaluate(model):
        return {"test_loss": loss(model, (x[1400:], y[1400:])).item()}

    return Problem(model=model, loss=loss, batches=batches, evaluate=evaluate, metric="test_loss")

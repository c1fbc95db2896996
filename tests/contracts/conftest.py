"""The table: a test that takes ``key`` runs once for every registered recipe."""

from __future__ import annotations

import pytest

import guided_descent as gd


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "key" in metafunc.fixturenames:
        metafunc.parametrize("key", gd.list_optimizers())

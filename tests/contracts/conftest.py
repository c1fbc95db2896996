"""The table: a test that takes ``key`` runs once for every registered recipe, and how far, by structure.

Some tests turn what the engine does and a recipe does not choose (dtype, rounding, kind of scheduler, variant of a
checkpoint) through many values. With ``@pytest.mark.thin(name=values)`` they run in full for one recipe of each
structure (``drive.structure``: the same way through the engine) and, for the others, with these values alone; the rest
is marked slow, so that ``make test-all`` runs it.
"""

from __future__ import annotations

import pytest
from drive import representatives

import guided_descent as gd


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "thin(**values): run in full for one recipe of each structure; see conftest.py")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "key" in metafunc.fixturenames:
        metafunc.parametrize("key", gd.list_optimizers())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    full = representatives()
    for item in items:
        thin = item.get_closest_marker("thin")
        if thin is None or not isinstance(item, pytest.Function):
            continue
        values = item.callspec.params
        if values["key"] not in full and any(values[name] not in kept for name, kept in thin.kwargs.items()):
            item.add_marker(pytest.mark.slow)

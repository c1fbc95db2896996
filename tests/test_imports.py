"""The layers: nobody imports upward, and using the library needs torch alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "guided_descent"

#: Low to high. A module may import from its own layer and those below.
LAYERS: list[set[str]] = [
    {"linalg", "schedules.curves", "routing", "capture"},
    {"parts"},
    {"recipes"},
    {"scaling", "kernels"},
    {"engine", "parallel"},
    {"layers", "build", "explain", "catalogue", "initialize", "solvers"},
    {"schedules", "averaging"},
    {"curvature", "guide", "bench", "experiments", "integrations"},
    {"cli", "__main__"},
]
#: Packages of one layer that know nothing of each other.
APART = [{"linalg", "schedules.curves", "routing", "capture"}, {"scaling", "kernels"}]
#: Third parties that a part of the library may use; everything else has torch alone.
ALLOWED = {"bench": None, "cli": None, "__main__": None, "experiments": None, "integrations": None}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def package_of(path: Path) -> str:
    """The entry of ``LAYERS`` to which a file belongs; '' for the package's own ``__init__``."""
    relative = path.relative_to(ROOT).with_suffix("")
    dotted = ".".join(relative.parts)
    return unit(dotted)


def unit(dotted: str) -> str:
    if dotted in ("", "__init__"):
        return ""
    if dotted.startswith("schedules.curves"):
        return "schedules.curves"
    return dotted.split(".")[0]


def level(name: str) -> int:
    found = [index for index, layer in enumerate(LAYERS) if name in layer]
    assert len(found) == 1, f"{name!r} is in no layer of this test: place it"
    return found[0]


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of every import that runs; what only a type checker sees is left out."""
    tree = ast.parse(path.read_text())
    hidden: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            hidden.update(child for statement in node.body for child in ast.walk(statement))
    found = []
    here = ["guided_descent", *path.relative_to(ROOT).with_suffix("").parts]
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: -node.level]) if node.level else ""
            source = ".".join(part for part in (base, node.module or "") if part)
            found += [(node.lineno, f"{source}.{alias.name}") for alias in node.names]
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_imports_upward(path: Path) -> None:
    own = package_of(path)
    if not own:
        return  # the public names gather from every layer
    for line, name in imports(path):
        if not name.startswith("guided_descent."):
            continue
        other = unit(name.removeprefix("guided_descent."))
        if other in ("", own) or not any(other in layer for layer in LAYERS):
            # a public name of the package itself is for the layers above the ones that make it
            assert other == own or level(own) > level("build"), f"{path.name}:{line} imports {name}"
            continue
        assert level(other) <= level(own), f"{path.name}:{line}: {own} imports {name}, which lies above it"
        assert not any({own, other} <= apart for apart in APART), f"{path.name}:{line}: {own} imports {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_third_parties_stay_in_their_place(path: Path) -> None:
    if package_of(path) in ALLOWED:
        return
    for line, name in imports(path):
        top = name.split(".")[0]
        assert top in sys.stdlib_module_names | {"torch", "guided_descent"}, f"{path.name}:{line} imports {name}"


def test_every_package_has_a_layer() -> None:
    for path in modules():
        name = package_of(path)
        if name:
            level(name)


def test_upward_imports_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test can fail: a module of ``parts`` that reaches into the engine, by both spellings."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "parts").mkdir()
    for text in (
        "from guided_descent.engine import engine",
        "from ..engine import engine",
        "import guided_descent.build",
    ):
        wrong = tmp_path / "parts" / "wrong.py"
        wrong.write_text(text)
        with pytest.raises(AssertionError, match="lies above"):
            test_nobody_imports_upward(wrong)
    wrong.write_text("import numpy")
    with pytest.raises(AssertionError, match="numpy"):
        test_third_parties_stay_in_their_place(wrong)


PROGRAM = """
import sys

BLOCKED = {"typer", "rich", "scipy", "plotly", "matplotlib", "jinja2", "optuna", "sklearn", "mlxtend", "safetensors"}

for name in BLOCKED:
    sys.modules[name] = None  # importing it fails, as if it were not installed
import torch
before = set(sys.modules)
import guided_descent as gd
new = {name.split(".")[0] for name in set(sys.modules) - before}  # numpy: torch may import it, we may not
assert not new & (set(BLOCKED) | {"numpy", "pandas"}), new
for key in gd.list_optimizers():
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    loss = {"loss": "mse"} if gd.recipes.lookup(key).reads_layers or gd.recipes.lookup(key).samples_labels else {}
    opt = gd.optimizer(key, net, **loss)
    ema = gd.averaging.EMA(net, half_life=5)

    def closure():
        opt.zero_grad()
        loss = net(torch.ones(4, 3)).square().mean()
        if opt.due("hessian"):
            opt.hessian_pass(loss)
        loss.backward()
        return loss

    opt.step(closure)
    str(gd.explain(opt)), str(gd.describe(key)), opt.state_dict()
print("done")
"""


def test_the_library_needs_torch_alone() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "done", done.stderr


def test_names_of_test_files_are_unique() -> None:
    """Pytest imports them by their base name; of two the second is not collected, and ranks import the wrong one."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names)), f"{sorted(n for n in set(names) if names.count(n) > 1)} are there twice"

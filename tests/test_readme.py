"""The README's code runs as it stands, and its example file is the one in examples/."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_the_example_file_is_shown_whole():
    assert (ROOT / "examples" / "my_task.py").read_text() in BLOCKS


def test_the_first_snippet_trains():
    space = {}
    exec(BLOCKS[0].replace("1_000", "20"), space)
    assert space["opt"].steps == 20


def test_the_composed_optimizer_trains():
    [code] = [block for block in BLOCKS if "class Signum" in block]
    model = torch.nn.Linear(3, 2)
    space = {"model": model}
    exec(code, space)
    before = model.weight.detach().clone()
    model(torch.ones(3)).sum().backward()
    space["opt"].step()
    moved = (before - model.weight.detach()).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 3e-4), rtol=1e-3, atol=0)


def test_the_tables_are_those_of_the_committed_results():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT / "README.md").read_text()
    assert module.filled(text) == text, "run python benchmarks/readme.py"
    broken = text.replace("| Muon (GPT 6 × 512) | 0.", "| Muon (GPT 6 × 512) | 9.")
    assert broken != text
    assert module.filled(broken) == text
    with pytest.raises(ValueError, match="no place <!-- burgers -->"):
        module.filled(text.replace("<!-- burgers -->", ""))


def test_the_page_of_first_order_methods_is_made_from_the_committed_results():
    spec = importlib.util.spec_from_file_location("pages", ROOT / "benchmarks" / "pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "run python benchmarks/pages.py"

"""Parameter names: the form that does not change when a model is wrapped, and suggestions for names that are wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Path components that wrappers (DataParallel, torch.compile, activation checkpointing, FSDP1) put into names.
WRAPPERS = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def canonical_name(name: str) -> str:
    """The name of a parameter or module without the components that wrappers add.

    Removes ``module``, ``_orig_mod``, ``_checkpoint_wrapped_module`` and ``_fsdp_wrapped_module`` wherever they are a
    whole path component, so a checkpoint follows its parameters through DDP, ``torch.compile`` and the like.

    >>> canonical_name("module._orig_mod.blocks.0._checkpoint_wrapped_module.fc.weight")
    'blocks.0.fc.weight'
    >>> canonical_name("submodule.weight")
    'submodule.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def near(wrong: str, names: Iterable[str], count: int = 3) -> str:
    """A comma-separated list of the names most like a wrong one; empty when there are no names at all.

    >>> near("block.0.fc", ["blocks.0.fc.weight", "head.bias"], count=1)
    'blocks.0.fc.weight'
    """
    return ", ".join(difflib.get_close_matches(wrong, list(names), n=count, cutoff=0.0))

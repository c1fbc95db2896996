"""How the ranks of a test end."""

from __future__ import annotations

import os

import torch.distributed as dist


def leave() -> None:
    """Leave together and at once, after everything has passed.

    A rank whose peer has left aborts where it waits for it, and the threads of gloo may abort in the teardown of the
    interpreter, which is no part of what is tested.
    """
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)

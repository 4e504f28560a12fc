"""`--compile`: the model's blocks through torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import ModelError
from ..models.blocks import blocks


@contextmanager
def compiled(model: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Run the blocks compiled until the context ends, if enabled.

    Blocks are compiled rather than the whole model: they have one structure, so a single compilation serves all of
    them, and code that reads or skips them is not compiled. Lengths are dynamic, since every batch has its own.

    Raises:
        ModelError: the compiler fails, which it does at the first step.
    """
    if not enabled:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException

    stack = list(blocks(model)[1])
    for block in stack:
        block.forward = torch.compile(block.forward, dynamic=True)
    try:
        yield
    except TorchDynamoException as error:
        inner = getattr(error, "inner_exception", error)
        reason = (str(inner).strip() or type(inner).__name__).splitlines()[0].rstrip(".")
        raise ModelError(
            f"--compile needs blocks that torch.compile takes and a working compiler, and fails: {reason}. "
            "Train without --compile.",
            code="train.compile",
        ) from error
    finally:
        for block in stack:
            del block.forward  # uncovers the method of the class

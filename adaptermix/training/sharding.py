"""A frozen base model that several processes hold together, each a share of every block's weights."""

from __future__ import annotations

import torch

from ..models.base import BaseModel, backbone, load_base
from ..models.blocks import blocks
from ..models.devices import pick_dtype
from ..models.head_forms import Head
from ..options import TrainingSettings
from .parallel import Processes


def load_for(settings: TrainingSettings, processes: Processes, *, head: Head | None = None, seed: int = 0) -> BaseModel:
    """Load the base model of a run: whole in every process, or with `shard_base` in shares.

    Args:
        settings: The run's settings.
        processes: Those that share the run.
        head: The head to put on the model, if any.
        seed: Seed of a new head's weights.

    Raises:
        ModelError: no such model, or one that does not load.
    """
    options = processes.load_options(settings)
    if not processes.sharded:
        return load_base(settings.base, **options, head=head, seed=seed)
    device = torch.device(options["device"])
    options["dtype"] = str(pick_dtype(options["dtype"], device)).removeprefix("torch.")
    options["device"] = "cpu"  # a device need never hold more than its share
    base = load_base(settings.base, **options, head=head, seed=seed)
    shard(base, device, processes.count)
    return base


def shard(base: BaseModel, device: torch.device, count: int) -> None:
    """Leave this process its share of every block; the blocks' whole weights are there only while they compute.

    Modules that are added to the model afterwards, such as a LoRA, are whole in every process. Every process must run
    the model equally often, forward and backward.

    Reference: Zhao et al., 2023, arXiv 2304.11277.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (count,))
    stack = blocks(base.model)[1]
    for block in stack:
        fully_shard(block, mesh=mesh)
    inside = set(stack.parameters())
    # The top has no parameters to shard: it prefetches each block's weights while the block before computes.
    top = backbone(base)
    fully_shard(top, mesh=mesh, ignored_params={p for p in top.parameters() if p not in inside})
    base.model.to(device)

"""Training on the processes that torchrun starts: DDP, or FSDP2; alone it is one process.

DDP keeps the whole model in every process and averages gradients. FSDP2 (``fully_shard``) keeps of
each weight, gradient and optimizer state a part in each process, and puts a block's weights
together when the block runs. Both compute the gradient of the mean loss over all processes.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from fastunet.distributed import world_size
from fastunet.models.unet_sd import ResnetBlock, Transformer

BLOCKS = (ResnetBlock, Transformer)  # sharded, and computed again, each by itself
WAIT = timedelta(minutes=30)  # for the slowest process, above all the one that writes


@contextmanager
def together() -> Iterator[torch.device]:
    """The process group of a torchrun, NCCL on GPUs and gloo elsewhere; yields the device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if "RANK" not in os.environ or dist.is_initialized():
        yield device
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=WAIT)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def checkpointed(model: nn.Module) -> None:
    """What a block computes is computed again in backward and not kept; weights keep their names.

    Call it after accelerate() and before `wrap`.
    """
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, BLOCKS))


def wrap(model: nn.Module, parallel: str) -> nn.Module:
    """The model as all processes train it together: by "ddp" or "fsdp"; alone as it is."""
    if not dist.is_initialized():
        return model
    if parallel == "fsdp":
        return sharded(model)
    device = next(model.parameters()).device
    return DistributedDataParallel(model, [device] if device.type == "cuda" else None)


def sharded(model: nn.Module) -> nn.Module:
    """The model itself, of whose weights each process keeps a part."""
    for block in [module for module in model.modules() if isinstance(module, BLOCKS)]:
        fully_shard(block)
    fully_shard(model)
    return model


def mean(value: Tensor) -> Tensor:
    """Of a value over all processes."""
    value = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= world_size()
    return value


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def gathered(model: nn.Module) -> dict[str, Any]:
    """The whole state_dict on the CPU of rank 0, as an unwrapped model has it; {} elsewhere."""
    return get_model_state_dict(model, options=_whole())


def gathered_optimizer(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """{name of the weight: its state}, on the CPU of rank 0; {} elsewhere."""
    whole: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_whole())
    return whole.get("state", {})


def set_optimizer(
    model: nn.Module, optimizer: Optimizer, state: dict[str, dict[str, Tensor]]
) -> None:
    """Take over what :func:`gathered_optimizer` gave; every process has all of it."""
    options = StateDictOptions(full_state_dict=True)
    own = get_optimizer_state_dict(model, optimizer, options=options)
    whole: Any = {"state": state, "param_groups": own["param_groups"]}
    set_optimizer_state_dict(model, optimizer, whole, options=options)


def _whole() -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, cpu_offload=True)

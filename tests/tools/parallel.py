"""Two processes that train accelerated models together: gradients have to be eager's.

Started by tests/hosts/test_distributed.py with a folder to meet in; each writes a line a case to a
file there. Imports take longest, so there is one process until they are done.
"""

import copy
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # DistributedDataParallel would import it, in each process
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastunet
from fastunet.kernels import recording, use_backend
from fastunet.models import TOY, UNet
from fastunet.models.unet_sd import ResnetBlock, Transformer

SIZE = 2
Wrap = Callable[[nn.Module], nn.Module]


def inputs(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Another sample for each process."""
    generator = torch.Generator().manual_seed(rank)
    sample = torch.randn(1, 1, 4, 4, generator=generator)
    return sample, torch.tensor([3 + 400 * rank]), torch.randn(1, 5, 64, generator=generator)


def shard(model: nn.Module) -> nn.Module:
    """Each block by itself, and the rest."""
    mesh = init_device_mesh("cpu", (SIZE,))
    for block in model.modules():
        if isinstance(block, (ResnetBlock, Transformer)):
            fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def run(model: nn.Module, rank: int) -> tuple[Tensor, list[Tensor], int]:
    """Output, gradients put together from their parts, and how many fused ops ran."""
    with recording() as ran:
        output = model(*inputs(rank))
    output.square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return (
        output.detach(),
        [getattr(g, "full_tensor", lambda g=g: g)() for g in gradients],
        len(ran),
    )


WRAPS = {"DDP": DistributedDataParallel, "fully_shard": shard}


def before(wrap: Wrap, model: nn.Module) -> nn.Module:
    fastunet.accelerate(model)
    return wrap(model)


def after(wrap: Wrap, model: nn.Module) -> nn.Module:
    model = wrap(model)
    fastunet.accelerate(model)
    return model


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=SIZE)
    torch.manual_seed(0)
    eager = UNet(TOY)
    for parameter in eager.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    lines = []
    output, alone, _ = run(copy.deepcopy(eager), rank)
    for gradient in alone:
        dist.all_reduce(gradient)
        gradient /= SIZE
    for name, wrap in WRAPS.items():
        same, expected, _ = run(wrap(copy.deepcopy(eager)), rank)
        assert torch.equal(same, output)
        for ours, theirs in zip(expected, alone, strict=True):  # FSDP adds up in another order
            torch.testing.assert_close(ours, theirs)
            assert theirs.any()
        for order in (before, after):
            case, model = f"accelerate() {order.__name__} {name}", order(wrap, copy.deepcopy(eager))
            assert fastunet.is_accelerated(model), case
            found, gradients, count = run(model, rank)
            assert torch.equal(found, output), f"{case}: another output"
            equal = map(torch.equal, gradients, expected)
            names = (key for key, _ in eager.named_parameters())
            wrong = [key for key, same in zip(names, equal, strict=True) if not same]
            assert not wrong, f"{case}: other gradients of {wrong}"
            lines.append(f"{case}: {count}")
    (folder / f"{rank}.txt").write_text("\n".join(lines))
    dist.destroy_process_group()


if __name__ == "__main__":
    with use_backend("torch"):
        fork = multiprocessing.get_context("fork")
        folder = Path(sys.argv[1])
        processes = [fork.Process(target=main, args=(rank, folder)) for rank in range(SIZE)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    sys.exit(any(process.exitcode for process in processes))

"""Parameters that are DTensors, as `fully_shard` (FSDP2) and tensor parallelism make them: each process updates its part.

A plan sees that part only, a plain tensor, and knows the DTensor as its owner (plan.py). States are DTensors placed like their
parameter, as in torch.optim, and as torch.distributed.checkpoint expects them. What is left to do over all processes is the
norm: each element counts once, however many processes have it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

NormGroup = tuple[str, tuple[Any, ...]]  # a type of device, and the process groups that tensors there are spread over


def is_dtensor(value: Any) -> bool:
    """Whether it is a DTensor. Imports nothing: if nobody has imported `torch.distributed.tensor`, there is no DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, getattr(module, "DTensor", ()))


def is_of_fsdp1(tensor: torch.Tensor) -> bool:
    """Whether FullyShardedDataParallel made it, of what several processes share: then it may be a shard of something."""
    distributed = torch.distributed
    return (
        getattr(tensor, "_fsdp_flattened", False)
        and distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def part_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a DTensor, the same object every time; any other tensor is its own part."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def grad_part(grad: torch.Tensor | None) -> torch.Tensor | None:
    """What this process has of a gradient, once it is there: it may still be on its way."""
    part = None if grad is None else part_of(grad)
    return part.wait() if hasattr(part, "wait") else part


def misplaced(tensor: torch.Tensor, param: torch.Tensor) -> str | None:
    """What a gradient or state is, if one of it and its parameter is a DTensor and the other is none, or another one."""
    if not is_dtensor(param) and not is_dtensor(tensor):
        return None
    if is_dtensor(param) and is_dtensor(tensor) and is_placed_like(tensor, param):
        return None
    return f"{describe(tensor)}, the parameter {describe(param)}"


def is_placed_like(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Of two DTensors, whether each process has the same part of both."""
    one, two = tensor._spec, other._spec
    return one is two or (one.mesh == two.mesh and tuple(one.placements) == tuple(two.placements))


def describe(tensor: torch.Tensor) -> str:
    """For an error: whether it is a DTensor, and how it is placed."""
    if not is_dtensor(tensor):
        return "a plain tensor"
    return f"a DTensor placed {', '.join(map(str, tensor.placements))} on a mesh of {tuple(tensor.device_mesh.shape)}"


def norm_group(tensor: torch.Tensor) -> NormGroup | None:
    """Over which processes the elements of a tensor are spread; None if this one has all of them, or no part in it."""
    if not is_dtensor(tensor) or tensor.device_mesh.get_coordinate() is None:
        return None
    mesh = tensor.device_mesh
    dims = [i for i, placement in enumerate(tensor.placements) if not placement.is_replicate() and mesh.size(i) > 1]
    return (mesh.device_type, tuple(map(mesh.get_group, dims))) if dims else None


def gathered(values: torch.Tensor, group: NormGroup) -> torch.Tensor:
    """The values of all processes of a group, in the same order on each, on the device they were on.

    Args:
        values: 1-d, as many on each process.
    """
    device_type, processes_of_dims = group
    device = values.device
    values = values.to(device_type)  # nothing, and nobody waits, if that is where they are
    for processes in processes_of_dims:
        parts = [torch.empty_like(values) for _ in range(processes.size())]
        torch.distributed.all_gather(parts, values, group=processes)
        values = torch.cat(parts)
    return values.to(device)

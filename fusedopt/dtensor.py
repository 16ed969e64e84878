"""Parameters that are DTensors, as `fully_shard` (FSDP2) and tensor parallelism make them: each process updates its part.

A plan sees that part only, a plain tensor, and knows the DTensor as its owner (plan.py). States are DTensors placed like their
parameter, so torch.distributed.checkpoint saves and loads them for any number of processes. What is left to do over all
processes is the norm: each element counts once, however many processes have it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

NormGroup = tuple[Any, tuple[int, ...]]  # a mesh, and the dimensions of it that tensors are divided over


def is_dtensor(value: Any) -> bool:
    """Without importing what DTensors need: who has not done that has none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, getattr(module, "DTensor", ()))


def part_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a DTensor, the same object every time; any other tensor is its own part."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def misplaced(tensor: torch.Tensor, param: torch.Tensor) -> str | None:
    """What a gradient or state is, if one of it and its parameter is a DTensor and the other is none, or another one."""
    if is_dtensor(tensor) == is_dtensor(param) and (not is_dtensor(param) or _placed(tensor) == _placed(param)):
        return None
    return f"{describe(tensor)}, the parameter {describe(param)}"


def _placed(tensor: torch.Tensor) -> tuple[Any, tuple]:
    return tensor.device_mesh, tuple(tensor.placements)


def describe(tensor: torch.Tensor) -> str:
    """For an error: whether it is a DTensor, and how it is placed."""
    if not is_dtensor(tensor):
        return "a plain tensor"
    return f"a DTensor placed {', '.join(map(str, tensor.placements))} on a mesh of {tuple(tensor.device_mesh.shape)}"


def norm_group(tensor: torch.Tensor) -> NormGroup | None:
    """Over which processes the elements of a tensor are spread; None if this one has them all."""
    if not is_dtensor(tensor):
        return None
    mesh, placements = _placed(tensor)
    dims = tuple(dim for dim, placement in enumerate(placements) if not placement.is_replicate())
    return (mesh, dims) if dims else None


def gathered(values: torch.Tensor, group: NormGroup) -> torch.Tensor:
    """The values of all processes of a group, in the same order on each; nobody waits for them.

    Args:
        values: 1-d, on a device of the mesh's type, as many on each process.
    """
    mesh, dims = group
    for dim in dims:
        processes = mesh.get_group(dim)
        parts = [torch.empty_like(values) for _ in range(processes.size())]
        torch.distributed.all_gather(parts, values, group=processes)
        values = torch.cat(parts)
    return values

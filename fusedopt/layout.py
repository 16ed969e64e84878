"""How the elements of a tensor lie in memory. Nothing here reads or writes an element."""

from __future__ import annotations

import torch


def as_real(tensor: torch.Tensor) -> torch.Tensor:
    """A complex tensor as pairs of reals in the same memory, with one more dimension; any other tensor as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def dims(tensor: torch.Tensor) -> list[tuple[int, int]]:
    """(stride, size) of every dimension with more than one element, innermost first."""
    return sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill one block of memory without gaps, in any order of dimensions."""
    if tensor.is_contiguous():  # as most are
        return True
    expected = 1
    for stride, size in dims(tensor):
        if stride != expected:
            return False
        expected *= size
    return True


def extent(tensor: torch.Tensor) -> int:
    """Number of elements of memory from the first element to the last one, both included; at least 1."""
    if tensor.is_contiguous():
        return tensor.numel() or 1
    return 1 + sum(stride * (size - 1) for stride, size in dims(tensor))


def have_same_strides(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape order their elements in the same way."""
    return a.stride() == b.stride() or all(
        s == t or size == 1 for size, s, t in zip(a.shape, a.stride(), b.stride(), strict=True)
    )


def are_same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape have every element at the same address."""
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and have_same_strides(a, b)


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements share an address."""
    if tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in dims(tensor):
        if stride <= reach:  # no further than the inner dimensions reach: perhaps, so count the addresses
            if stride == 0:
                return True
            addresses = torch.zeros((), dtype=torch.int64, device="cpu")
            for step, count in dims(tensor):
                addresses = addresses.unsqueeze(-1) + step * torch.arange(count, device="cpu")
            return addresses.unique().numel() < tensor.numel()
        reach += stride * (size - 1)
    return False


def in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor as a 1-d view of its elements in the order of their addresses; complex ones as reals."""
    tensor = as_real(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))

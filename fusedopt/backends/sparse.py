"""Sparse gradients (COO): an update of the rows that a gradient touches, and of nothing else.

A "row" is what the sparse dimensions of the gradient choose: a row of an embedding's table, or, where all dimensions are
sparse, one element. Every step reads the gradient anew; nothing it does depends on how many rows the parameter has.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch

from fusedopt import reference
from fusedopt.entry import Entry, Slot
from fusedopt.extension import _C
from fusedopt.formats import plain_format
from fusedopt.interrupts import uninterrupted
from fusedopt.layout import as_real
from fusedopt.rules import Rule


def is_sparse(grad: torch.Tensor | None) -> bool:
    """Whether a gradient is of the one sparse layout that is supported."""
    return grad is not None and grad.layout == torch.sparse_coo


def has_rows_inside(grad: torch.Tensor) -> bool:
    """Whether its indices are within its shape, which torch does not check by itself. Waits for the device."""
    indices = grad._indices()
    if indices.numel() == 0:
        return True
    low, high = (ends.tolist() for ends in torch.aminmax(indices, dim=1))
    return min(low) >= 0 and all(index < size for index, size in zip(high, grad.shape, strict=False))


@dataclass(slots=True)
class Touched:
    """What one step does to an entry: ``values[k]`` is a part of the gradient of row ``keys[k]``, rows in row-major order."""

    entry: Entry
    keys: torch.Tensor  # int64 (n,), contiguous, in any order, with repetitions
    values: torch.Tensor  # (n, *shape of a row), contiguous

    @property
    def num_sparse(self) -> int:
        """How many of the parameter's dimensions choose the row."""
        return self.entry.param.tensor.dim() + 1 - self.values.dim()

    @property
    def sparse_shape(self) -> tuple[int, ...]:
        """The sizes of these."""
        return tuple(self.entry.param.tensor.shape[: self.num_sparse])


def touched_by(entry: Entry, grad: torch.Tensor) -> Touched:
    """What a gradient does, as it is stored."""
    indices = grad._indices()
    keys = indices[0] if len(indices) else torch.zeros(indices.shape[1], dtype=torch.int64, device=grad.device)
    for index, size in zip(indices[1:], grad.shape[1:], strict=False):
        keys = keys * size + index
    return Touched(entry, keys.contiguous(), grad._values().contiguous())


class Bucket:
    """Entries on one device whose gradients are sparse; the interface is `fusedopt.entry.Bucket`.

    Args:
        backend: who updates the rows: by its `Rows` where it has that, else staged.
    """

    is_asynchronous = is_capturable = False

    def __init__(self, backend: ModuleType, rule: Rule, entries: Sequence[Entry], is_alone: bool):
        self.entries = list(entries)
        planned = [entry for entry in self.entries if not entry.is_idle]
        self.device = planned[0].param.tensor.device  # idle parameters, which are only watched, may be elsewhere
        self._rule = rule
        self._backend = backend
        self._seen = [None if entry.is_idle else (_seen(entry), _kind(entry.grad)) for entry in self.entries]
        self._written = {tensor.untyped_storage().data_ptr() for entry in planned for tensor in _tensors(entry)}
        self._rows: Any = None
        self._active: list[int] = []  # positions in entries, of those that have a gradient
        self._is_used = False  # nothing watches without the extension: then good for one step

    @property
    def is_capturing(self) -> bool:
        """Whether what is launched now goes into a CUDA graph."""
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def refresh(self) -> bool:
        if self._is_used:
            return False
        rows = getattr(self._backend, "Rows", None)
        touched, self._active = [], []
        for position, (entry, seen) in enumerate(zip(self.entries, self._seen, strict=True)):
            grad = entry.grad
            if seen is None and grad is None:
                continue
            if seen is None or _seen(entry) != seen[0] or (entry.step.is_cpu and not float(entry.step) >= 0):
                return False
            if grad is None:
                continue
            if _kind(grad) != seen[1]:
                return False
            if not _is_readable(grad._values()) or not _is_readable(grad._indices()):
                return False
            # `Rows` checks rows that have elements. Several indices make one row, which may be inside where they are not.
            is_checked = rows is not None and grad.sparse_dim() == 1 and grad._values().numel() > 0
            if not is_checked and not has_rows_inside(grad):
                return False
            part = touched_by(entry, grad)
            if part.values.untyped_storage().data_ptr() in self._written:  # else they would change on the way
                part.values = part.values.clone()
            touched.append(part)
            self._active.append(position)
        if rows is None:
            self._rows = Staged(self._rule, touched, self._backend.Bucket)
            return True
        try:
            self._rows = rows(touched)
        except IndexError:  # a row beyond the parameter's
            return False
        return True

    def release(self) -> None:
        self._rows = None
        self._is_used = _C is None

    def grad_norm(self, is_weighted: Sequence[bool]) -> float:
        return self._rows.grad_norm(is_weighted)

    def first_nonfinite(self) -> int:
        index = self._rows.first_nonfinite()
        return index if index < 0 else self._active[index]

    def prepare(self, scalars: Sequence[Sequence[float]], grad_coefs: Sequence[float]) -> Callable[[], None]:
        return self._rows.prepare(scalars, grad_coefs)


class Staged:
    """Rows of entries, for one step: copied into small dense tensors, updated there by a backend's bucket, and copied back.

    The copies have the dtype that is computed in, so that repeated rows are added up and the parameter is rounded once.
    """

    def __init__(self, rule: Rule, touched: Sequence[Touched], bucket: type):
        self._rule = rule
        self._bucket = bucket
        self._entries = [part.entry for part in touched]
        self._targets: list[list[torch.Tensor | None]] = []  # parameter and states of each
        self._index: list[tuple[torch.Tensor, ...]] = []
        self._grads: list[torch.Tensor] = []
        for part in touched:
            shape = part.sparse_shape or (1,)
            slots = [part.entry.param, *part.entry.states]
            tensors = [None if slot is None else slot.tensor.detach() for slot in slots]
            if not part.sparse_shape:
                tensors = [None if tensor is None else tensor.unsqueeze(0) for tensor in tensors]
            size = (math.prod(shape), *part.values.shape[1:])
            values = part.values.to(_computed_in(part.entry))
            # Without duplicates only then, whatever the gradient says of itself.
            summed = torch.sparse_coo_tensor(part.keys[None], values, size, check_invariants=False).coalesce()
            self._targets.append(tensors)
            self._index.append(torch.unravel_index(summed.indices()[0], shape))
            self._grads.append(summed.values())

    def grad_norm(self, is_weighted: Sequence[bool]) -> float:
        # No rule whose norm weights gradients takes sparse ones.
        return float(reference.total_norm([as_real(grad) for grad in self._grads]))

    def first_nonfinite(self) -> int:
        return next((i for i, grad in enumerate(self._grads) if not grad.isfinite().all()), -1)

    @torch.no_grad()
    def prepare(self, scalars: Sequence[Sequence[float]], grad_coefs: Sequence[float]) -> Callable[[], None]:
        entries = []
        for entry, tensors, index, grad in zip(self._entries, self._targets, self._index, self._grads, strict=True):
            param, *states = [None if tensor is None else tensor[index] for tensor in tensors]
            param = Slot("param", param.to(_computed_in(entry)), plain_format(_computed_in(entry)))
            states = [
                None if slot is None else replace(slot, tensor=rows)
                for slot, rows in zip(entry.states, states, strict=True)
            ]
            scalars_of_rows = [replace(slot, tensor=slot.tensor.clone()) for slot in entry.scalars]
            slots = dict(param=param, source=param, states=states, scalars=scalars_of_rows)
            entries.append(replace(entry, **slots, handed_grad=grad, is_grad_handed=True, is_strided=False))
        if not entries:
            return lambda: None
        bucket = self._bucket(self._rule, entries, is_alone=False)
        bucket.refresh()
        return functools.partial(self._write, entries, bucket.prepare(scalars, grad_coefs), bucket)

    @torch.no_grad()
    def _write(self, entries: list[Entry], write: Callable[[], None], bucket: Any) -> None:
        with uninterrupted():
            write()
            for entry, tensors, index in zip(entries, self._targets, self._index, strict=True):
                for tensor, slot in zip(tensors, [entry.param, *entry.states], strict=True):
                    if tensor is not None:
                        tensor.index_put_(index, slot.tensor.to(tensor.dtype))
            for entry, staged in zip(self._entries, entries, strict=True):  # last, as this can hardly fail
                for slot, advanced in zip(entry.scalars, staged.scalars, strict=True):
                    slot.tensor.copy_(advanced.tensor)
        bucket.release()


def _tensors(entry: Entry) -> list[torch.Tensor]:
    """What an update writes rows of."""
    return [slot.tensor.detach() for slot in (entry.param, *entry.states) if slot is not None]


def _computed_in(entry: Entry) -> torch.dtype:
    """The dtype in which an entry's update computes, the complex one for complex parameters."""
    return entry.compute_dtype.to_complex() if entry.param.tensor.is_complex() else entry.compute_dtype


def _seen(entry: Entry) -> list[tuple]:
    """Where these are, and how they lie there."""
    return [(t.data_ptr(), t.shape, t.stride(), t.dtype, t.is_neg(), t.is_conj()) for t in _tensors(entry)]


def _kind(grad: torch.Tensor) -> tuple:
    """What a gradient must have in common with the one that the plan was made for."""
    num_sparse = grad.sparse_dim() if is_sparse(grad) else None
    return type(grad), num_sparse, grad.dtype, grad.shape, grad.device


def _is_readable(tensor: torch.Tensor) -> bool:
    """Whether its memory is there, and holds its values."""
    return (tensor.numel() == 0 or tensor.data_ptr() != 0) and not tensor.is_neg() and not tensor.is_conj()

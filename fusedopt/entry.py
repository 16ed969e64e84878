"""What a step touches, as values: a `Slot` is a tensor in a format, an `Entry` is one parameter with all its slots.

Plans make entries and backends update them. A backend sees addresses, layouts and formats, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from fusedopt import dtensor
from fusedopt.errors import name_param
from fusedopt.formats import Format, plain_format
from fusedopt.layout import as_real, in_memory_order


def compute_dtype(param: torch.Tensor) -> torch.dtype:
    """The dtype in which a parameter's update computes: float64 for float64 and complex128, float32 for all others."""
    return torch.float64 if param.dtype in (torch.float64, torch.complex128) else torch.float32


@dataclass(slots=True)
class Slot:
    """One tensor of an entry, and how its values are stored."""

    role: str  # "param", the name of a state, "step", …
    tensor: torch.Tensor
    format: Format
    aux: torch.Tensor | None = None  # 1-d, if the format has auxiliary values

    @classmethod
    def plain(cls, role: str, tensor: torch.Tensor) -> Slot:
        """A tensor that holds ordinary numbers.

        Raises:
            KeyError: there is no format for its dtype.
        """
        known = plain_format(tensor.dtype)
        if known is None:
            raise KeyError(tensor.dtype)
        return cls(role, tensor, known)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All memory that an update of this slot writes."""
        return [self.tensor] if self.aux is None else [self.tensor, self.aux]

    def decoded(self, dtype: torch.dtype) -> torch.Tensor:
        """The values in ``dtype``, with complex numbers as pairs of reals. Shares memory only if they are stored like that."""
        stored = as_real(self.tensor.detach())
        if self.format.is_plain:
            return stored.to(dtype)
        values = torch.empty_like(stored, dtype=dtype)
        in_memory_order(values).copy_(self.format.decode(in_memory_order(stored), self.aux))
        return values

    def encoded(
        self, values: torch.Tensor, random: torch.Tensor | None = None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(tensor of this slot, what it must hold to store the values) for the tensor and its auxiliary values."""
        stored = as_real(self.tensor)
        if self.format.is_plain:
            return [(stored, values)]
        in_order = torch.empty_like(stored, dtype=values.dtype).copy_(values)
        codes, aux = self.format.encode(in_memory_order(in_order), random)
        pairs = [(in_memory_order(stored), codes)]
        return pairs if self.aux is None else [*pairs, (self.aux, aux)]


class Mirror(NamedTuple):
    """A count that the state holds in another shape or dtype than the backend: read before each update, written after it."""

    name: str
    counted: torch.Tensor  # of a scalar slot
    kept: torch.Tensor  # in the state: one element of any shape and dtype


@dataclass(slots=True)
class Entry:
    """One parameter of a plan, with all that its update touches. The entry of a DTensor holds this process's local tensors."""

    owner: torch.Tensor  # what the group holds and the state belongs to: the parameter itself, or the DTensor around it
    group: int
    index: int
    name: str | None
    variant: str  # name of the kernel
    seed: int  # of random bits: the parameter's position among all groups
    param: Slot
    source: Slot  # where an update reads the parameter: `param` itself, or SAM's old weights
    states: list[Slot | None]  # one per state of the rule, None where it is not stored
    scalars: list[Slot] = field(
        default_factory=list
    )  # 0-d: the step count, then what else the rule counts. Empty: idle
    mirrors: list[Mirror] = field(default_factory=list)
    handed_grad: torch.Tensor | None = None  # instead of `.grad`, if `is_grad_handed`
    is_grad_handed: bool = False  # the plan hands the gradient over: a DTensor's local one, or that of some rows
    is_strided: bool = False  # param, grad and states share no dense layout; or, with is_sparse, are not contiguous
    is_sparse: bool = False  # the gradient is
    has_kernels: bool = True  # else the reference updates it, whatever the backend

    @property
    def is_idle(self) -> bool:
        """Whether it has neither a gradient nor state yet. It takes no part until it gets a gradient."""
        return not self.scalars

    @property
    def step(self) -> torch.Tensor:
        """The step count, 0-d."""
        return self.scalars[0].tensor

    @property
    def grad(self) -> torch.Tensor | None:
        """The gradient of this step. If it is handed over, it is there while a plan holds it."""
        return self.handed_grad if self.is_grad_handed else self.param.tensor.grad

    @property
    def slots(self) -> list[Slot | None]:
        """What the tables of all engines hold, in their order: source, parameter, states."""
        return [self.source, self.param, *self.states]

    @property
    def written(self) -> list[Slot]:
        """What an update writes beside the parameter."""
        return [*(slot for slot in self.states if slot is not None), *self.scalars]

    @property
    def compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.param.tensor)

    @property
    def is_distributed(self) -> bool:
        """Whether it is the local tensor of a DTensor."""
        return self.param.tensor is not self.owner

    @property
    def norm_group(self) -> dtensor.NormGroup | None:
        """The processes over which the parameter's elements are spread; None: this process has all of them."""
        return dtensor.norm_group(self.owner)

    def __str__(self) -> str:
        return name_param(self.group, self.index, self.name, self.owner)


class Bucket(Protocol):
    """Entries of one device that one backend updates together."""

    entries: list[Entry]
    device: torch.device
    is_asynchronous: bool  # can clip and skip on its device, so that nobody waits: then it is an `AsynchronousBucket`
    is_capturable: bool  # what it launches may go into a CUDA graph

    @property
    def is_capturing(self) -> bool:
        """Whether what it launches now goes into a CUDA graph."""

    def refresh(self) -> bool:
        """Reads the gradients of this step and holds them until `release`. False: it no longer fits, make a new plan."""

    def release(self) -> None: ...

    def grad_norm(self, is_weighted: Sequence[bool]) -> float:
        """2-norm of the gradients; of groups that are weighted, of gradients times parameters."""

    def first_nonfinite(self) -> int:
        """Index into ``entries`` of the first gradient with NaN or infinity; -1: none."""

    def prepare(
        self, scalars: Sequence[Sequence[Any]], grad_coefs: Sequence[float], **on_device: Any
    ) -> Callable[[], None]:
        """Does everything of an update that can fail, and returns what writes. One row of hyperparameters per group."""


class AsynchronousBucket(Bucket, Protocol):
    """A bucket that clips and skips on its device, so that nobody waits for it."""

    has_launched: bool  # an update, at least once

    def measure(
        self,
        max_norm: float,
        previous: torch.Tensor | None,
        grad_scale: float | torch.Tensor,
        dtype: torch.dtype,
        is_weighted: Sequence[bool] = (),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of the unscaled gradients, 0-d of ``dtype``, and the control (kernels/engine.py) that clips it."""

    def control(self, coef: float, is_finite: bool) -> torch.Tensor:
        """What gradients are multiplied with, and whether their norm is finite, on the device."""

"""What an optimizer remembers from step to step: the last norm, how many steps were skipped, and a clip that waits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import TensorWeakRef

from fusedopt import dtensor
from fusedopt.entry import AsynchronousBucket
from fusedopt.errors import fail
from fusedopt.plan import Plan
from fusedopt.types import Nonfinite


@dataclass(frozen=True)
class Control:
    """What gradients are to be multiplied with, and whether their norm is finite: known on the host, or on their device."""

    coef: float = 1.0
    is_finite: bool = True
    # In place of the two: float64 [coef, 0 if finite else 1], the control of kernels/engine.py.
    on_device: torch.Tensor | None = None

    def on_host(self) -> Control:
        """The same on the host; waits for the device."""
        if self.on_device is None:
            return self
        coef, is_nonfinite = map(float, self.on_device)
        return Control(coef, is_nonfinite == 0)

    def on(self, bucket: AsynchronousBucket) -> torch.Tensor | None:
        """The same on the device of an asynchronous bucket; None if there is nothing to multiply with."""
        if self.on_device is not None:
            return self.on_device.to(bucket.device, non_blocking=True)
        return None if self == UNCLIPPED else bucket.control(self.coef, self.is_finite)


UNCLIPPED = Control()


@dataclass(frozen=True)
class Pending:
    """A clip that the next step is to make, and the gradients that it is for."""

    control: Control
    grads: dict[int, tuple[TensorWeakRef, tuple[int, int]]]  # id -> (gradient, its version)

    @classmethod
    def of(cls, control: Control, grads: list[torch.Tensor]) -> Pending:
        """A clip of these gradients as they are now."""
        return cls(control, {id(grad): (TensorWeakRef(grad), _version_of(grad)) for grad in grads})

    def knows(self, grad: torch.Tensor) -> bool:
        """Whether the norm was taken of this gradient, perhaps with other values."""
        return id(grad) in self.grads and self.grads[id(grad)][0]() is grad  # an id may be used again

    def is_for(self, grad: torch.Tensor) -> bool:
        """Whether the norm was taken of this gradient, not written to since."""
        return self.knows(grad) and _version_of(grad) == self.grads[id(grad)][1]


def _version_of(grad: torch.Tensor) -> tuple[int, int]:
    """How often autograd has counted a write, apart for a DTensor and its local tensor. Tensors made in inference mode: 0."""
    whole, part = (0 if of.is_inference() else of._version for of in (grad, dtensor.part_of(grad)))
    return whole, part


class StepRecord:
    """What an optimizer remembers from step to step. Wrappers that copy the optimizer's attributes share it."""

    def __init__(self) -> None:
        self.grad_norm: torch.Tensor | None = None
        self.pending: Pending | None = None
        self.checked: tuple[float | None, Nonfinite] = (None, "propagate")  # limit and mode of the last step
        self.num_skipped = 0
        self.num_skipped_on_device: torch.Tensor | None = None  # where a device decides, and counts

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "pending": None}  # a copy has other gradients

    @property
    def skipped_steps(self) -> int | torch.Tensor:
        """How many steps have changed nothing; a tensor where a device counts them too."""
        if self.num_skipped_on_device is None:
            return self.num_skipped
        return self.num_skipped + self.num_skipped_on_device

    def count_skip(self) -> None:
        """One more step that changed nothing."""
        self.num_skipped += 1
        self.pending = None

    def counter_on(self, device: torch.device) -> torch.Tensor:
        """The count of skipped steps that a device advances."""
        if self.num_skipped_on_device is None or self.num_skipped_on_device.device != device:
            if self.num_skipped_on_device is not None:
                self.num_skipped += int(self.num_skipped_on_device)
            self.num_skipped_on_device = torch.zeros((), dtype=torch.int64, device=device)
        return self.num_skipped_on_device

    def pending_control(self, plan: Plan, *, is_replaceable: bool = False) -> Control:
        """What waits for the next step.

        Args:
            plan: holds the gradients of now.
            is_replaceable: drop it if every gradient is another tensor than those it is for.

        Raises:
            RuntimeError: a gradient is new or was written to since, so that clipping it would be wrong.
        """
        active = plan.active()
        if is_replaceable and not any(self.pending.knows(entry.owner.grad) for entry in active):
            self.pending = None
            return UNCLIPPED
        changed = [entry for entry in active if not self.pending.is_for(entry.owner.grad)]
        if changed:
            reason = (
                "its gradient is new or was changed since clip_grad_norm_; call step() before changing gradients, or this "
                "optimizer's zero_grad() to drop the clip"
            )
            fail(RuntimeError, plan.owner, changed[0], reason)
        return self.pending.control

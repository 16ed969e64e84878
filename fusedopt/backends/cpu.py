"""The C++ engine (csrc/cpu/): tensors in host memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fusedopt import _C
from fusedopt.rules import Rule

if TYPE_CHECKING:
    from fusedopt.plan import Entry

_C.use_torch(torch.Tensor, getattr(torch.Tensor, "__dlpack_c_exchange_api__", None))

if "FUSEDOPT_CPU_ISA" in os.environ and not _C.set_isa(os.environ["FUSEDOPT_CPU_ISA"]):
    raise ImportError(
        f"FUSEDOPT_CPU_ISA={os.environ['FUSEDOPT_CPU_ISA']!r} is not available on this CPU; "
        f"it has {', '.join(_C.available_isas())}"
    )


def unavailable() -> str | None:
    """Why this CPU cannot run the engine, or None."""
    return None if _C.available_isas() else "the CPU has none of the instruction sets of this build"


def supports(device: torch.device) -> bool:
    return device.type == "cpu"


class Bucket:
    """Entries in host memory, with their C++ tensor and chunk tables."""

    def __init__(self, rule: Rule, entries: Sequence[Entry]):
        self.entries = list(entries)
        self._plan = _C.Plan()
        for entry in self.entries:
            if entry.is_idle:
                self._plan.add_idle(entry.param)
                continue
            self._plan.add(
                entry.param,
                entry.param.grad,
                entry.states,
                entry.step,
                entry.extra,
                _C.rules[entry.variant][0],
                entry.group,
                entry.is_strided,
            )
        self._plan.finish()
        self._params = [entry.param for entry in self.entries]

    def refresh(self) -> bool:
        return self._plan.refresh()

    def release(self) -> None:
        self._plan.release()

    def grad_norm(self) -> float:
        return self._plan.grad_norm(torch.get_num_threads())

    def first_nonfinite(self) -> int:
        return self._plan.first_nonfinite()

    def update(self, scalars: Sequence[Sequence[float]], grad_coefs: Sequence[float]) -> None:
        self._plan.update(scalars, grad_coefs, torch.get_num_threads())
        # Autograd must notice that a tensor it saved has changed.
        is_all = self._plan.all_active()
        written = self._params if is_all else [self._params[i] for i in self._plan.active()]
        torch.autograd.graph.increment_version(written)

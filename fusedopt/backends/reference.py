"""The functions of fusedopt/reference.py, one tensor at a time: any device, slow, and the specification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fusedopt import reference
from fusedopt.rules import Rule

if TYPE_CHECKING:
    from fusedopt.plan import Entry


def unavailable() -> str | None:
    """Never: it only needs torch."""
    return None


def supports(device: torch.device) -> bool:
    return True


class Bucket:
    """Entries on one device, updated by the reference functions in the dtype of their states."""

    def __init__(self, rule: Rule, entries: Sequence[Entry]):
        self.entries = list(entries)
        self._rule = rule
        self._update = getattr(reference, rule.name)

    def refresh(self) -> bool:
        return False  # nothing is kept: every step plans, and validates, anew

    def release(self) -> None:
        pass

    def _active(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.param.grad is not None]

    def grad_norm(self) -> float:
        return float(reference.total_norm([entry.param.grad for entry in self._active()]))

    def first_nonfinite(self) -> int:
        for i, entry in enumerate(self.entries):
            if entry.param.grad is not None and not entry.param.grad.isfinite().all():
                return i
        return -1

    @torch.no_grad()
    def update(self, scalars: Sequence[Sequence[float]], grad_coefs: Sequence[float]) -> None:
        for entry in self._active():
            param, slots = entry.param, zip(self._rule.states, entry.states, strict=True)
            tensors = {slot.name: tensor for slot, tensor in slots if tensor is not None}
            dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
            entry.step += 1
            state = dict(tensors)
            if entry.extra is not None:
                state[self._rule.extra] = float(entry.extra)
            new_param = self._update(
                param.to(dtype),
                grad_coefs[entry.group] * param.grad.to(dtype),
                state,
                float(entry.step),
                **self._keywords(scalars[entry.group], tensors),
            )
            param.copy_(new_param)
            for name, tensor in tensors.items():
                tensor.copy_(state[name])
            if entry.extra is not None:
                entry.extra.fill_(state[self._rule.extra])

    def _keywords(self, scalars: Sequence[float], tensors: dict[str, torch.Tensor]) -> dict:
        """The reference function's options: the scalars, and whether each optional state is there."""
        keywords = dict(zip(self._rule.hyper, scalars, strict=True))
        if "beta1" in keywords:
            keywords["betas"] = (keywords.pop("beta1"), keywords.pop("beta2"))
        for slot in self._rule.states:
            if slot.option is not None and slot.option not in keywords:
                keywords[slot.option] = slot.name in tensors
        return keywords

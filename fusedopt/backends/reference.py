"""The functions of fusedopt/reference.py, one tensor at a time: any device, slow, and the specification."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from fusedopt import reference
from fusedopt.rules import BETAS, Rule

if TYPE_CHECKING:
    from fusedopt.plan import Entry


SCALARS_ON_DEVICE = False
STATE_DTYPES: frozenset[torch.dtype] = frozenset()


def unavailable(where: torch.device | None = None) -> str | None:
    """Never: it only needs torch."""
    return None


def supports(device: torch.device, is_asked_for: bool = False) -> bool:
    """Whether it takes tensors of that device: always."""
    return True


def as_real(tensor: torch.Tensor) -> torch.Tensor:
    """A complex tensor as the pairs of reals it is made of, in the same memory; any other as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def first_nonfinite(entries: Sequence[Entry]) -> int:
    """Index of the first entry whose gradient holds NaN or infinity; -1: none does."""
    for i, entry in enumerate(entries):
        if entry.param.grad is not None and not entry.param.grad.isfinite().all():
            return i
    return -1


@torch.no_grad()
def _write(values: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """In one call, which no interrupt divides."""
    if values:
        torch._foreach_copy_(*map(list, zip(*values, strict=True)))


class Bucket:
    """Entries on one device, updated by the reference functions in the dtype of their states."""

    is_asynchronous = is_capturing = False

    def __init__(self, rule: Rule, entries: Sequence[Entry]):
        self.entries = list(entries)
        self._rule = rule
        self._update = getattr(reference, rule.name)
        self._is_used = False

    def refresh(self) -> bool:
        return not self._is_used  # nothing is watched: good for one step, the next one plans, and validates, anew

    def release(self) -> None:
        self._is_used = True

    def _active(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.param.grad is not None]

    def grad_norm(self, is_weighted: Sequence[bool]) -> float:
        active = self._active()
        grads = [as_real(entry.param.grad) for entry in active]
        for i, entry in enumerate(active):
            if is_weighted[entry.group]:
                grad = grads[i].double()
                grads[i] = torch.where(grad == 0, 0.0, as_real(entry.param.detach()).double() * grad)
        return float(reference.total_norm(grads))

    def first_nonfinite(self) -> int:
        return first_nonfinite(self.entries)

    @torch.no_grad()
    def prepare(
        self, scalars: Sequence[Sequence[float]], grad_coefs: Sequence[float], from_source: bool = False
    ) -> Callable[[], None]:
        new_values = [
            self._computed(entry, scalars[entry.group], grad_coefs[entry.group], from_source)
            for entry in self._active()
        ]
        written = [*itertools.chain.from_iterable(new_values)]
        return lambda: _write(written)

    def _computed(
        self, entry: Entry, scalars: Sequence[float], grad_coef: float, from_source: bool
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Every tensor that the update of one parameter writes, with its new value."""
        param, states = as_real(entry.param), zip(self._rule.states, entry.states, strict=True)
        written = {state.name: as_real(tensor) for state, tensor in states if tensor is not None}
        keywords = self._keywords(scalars, written, param.shape)
        if entry.extra is not None:
            written[self._rule.extra] = entry.extra
        step, dtype = entry.step + 1, entry.compute_dtype
        new_state = {name: float(tensor) if tensor is entry.extra else tensor for name, tensor in written.items()}
        grad = grad_coef * as_real(entry.param.grad).to(dtype)
        old_param = as_real(entry.source) if from_source else param
        new_param = self._update(old_param.to(dtype, copy=True), grad, new_state, float(step), **keywords)
        if entry.extra is not None:
            new_state[self._rule.extra] = torch.tensor(new_state[self._rule.extra], dtype=torch.float64)
        return [(entry.step, step), (param, new_param), *((written[name], new_state[name]) for name in written)]

    def _keywords(self, scalars: Sequence[float], tensors: dict[str, torch.Tensor], shape: torch.Size) -> dict:
        """The reference function's options: the scalars, whether each optional state is there, and if it is one of rows."""
        keywords = dict(zip(self._rule.hyper, scalars, strict=True))
        betas = tuple(keywords.pop(name) for name in BETAS if name in keywords)
        if betas:
            keywords["betas"] = betas
        for state in self._rule.states:
            if state.option is not None and state.option not in keywords:
                keywords[state.option] = state.name in tensors
            if state.per_row is not None:
                keywords[state.per_row] = tensors[state.name].shape != shape
        return keywords

"""The functions of fusedopt/reference.py, one tensor at a time: any device, slow, and the specification."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch

from fusedopt import reference
from fusedopt.entry import Entry
from fusedopt.formats import FORMATS, random_bits
from fusedopt.layout import as_real
from fusedopt.ranges import BETAS
from fusedopt.rules import Rule

SCALARS_ON_DEVICE = False


def unavailable(where: torch.device | None = None) -> str | None:
    """Never: it only needs torch."""
    return None


def supports(device: torch.device, is_asked_for: bool = False) -> bool:
    """Whether it takes tensors of that device: always."""
    return True


def formats() -> frozenset[str]:
    """Names of the storage formats that it has codecs for: all."""
    return frozenset(FORMATS)


def first_nonfinite(entries: Sequence[Entry]) -> int:
    """Index of the first entry whose gradient holds NaN or infinity; -1: none does."""
    for i, entry in enumerate(entries):
        if entry.grad is not None and not entry.grad.isfinite().all():
            return i
    return -1


@torch.no_grad()
def _write(values: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """In one call, which no interrupt divides."""
    if values:
        torch._foreach_copy_(*map(list, zip(*values, strict=True)))


class Bucket:
    """Entries on one device, updated by the reference functions in the dtype that each entry computes in."""

    is_asynchronous = is_capturing = False
    is_capturable = True

    def __init__(self, rule: Rule, entries: Sequence[Entry], is_alone: bool):
        self.entries = list(entries)
        self.device = self.entries[0].param.tensor.device
        self._rule = rule
        self._update = getattr(reference, rule.name)
        self._is_used = False

    def refresh(self) -> bool:
        return not self._is_used  # nothing is watched: good for one step, the next one plans, and validates, anew

    def release(self) -> None:
        self._is_used = True

    def _active(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.grad is not None]

    def grad_norm(self, is_weighted: Sequence[bool]) -> float:
        active = self._active()
        grads = [as_real(entry.grad) for entry in active]
        for i, entry in enumerate(active):
            if is_weighted[entry.group]:
                grad = grads[i].double()
                grads[i] = torch.where(grad == 0, 0.0, entry.param.decoded(torch.float64) * grad)
        return float(reference.total_norm(grads))

    def first_nonfinite(self) -> int:
        return first_nonfinite(self.entries)

    @torch.no_grad()
    def prepare(self, scalars: Sequence[Sequence[float]], grad_coefs: Sequence[float]) -> Callable[[], None]:
        new_values = [self._computed(entry, scalars[entry.group], grad_coefs[entry.group]) for entry in self._active()]
        written = [*itertools.chain.from_iterable(new_values)]
        return lambda: _write(written)

    def _computed(
        self, entry: Entry, scalars: Sequence[float], grad_coef: float
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Every tensor that the update of one parameter writes, with its new value."""
        dtype, step = entry.compute_dtype, entry.step + 1
        states = {slot.role: slot for slot in entry.states if slot is not None}
        values: dict = {role: slot.decoded(dtype) for role, slot in states.items()}
        keywords = self._keywords(scalars, states.keys(), values, entry)
        values |= {slot.role: float(slot.tensor) for slot in entry.scalars[1:]}
        grad = grad_coef * as_real(entry.grad).to(dtype)
        param = entry.source.decoded(dtype)
        new_param = self._update(param.clone(), grad, values, float(step), **keywords)
        written = [(entry.step, step)]
        for slot, new in [(entry.param, new_param), *((slot, values[role]) for role, slot in states.items())]:
            takes_random = slot.format.takes_random
            random = random_bits(entry.seed, int(step), new.numel()).to(new.device) if takes_random else None
            written += slot.encoded(new, random)
        for slot in entry.scalars[1:]:
            written.append((slot.tensor, torch.tensor(values[slot.role], dtype=torch.float64)))
        return written

    def _keywords(self, scalars: Sequence[float], roles: Iterable[str], values: dict, entry: Entry) -> dict:
        """The reference function's options: the scalars, whether each optional state is there, and if it is one of rows."""
        keywords = dict(zip(self._rule.hyper, scalars, strict=True))
        betas = tuple(keywords.pop(name) for name in BETAS if name in keywords)
        if betas:
            keywords["betas"] = betas
        shape = as_real(entry.param.tensor).shape
        for state in self._rule.states:
            if state.option is not None and state.option not in keywords:
                keywords[state.option] = state.name in roles
            if state.per_row is not None:
                keywords[state.per_row] = values[state.name].shape != shape
        return keywords

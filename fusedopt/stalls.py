"""Finds 16-bit parameters that no step moves, because every update is rounded away.

A bfloat16 weight of 1.0 has the neighbours 0.996 and 1.008. An update of less than half that distance changes nothing, in this
step or in any other. A sample shows this over many steps at almost no cost: after the first step up to about `SAMPLES`
elements of each 16-bit parameter are copied, and after steps 100, 1,000, 10,000, … they are compared. If none has changed,
although there are gradients and the learning rate is not 0, one warning names the parameter. All other steps compare two
integers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.utils.weak import TensorWeakRef

from fusedopt.errors import warn
from fusedopt.rules import is_elsewhere

if TYPE_CHECKING:
    from fusedopt.plan import Entry, Plan

SAMPLES = 1024
FIRST_COMPARISON, FACTOR = 100, 10


@dataclass
class Answer:
    """Which parameters did not move, on its way from their device."""

    entries: list[str]
    has_stalled: torch.Tensor  # bool, one element per entry, in host memory once `is_there`
    arrival: torch.cuda.Event | None

    def is_there(self) -> bool:
        return self.arrival is None or self.arrival.query()


@dataclass
class StallWatch:
    """Watches the 16-bit parameters of one optimizer."""

    num_steps: int = 0
    next_look: float = 1
    samples: dict[int, tuple[TensorWeakRef, torch.Tensor]] = field(
        default_factory=dict
    )  # id -> (parameter, its sample)
    answers: list[Answer] = field(default_factory=list)

    def look(self, plan: Plan) -> None:
        """To be called after each step, while the plan holds the gradients. Nobody waits for a device."""
        self.num_steps += 1
        if self.answers and all(answer.is_there() for answer in self.answers):
            self._report(plan.owner)
        if self.num_steps < self.next_look or not plan.has_updated:
            return
        if plan.asynchronous is not None and plan.asynchronous.is_capturing:
            return  # the next step that is not captured looks
        entries = [
            entry
            for entry in plan.active()
            if entry.param.dtype in (torch.bfloat16, torch.float16) and entry.param.numel() and not entry.is_sparse
        ]
        before, self.samples = self.samples, {}
        compared: dict[torch.device, list[tuple[Entry, torch.Tensor]]] = {}
        for entry in entries:
            now = _sample(entry.param)
            known, sample = before.get(id(entry.owner), (None, None))
            if known is not None and known() is entry.owner and sample.shape == now.shape and _has_lr(plan, entry):
                grad = _sample(entry.param.grad)
                has_stalled = (now == sample).all() & ((grad != 0) & grad.isfinite()).any()
                compared.setdefault(now.device, []).append((entry, has_stalled))
            self.samples[id(entry.owner)] = TensorWeakRef(entry.owner), now
        self.next_look = FIRST_COMPARISON if self.next_look == 1 else self.next_look * FACTOR
        self.answers = [_answer(device, there) for device, there in compared.items()]
        if self.answers and all(answer.arrival is None for answer in self.answers):
            self._report(plan.owner)

    def _report(self, owner: str) -> None:
        answers, self.answers = self.answers, []
        stalled = [
            entry
            for answer in answers
            for entry, has_stalled in zip(answer.entries, answer.has_stalled.tolist(), strict=True)
            if has_stalled
        ]
        if stalled:
            self.next_look, self.samples = math.inf, {}  # it has been said
            more = f" (and {len(stalled) - 1} more parameters)" if len(stalled) > 1 else ""
            warn(
                f"{owner}: {stalled[0]}{more}: no step has changed it so far, because each update is less than half the "
                "distance to the next number of this dtype and is rounded away. Keep parameters in float32 and compute "
                "under torch.autocast, or take a larger learning rate"
            )


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of elements that are evenly spread over a tensor, at the same places in each tensor of its shape."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLES)].clone()


def _has_lr(plan: Plan, entry: Entry) -> bool:
    lr = plan.scalars[entry.group][plan.rule.hyper.index("lr")]
    return is_elsewhere(lr) or lr != 0


def _answer(device: torch.device, compared: list[tuple[Entry, torch.Tensor]]) -> Answer:
    entries, flags = zip(*compared, strict=True)
    has_stalled, arrival = torch.stack(flags), None
    if device.type == "cuda":
        has_stalled = torch.empty_like(has_stalled, device="cpu", pin_memory=True).copy_(has_stalled, non_blocking=True)
        arrival = torch.cuda.current_stream(device).record_event()
    return Answer([*map(str, entries)], has_stalled, arrival)

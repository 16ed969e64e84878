"""Finds 16-bit parameters that no step moves, because every update is rounded away.

A bfloat16 weight of 1.0 has the neighbours 0.996 and 1.008. An update of less than half that distance changes nothing, in this
step or in any other. A sample shows this over many steps at almost no cost: after the first step up to `SAMPLES` elements of
each 16-bit parameter are copied, and after steps 100, 1,000, 10,000, … they are compared. If none has changed, although there
are gradients and the learning rate is not 0, one warning names the parameter, in the step after. All other steps compare two
integers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch.utils.weak import TensorWeakRef

from fusedopt.entry import Entry
from fusedopt.errors import name_param, warn
from fusedopt.plan import Plan
from fusedopt.ranges import is_elsewhere
from fusedopt.record import StepRecord

SAMPLES = 1024
FIRST_COMPARISON, FACTOR = 100, 10


@dataclass
class Sample:
    """Some elements of each 16-bit parameter of one device and dtype, one after the other."""

    params: list[TensorWeakRef]
    shapes: list[torch.Size]
    num_steps: int  # after which it was taken
    num_skipped: int | torch.Tensor
    values: torch.Tensor

    def is_of(self, entries: list[Entry]) -> bool:
        """Whether it is of these parameters, in this order and with these shapes."""
        owners, shapes = [entry.owner for entry in entries], [entry.param.tensor.shape for entry in entries]
        return (
            len(self.params) == len(owners)
            and self.shapes == shapes
            and all(param() is owner for param, owner in zip(self.params, owners, strict=True))
        )


@dataclass
class Answer:
    """Which parameters did not move, on its way from their device."""

    owner: str
    places: list[tuple[int, int, str | None]]  # group, index and name of each parameter
    params: list[TensorWeakRef]
    num_steps: int
    has_stalled: torch.Tensor  # bool, one element per entry, in host memory once `is_there`
    arrival: torch.cuda.Event | None

    def is_there(self) -> bool:
        return self.arrival is None or self.arrival.query()


@dataclass
class StallWatch:
    """Watches the 16-bit parameters of one optimizer."""

    num_steps: int = 0
    next_look: float = 1
    samples: dict[tuple[torch.device, torch.dtype], list[Sample]] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)

    def report(self) -> None:
        """Called before a step while there are `answers`: warns of what an earlier look has found, if the answer has come.

        Before it, because a warning can be an error, and a step that raises an error must not have changed anything.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return
        if not all(answer.is_there() for answer in self.answers):
            return
        answers, self.answers = self.answers, []
        stalled = [
            (answer, place, param())
            for answer in answers
            for place, param, has_stalled in zip(answer.places, answer.params, answer.has_stalled.tolist(), strict=True)
            if has_stalled and param() is not None
        ]
        if stalled:
            self.next_look, self.samples = math.inf, {}  # one warning is enough
            answer, place, param = stalled[0]
            more = f" (and {len(stalled) - 1} more parameters)" if len(stalled) > 1 else ""
            warn(
                f"{answer.owner}: {name_param(*place, param)}{more}: the last {answer.num_steps} steps have not changed it, "
                "because each update is less than half the distance to the next number of this dtype and is rounded away. "
                "Unless the learning rate is still rising, keep parameters in float32 and compute under torch.autocast, or "
                "take a larger learning rate"
            )

    def look(self, plan: Plan, record: StepRecord) -> None:
        """Called after a step that is due for a look, or the one before it, while the plan holds the gradients.

        It does not wait for a device.

        Args:
            record: knows how many steps so far changed nothing.
        """
        if any(bucket.is_capturing for bucket in plan.buckets):
            return  # the next step that is not captured looks
        num_skipped = record.skipped_steps
        there: dict[tuple[torch.device, torch.dtype], list[Entry]] = {}
        for entry in (entry for bucket in plan.buckets for entry in bucket.entries):
            if entry.param.tensor.dtype in (torch.bfloat16, torch.float16) and entry.param.tensor.numel():
                there.setdefault((entry.param.tensor.device, entry.param.tensor.dtype), []).append(entry)
        before, self.samples = self.samples, {}
        for key, entries in there.items():
            known = before.get(key, [])
            if not all(sample.is_of(entries) for sample in known):
                known = []
            values = torch.cat([_picked(entry.param.tensor) for entry in entries])
            sample = Sample(
                [TensorWeakRef(entry.owner) for entry in entries],
                [entry.param.tensor.shape for entry in entries],
                self.num_steps,
                num_skipped.clone() if isinstance(num_skipped, torch.Tensor) else num_skipped,
                values,
            )
            if self.num_steps < self.next_look:
                self.samples[key] = [*known, sample]
                continue
            if known and known[0].num_steps < self.num_steps - 1:
                self.answers.append(_compared(plan, entries, known, sample))
            self.samples[key] = [sample]
        if self.num_steps >= self.next_look:
            self.next_look = FIRST_COMPARISON if self.next_look == 1 else self.next_look * FACTOR


def _compared(plan: Plan, entries: list[Entry], known: list[Sample], now: Sample) -> Answer:
    """Which of the parameters have a gradient, and are in all samples the same."""
    moved = torch.stack([sample.values != now.values for sample in known]).any(0)
    sizes = torch.tensor([_num_picked(shape) for shape in now.shapes])
    grads = torch.cat([_picked_grad(plan, entry) for entry in entries])
    owner_of = torch.repeat_interleave(torch.arange(len(entries)), sizes).to(moved.device)
    counts = torch.zeros(2, len(entries), dtype=torch.int32, device=moved.device)
    counts.index_add_(1, owner_of, torch.stack([moved, (grads != 0) & grads.isfinite()]).int())
    # Where most steps were skipped, the others tell little.
    num_steps = now.num_steps - known[0].num_steps
    is_trained = 2 * (now.num_skipped - known[0].num_skipped) < num_steps
    has_stalled, arrival = (counts[0] == 0) & (counts[1] > 0) & is_trained, None
    if has_stalled.is_cuda:
        on_host = torch.empty_like(has_stalled, device="cpu", pin_memory=True)
        has_stalled = on_host.copy_(has_stalled, non_blocking=True)
        arrival = torch.cuda.current_stream(moved.device).record_event()
    places = [(entry.group, entry.index, entry.name) for entry in entries]
    return Answer(plan.owner, places, now.params, num_steps, has_stalled, arrival)


def _picked_grad(plan: Plan, entry: Entry) -> torch.Tensor:
    """Of an entry's gradient; zeros where it has none that could move it, or a sparse one, which moves few rows."""
    lr = plan.groups.scalars[entry.group][plan.rule.hyper.index("lr")]
    if entry.grad is None or entry.is_sparse or not (is_elsewhere(lr) or lr != 0):
        return torch.zeros(_num_picked(entry.param.tensor.shape), device=entry.param.tensor.device)
    return _picked(entry.grad)


def _stride(shape: torch.Size) -> int:
    """Between two elements of a sample, counted in row-major order: so that they lie in many columns."""
    stride = max(1, -(-shape.numel() // SAMPLES))
    while stride > 1 and math.gcd(stride, shape[-1]) > 1:
        stride += 1
    return stride


def _num_picked(shape: torch.Size) -> int:
    return -(-shape.numel() // _stride(shape))


def _picked(tensor: torch.Tensor) -> torch.Tensor:
    """Up to `SAMPLES` elements of a tensor, at the same places in all of the same shape; its memory, or a copy."""
    tensor, stride = tensor.detach(), _stride(tensor.shape)
    if tensor.is_contiguous():
        return tensor.view(-1)[::stride]
    places = torch.arange(0, tensor.numel(), stride, device=tensor.device)
    return tensor[torch.unravel_index(places, tensor.shape)]

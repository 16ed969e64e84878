"""The states of parameters: which format each is stored in, how it is made, adopted by a plan, discarded, saved and loaded.

In ``optimizer.state`` a state in a plain format, which all are today, has torch's name: ``exp_avg``. A state in a format that
torch does not know has the format in its name, ``exp_avg.int8_block``, so that torch.optim cannot take its codes for moments.
Checkpoints hold decoded values under torch's names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fusedopt import dtensor
from fusedopt.checks import COUNT_DTYPES, Checks, count_problem
from fusedopt.entry import Entry, Mirror, Slot, compute_dtype
from fusedopt.errors import short_dtype
from fusedopt.formats import FORMATS, Format, plain_format
from fusedopt.layout import as_real
from fusedopt.ranges import is_elsewhere
from fusedopt.rules import Rule, State


def format_of(rule: Rule, kept: State, param: torch.Tensor) -> Format:
    """The format of a parameter's state: the dtype that its update computes in."""
    return plain_format(compute_dtype(param))


# ---- one state -------------------------------------------------------------------------------------------------


def names(rule: Rule, kept: State, param: torch.Tensor) -> tuple[str, ...]:
    """The entries of ``optimizer.state[param]`` that hold a state: its tensor, then its auxiliary values."""
    return names_in(kept, format_of(rule, kept, param))


def names_in(kept: State, format: Format) -> tuple[str, ...]:
    """The same for a state in a given format."""
    if format.is_plain:
        return (kept.name,)
    stored = f"{kept.name}.{format.name}"
    return (stored, f"{stored}.aux") if format.per_aux else (stored,)


def stored_shape(param: torch.Tensor, shape: tuple[int, ...], format: Format) -> tuple[int, ...]:
    """The shape of a state's tensor: ``shape``, and one more dimension for complex numbers in a format that has none."""
    return (*shape, 2) if param.is_complex() and not format.is_plain else shape


def empty(param: torch.Tensor, shape: tuple[int, ...], format: Format) -> list[torch.Tensor]:
    """Uninitialised tensors of a state, on the parameter's device; a tensor of the parameter's shape has its layout."""
    dtype = format.dtype.to_complex() if param.is_complex() and format.is_plain else format.dtype
    if shape != param.shape:
        stored = torch.empty(stored_shape(param, shape, format), dtype=dtype, device=param.device)
    else:
        like = param if format.is_plain else as_real(param.detach())
        stored = torch.empty_like(like, dtype=dtype, requires_grad=False)
    if not format.per_aux:
        return [stored]
    num_aux = format.num_aux(dtensor.part_of(stored).numel())
    return [stored, torch.empty(num_aux, dtype=format.aux_dtype, device=param.device)]


def slot_of(kept: State, format: Format, tensors: list[torch.Tensor]) -> Slot:
    """A state's tensors, this process's local ones, as what an update reads and writes."""
    stored, *aux = tensors
    return Slot(kept.name, dtensor.part_of(stored), format, *aux)


def holding(
    rule: Rule, kept: State, param: torch.Tensor, shape: tuple[int, ...], value: Any
) -> dict[str, torch.Tensor]:
    """New entries of ``optimizer.state[param]`` that store a value: a number, or a tensor of the state's shape."""
    format = format_of(rule, kept, param)
    tensors = empty(param, shape, format)
    if format.is_plain:
        tensors[0].copy_(value) if isinstance(value, torch.Tensor) else tensors[0].fill_(value)
    else:
        values = torch.empty_like(tensors[0], dtype=compute_dtype(param))
        values.copy_(as_real(value)) if isinstance(value, torch.Tensor) else values.fill_(value)
        for target, new in slot_of(kept, format, tensors).encoded(dtensor.part_of(values)):
            target.copy_(new)
    return dict(zip(names_in(kept, format), tensors, strict=True))


def first(rule: Rule, group: Mapping[str, Any], kept: State, param: torch.Tensor) -> dict[str, torch.Tensor]:
    """A state as it is before the first step."""
    initial = 0.0 if kept.initial is None else float(group[kept.initial])
    if param.is_complex() and initial and format_of(rule, kept, param).is_plain:
        initial = complex(initial, initial)  # as pairs of reals
    return holding(rule, kept, param, rule.state_shape(group, kept, param.shape), initial)


def decoded(rule: Rule, param: torch.Tensor, known: dict[Any, Any]) -> dict[Any, Any]:
    """What ``optimizer.state[param]`` holds, under torch's names, in the dtype that updates compute in.

    It is the very same dict if everything is stored like that already.
    """
    result, dtype = known, compute_dtype(param)
    for kept in rule.states:
        format = format_of(rule, kept, param)
        tensors = [known.get(name) for name in names_in(kept, format)]
        if format == plain_format(dtype) or any(tensor is None for tensor in tensors):
            continue
        is_pair = param.is_complex() and format.is_plain  # a complex tensor already
        values = torch.empty_like(tensors[0], dtype=dtype.to_complex() if is_pair else dtype)
        as_real(dtensor.part_of(values)).copy_(slot_of(kept, format, tensors).decoded(dtype))
        result = {name: value for name, value in result.items() if name not in names_in(kept, format)}
        result[kept.name] = torch.view_as_complex(values) if param.is_complex() and not is_pair else values
    return result


# ---- the states of a plan --------------------------------------------------------------------------------------


@dataclass
class States:
    """The states that one plan uses, and which of them it has made.

    Args:
        state: `optimizer.state`.
        counts: step counts of parameters whose rule keeps none in its state, from the plan before.
    """

    rule: Rule
    state: dict[torch.Tensor, dict[str, Any]]
    checks: Checks
    counts: Mapping[torch.Tensor, torch.Tensor]
    # Entries for which something was made: the step count then, and the names.
    fresh: list[tuple[Entry, float, list[str]]] = field(default_factory=list)

    def is_complete(self, entry: Entry, group: Mapping[str, Any]) -> bool:
        """Whether a parameter has all its states already, so that it takes part before its first gradient."""
        known, stored = self._known(entry), [kept for kept in self.rule.stored(group) if kept is not None]
        first_names = [names(self.rule, kept, entry.owner)[0] for kept in stored]
        return (
            bool(stored)
            and all(known.get(name) is not None for name in first_names)
            and ("step" in known or not self.rule.keeps_step)
        )

    def adopt(self, entry: Entry, group: Mapping[str, Any], count_device: torch.device, local: Callable) -> None:
        """Puts a parameter's states and counts into its entry: those that are there, checked, and new ones for what is missing.

        Args:
            count_device: where the backend reads and advances counts.
            local: gives this process's local tensor of a tensor.
        """
        rule, known, made = self.rule, self._known(entry), {}
        stored = rule.stored(group)
        is_new = not any(known.get(names(rule, kept, entry.owner)[0]) is not None for kept in stored if kept)
        counts = {name: self._count(entry, name, known.get(name), count_device, made) for name in rule.counts_kept}
        if not rule.keeps_step:
            counts = {"step": self._count_apart(entry, is_new, count_device), **counts}
        for i, kept in enumerate(stored):
            if kept is not None:
                tensors = self._tensors(entry, group, kept, known, made)
                entry.states[i] = slot_of(kept, format_of(rule, kept, entry.owner), [*map(local, tensors)])
        entry.scalars = [Slot.plain(name, counts[name]) for name in rule.counts]
        if made:
            missing = [name for name in made if known.get(name) is None]
            self.fresh.append((entry, float(entry.step) if entry.step.is_cpu else 0.0, missing))
            self.state.setdefault(entry.owner, {}).update(made)

    def discard_unused(self, is_used: Callable[[Entry, float], bool]) -> bool:
        """Removes the states that were made and no update has used. True if there were any: the plan is then void.

        Args:
            is_used: whether an update has advanced an entry beyond a step count.
        """
        unused = [(entry.owner, missing) for entry, step, missing in self.fresh if not is_used(entry, step)]
        for param, missing in unused:
            known = self.state.get(param, {})
            for name in missing:
                known.pop(name, None)
            if not known:
                self.state.pop(param, None)
        self.fresh = []
        return bool(unused)

    def _known(self, entry: Entry) -> Mapping[str, Any]:
        known = self.state.get(entry.owner, {})
        if not isinstance(known, Mapping):
            self.checks.fail(entry, (TypeError, f"its state is a {type(known).__name__}, not a dict"))
        return known

    def _tensors(
        self, entry: Entry, group: Mapping[str, Any], kept: State, known: Mapping[str, Any], made: dict[str, Any]
    ) -> list[torch.Tensor]:
        """The tensors that hold a state; new ones if there are none, or if they hold nothing and do not fit."""
        param, format = entry.owner, format_of(self.rule, kept, entry.owner)
        shape = self.rule.state_shape(group, kept, param.shape)
        all_names = names_in(kept, format)
        missing = [name for name in all_names if known.get(name) is None]
        others = [
            name
            for other in FORMATS.values()
            for name in names_in(kept, other)
            if name not in all_names and known.get(name) is not None
        ]
        if others:
            reason = (
                f"state {kept.name!r} is stored as {others[0]!r}, not as {all_names[0]!r}; load it from a state_dict()"
            )
            self.checks.fail(entry, (ValueError, reason))
        if missing and len(missing) < len(all_names):
            self.checks.fail(entry, (ValueError, f"state {missing[0]!r} is missing"))
        if missing:
            made |= first(self.rule, group, kept, param)
            return [made[name] for name in all_names]
        stored, *aux = tensors = [known[name] for name in all_names]
        try:
            self.checks.state(entry, all_names[0], stored, stored_shape(param, shape, format), format)
            for name, value in zip(all_names[1:], aux, strict=True):
                num_aux = format.num_aux(dtensor.part_of(stored).numel())
                self.checks.aux(entry, name, value, num_aux, format)
        except (ValueError, TypeError, RuntimeError):
            if not kept.is_scratch:
                raise
            made |= first(self.rule, group, kept, param)
            return [made[name] for name in all_names]
        return tensors

    def _count(
        self, entry: Entry, name: str, value: Any, device: torch.device, made: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """A count as the backend advances it: the value itself, or a new tensor, mirrored if the value is a tensor there."""
        # As torch: the step count is float32; what multiplies up over the run has the dtype of the states.
        dtype = torch.float32 if name == "step" else compute_dtype(entry.owner)
        if isinstance(value, torch.Tensor):
            self.checks.memory(entry, value, f"state {name!r}")
        if value is not None and not is_elsewhere(value):  # else it would have to wait for the device
            problem = count_problem(value)
            if problem:
                self.checks.fail(entry, problem, f"state {name!r}")
        if type(value) is torch.Tensor and (value.dtype, value.dim(), value.device) == (dtype, 0, device):
            return value
        counted = scalar(self.rule.counts[name] if value is None else value, dtype, device)
        if not isinstance(value, torch.Tensor):
            made[name] = counted
        elif value.dtype not in COUNT_DTYPES:
            reason = f"state {name!r} is {short_dtype(value)}, which cannot count; take float32"
            self.checks.fail(entry, (TypeError, reason))
        elif value.device == device:
            entry.mirrors.append(Mirror(name, counted, value))
        elif value.is_cpu and value.is_shared():
            reason = f"state {name!r} is in shared host memory, but this backend counts on {device}"
            self.checks.fail(entry, (ValueError, reason))
        else:
            made[name] = counted
        return counted

    def _count_apart(self, entry: Entry, is_new: bool, device: torch.device) -> torch.Tensor:
        """The step count of a rule that keeps none in its state: it still has to know its first step."""
        known = self.counts.get(entry.owner)
        if known is not None and not is_new:  # the device may have skipped the first step
            return known
        return scalar(0.0 if is_new else 1.0, torch.float32, device)


def scalar(value: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A new 0-d tensor. It does not wait for a device unless a tensor comes from one."""
    if isinstance(value, torch.Tensor) and value.device == device:
        return value.detach().to(dtype).reshape(()).clone()
    return torch.full((), float(value), dtype=dtype, device=device)

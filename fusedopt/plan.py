"""From parameters to a plan: everything a step needs, validated and kept until something it depends on changes.

Making a plan checks every parameter, gradient and state before anything is written. A later step only asks whether the
plan still holds (`Plan.refresh`): the same objects, at the same addresses, with the same layouts.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fusedopt import _C, backends
from fusedopt.errors import UNCHANGED, name_param, short_dtype
from fusedopt.rules import Rule, check_options

PARAM_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def state_dtype(param: torch.Tensor) -> torch.dtype:
    """What a parameter's states are kept in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def grad_dtypes(param: torch.Tensor) -> tuple[torch.dtype, ...]:
    """The gradient dtypes a parameter takes: its own, and those that convert to the type it is computed in."""
    return PARAM_DTYPES if param.dtype == torch.float64 else (torch.float32, torch.bfloat16, torch.float16)


@dataclass(slots=True)
class Entry:
    """One parameter of a plan, with what a backend needs to update it."""

    param: torch.Tensor
    group: int
    index: int
    name: str | None
    variant: str  # the kernel
    states: list[torch.Tensor | None]  # one per slot of the rule, None where not stored
    step: torch.Tensor | None  # 0-d float32
    extra: torch.Tensor | None  # 0-d
    is_strided: bool = False  # param, grad and states do not share one dense layout

    @property
    def is_idle(self) -> bool:
        """Whether it has neither a gradient nor state yet, and takes no part until it gets one."""
        return self.step is None

    def __str__(self) -> str:
        return name_param(self.group, self.index, self.name, self.param)


class Plan:
    """All parameters of an optimizer, in buckets of one device and backend.

    Raises:
        ValueError, TypeError, RuntimeError: naming the parameter and the reason; then nothing has been changed.
    """

    def __init__(
        self,
        owner: str,
        rule: Rule,
        param_groups: list[dict[str, Any]],
        state: dict[torch.Tensor, dict[str, Any]],
        backend: str | None,
    ):
        self.owner = owner
        self.rule = rule
        self._state = state
        self._options = [None] * len(param_groups)
        self._read_options(param_groups)
        self._fresh: list[tuple[torch.Tensor, list[str]]] = []

        entries = self._collect(param_groups)
        chosen = {device: backends.choose(device, backend) for device in {entry.param.device for entry in entries}}
        try:
            for entry in entries:
                self._attach_state(entry, param_groups[entry.group], state)
            self._check_overlap([entry for entry in entries if not entry.is_idle])
        except BaseException:
            self.discard_fresh_state()
            raise
        is_double = any(entry.param.dtype == torch.float64 for entry in entries)
        self.norm_dtype = torch.float64 if is_double else torch.float32
        self.norm_device = entries[0].param.device if entries else torch.device("cpu")
        self.buckets = []
        for device, module in chosen.items():
            self.buckets.append(module.Bucket(rule, [entry for entry in entries if entry.param.device == device]))
        self._watch = _C.Watch(param_groups, state)
        # The watch and the buckets compare addresses: as long as they live, nothing else may come to live at one of them.
        self._pinned = (
            [[group["params"], *group["params"]] for group in param_groups],
            [[values, *values.values()] for values in state.values()],
            [tensor.untyped_storage() for entry in entries for tensor in entry.states if tensor is not None],
        )

    # ---- is the plan still right? ------------------------------------------------------------------------------

    def refresh(self, param_groups: list[dict[str, Any]], state: dict[torch.Tensor, dict[str, Any]]) -> bool:
        """Reads hyperparameters and gradient addresses of this step. False: make a new plan; nothing was changed."""
        return (
            len(param_groups) == len(self._options)
            and self._watch.unchanged(param_groups, state)
            and self._read_options(param_groups)
            and all([bucket.refresh() for bucket in self.buckets])  # noqa: C419  each must read its gradients
        )

    def _read_options(self, param_groups: list[dict[str, Any]]) -> bool:
        """Takes over the groups' hyperparameters, validated where they changed. False: they select other kernels."""
        is_same_kernel = True
        known = list(self._options)  # replaced only when all groups are valid: a refusal must not lose a change
        for index, group in enumerate(param_groups):
            try:
                options = (self.rule.scalars(group), bool(group["maximize"]), self.rule.variant(group))
                if options == known[index]:
                    continue
                check_options(self.rule, group)
            except (ValueError, TypeError, KeyError) as error:
                reason = f"{error} is missing" if isinstance(error, KeyError) else error
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"{self.owner}: param_groups[{index}]: {reason}; {UNCHANGED}") from None
            is_same_kernel &= known[index] is None or known[index][2] == options[2]
            known[index] = options
        self._options = known
        self.scalars = [options[0] for options in self._options]
        self.signs = [-1.0 if options[1] else 1.0 for options in self._options]
        return is_same_kernel

    # ---- what a step does --------------------------------------------------------------------------------------

    def grad_norm(self) -> float:
        """2-norm of all gradients, as they are stored."""
        norms = [bucket.grad_norm() for bucket in self.buckets]
        return norms[0] if len(norms) == 1 else combine_norms(norms)

    def first_nonfinite(self) -> Entry | None:
        """The first parameter, in bucket order, whose gradient holds NaN or infinity."""
        for bucket in self.buckets:
            index = bucket.first_nonfinite()
            if index >= 0:
                return bucket.entries[index]
        return None

    def update(self, coef: float) -> None:
        """Advances every parameter that has a gradient by one step, its gradient times ``coef``."""
        grad_coefs = [sign * coef for sign in self.signs]
        for bucket in self.buckets:
            bucket.update(self.scalars, grad_coefs)
        self._fresh = []

    def release(self) -> None:
        """Lets go of the gradients that `refresh` held."""
        for bucket in self.buckets:
            bucket.release()

    def discard_fresh_state(self) -> bool:
        """Removes the state that this plan made and no update has used. True if there was any: the plan is then void."""
        for param, names in self._fresh:
            for name in names:
                self._state[param].pop(name, None)
            if not self._state[param]:
                del self._state[param]
        had_any = bool(self._fresh)
        self._fresh = []
        return had_any

    @property
    def has_fresh_state(self) -> bool:
        return bool(self._fresh)

    # ---- making it ---------------------------------------------------------------------------------------------

    def _fail(self, kind: type[Exception], entry: Entry, reason: str) -> None:
        raise kind(f"{self.owner}: {entry}: {reason}; {UNCHANGED}")

    def _collect(self, param_groups: list[dict[str, Any]]) -> list[Entry]:
        """An entry for every parameter, once, checked against its gradient."""
        entries, seen = [], set()
        for g, group in enumerate(param_groups):
            names = group.get("param_names") or itertools.repeat(None)
            for i, (param, name) in enumerate(zip(group["params"], names, strict=False)):
                if id(param) in seen:
                    continue
                seen.add(id(param))
                variant = self._options[g][2]
                entry = Entry(param, g, i, name, variant, [None] * len(self.rule.states), None, None)
                if param.grad is not None:
                    self._check_param(entry)
                    self._check_grad(entry, param.grad)
                entries.append(entry)
        return entries

    def _check_param(self, entry: Entry) -> None:
        param = entry.param
        if param.dtype not in PARAM_DTYPES:
            supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in PARAM_DTYPES)
            self._fail(TypeError, entry, f"parameters of this dtype are not supported (supported: {supported})")
        self._check_plain(entry, param, "parameter")
        if param.numel() > 0 and _overlaps_itself(param):
            self._fail(RuntimeError, entry, f"several of its elements share one address, strides {param.stride()}")

    def _check_grad(self, entry: Entry, grad: torch.Tensor) -> None:
        self._check_plain(entry, grad, "gradient")
        param = entry.param
        if grad.shape != param.shape:
            self._fail(RuntimeError, entry, f"gradient has shape {tuple(grad.shape)}")
        if grad.device != param.device:
            self._fail(RuntimeError, entry, f"gradient is on {grad.device}")
        if grad.dtype not in grad_dtypes(param):
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in grad_dtypes(param))
            self._fail(
                RuntimeError, entry, f"gradient is {short_dtype(grad)} (supported for this parameter: {allowed})"
            )

    def _check_plain(self, entry: Entry, tensor: torch.Tensor, what: str) -> None:
        """A strided tensor with memory of its own; not sparse, nested, meta, nor a subclass that dispatches itself."""
        if tensor.layout != torch.strided or tensor.is_nested:
            layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
            self._fail(RuntimeError, entry, f"{what} has layout {layout}; only dense tensors are supported")
        if tensor.is_meta:
            self._fail(RuntimeError, entry, f"{what} is on the meta device, it has no values")
        if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            self._fail(TypeError, entry, f"{what} is a {type(tensor).__name__}; this tensor subclass is not supported")
        if tensor.is_neg():
            self._fail(RuntimeError, entry, f"{what} is a lazy negative view; call resolve_neg() on it")

    def _check_overlap(self, entries: list[Entry]) -> None:
        """Two dense parameters over the same memory would race."""
        spans = []
        for entry in entries:
            param = entry.param
            if param.numel() > 0 and _is_dense(param):
                begin = param.data_ptr()
                spans.append((str(param.device), begin, begin + param.numel() * param.element_size(), entry))
        spans.sort(key=lambda span: span[:2])
        for (device, _, end, entry), (next_device, begin, _, other) in itertools.pairwise(spans):
            if device == next_device and begin < end:
                self._fail(ValueError, other, f"shares memory with {entry}; give the optimizer one of them")

    def _attach_state(self, entry: Entry, group: Mapping[str, Any], state: dict[torch.Tensor, dict[str, Any]]) -> None:
        """Checks the state there is, makes what is missing if the parameter has a gradient, and puts it in the entry."""
        param, rule = entry.param, self.rule
        known = state.get(param, {})
        slots = rule.stored(group)
        if param.grad is None:
            # Idle until its first gradient, unless there is nothing left to be made for it.
            is_complete = all(known.get(slot.name) is not None for slot in slots if slot)
            if not is_complete or param.dtype not in PARAM_DTYPES or (rule.keeps_step and "step" not in known):
                return
            self._check_param(entry)

        is_new = not any(slot and known.get(slot.name) is not None for slot in slots)
        made: dict[str, torch.Tensor] = {}
        scalars = {"step": 0.0} if rule.keeps_step else {}
        if rule.extra:
            scalars[rule.extra] = 1.0
        for name, initial in scalars.items():
            # As torch: a plain 0-d float32 on the host; what multiplies up over the run, in the states' dtype.
            dtype = torch.float32 if name == "step" else state_dtype(param)
            value = known.get(name)
            if not _is_scalar_of(value, dtype):
                made[name] = torch.tensor(initial if value is None else float(value), dtype=dtype)
        for i, slot in enumerate(slots):
            if slot is None:
                continue
            value = known.get(slot.name)
            if value is None:
                value = torch.zeros_like(param, dtype=state_dtype(param), requires_grad=False)
                if slot.initial is not None:
                    value.fill_(float(group[slot.initial]))
                made[slot.name] = value
            self._check_state(entry, slot.name, value)
            entry.states[i] = value
        if made:
            self._fresh.append((param, [name for name in made if known.get(name) is None]))
            state[param].update(made)
            known = state[param]
        # A rule without a step of its own still has to know its first one.
        entry.step = known["step"] if rule.keeps_step else torch.tensor(0.0 if is_new else 1.0)
        entry.extra = known[rule.extra] if rule.extra else None
        tensors = [
            param,
            *([param.grad] if param.grad is not None else []),
            *(s for s in entry.states if s is not None),
        ]
        entry.is_strided = not all(_is_dense(t) and _same_strides(t, param) for t in tensors)

    def _check_state(self, entry: Entry, name: str, value: Any) -> None:
        param = entry.param
        what = f"state {name!r}"
        if not isinstance(value, torch.Tensor):
            self._fail(TypeError, entry, f"{what} is a {type(value).__name__}, not a tensor")
        self._check_plain(entry, value, what)
        if value.shape != param.shape:
            self._fail(ValueError, entry, f"{what} has shape {tuple(value.shape)}")
        if value.device != param.device:
            self._fail(ValueError, entry, f"{what} is on {value.device}")
        if value.dtype != state_dtype(param):
            expected = str(state_dtype(param)).removeprefix("torch.")
            self._fail(TypeError, entry, f"{what} is {short_dtype(value)}, not {expected}")
        if value.numel() > 0 and _overlaps_itself(value):
            self._fail(RuntimeError, entry, f"several elements of {what} share one address")


def combine_norms(norms: list[float]) -> float:
    """The 2-norm of parts whose 2-norms are given, without overflow on the way."""
    largest = max(norms, default=0.0)
    if not 0 < largest < float("inf"):
        return sum(norms)  # 0, inf or NaN
    return largest * sum((norm / largest) ** 2 for norm in norms) ** 0.5


def _is_scalar_of(value: Any, dtype: torch.dtype) -> bool:
    """Whether a value is what the engines count in: a 0-d tensor of that dtype in host memory."""
    return isinstance(value, torch.Tensor) and value.dtype == dtype and value.dim() == 0 and value.device.type == "cpu"


def _dims(tensor: torch.Tensor) -> list[tuple[int, int]]:
    """(stride, size) of every dimension that has more than one element, innermost first."""
    return sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements fill one block of memory, in any order of dimensions."""
    expected = 1
    for stride, size in _dims(tensor):
        if stride != expected:
            return False
        expected *= size
    return True


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements may share an address: a dimension steps no further than the ones inside it reach."""
    reach = 0
    for stride, size in _dims(tensor):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _same_strides(a: torch.Tensor, b: torch.Tensor) -> bool:
    return all(s == t or size == 1 for size, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))

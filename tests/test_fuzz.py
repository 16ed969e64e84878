"""Random tensors, options and lives of an optimizer, each against a plain loop over the functions of reference.py.

Three parts: one to four steps of random parameter lists; the same at the edge of memory that must not be touched; and
sequences of everything a training script does to an optimizer.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import inspect
import itertools
import math
import os
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import guarded
import numpy as np
import pytest
import torch
from cases import (
    CASES,
    DTYPES,
    POWER_ERROR,
    StepCount,
    can_mix_dtypes,
    keywords,
    random_grads,
    random_params,
    set_grad,
)
from helpers import Spec, every_class, same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from fusedopt import _C, reference
from fusedopt.checks import PARAM_DTYPES, grad_dtypes
from fusedopt.entry import compute_dtype
from fusedopt.ranges import RANGES
from fusedopt.rules import read_options

BACKENDS = tuple(os.environ.get("FUZZ_BACKENDS", "cpu cuda reference").split())  # Triton's interpreter is slow

# `make fuzz N=20000` sets it: so many examples a class, random, and a tenth of that many lives. Else few, always the same.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
COMMON = settings(
    deadline=None, database=None, derandomize=not EXAMPLES, print_blob=True, suppress_health_check=list(HealthCheck)
)
VALUE_SETTINGS = settings(COMMON, max_examples=EXAMPLES or 300)
LIFE_SETTINGS = settings(COMMON, max_examples=EXAMPLES // 10 or 50, stateful_step_count=20)


@pytest.fixture(autouse=True)
def same_threads_and_isa_afterwards():
    num_threads, isa = torch.get_num_threads(), _C.isa()
    yield
    torch.set_num_threads(num_threads)
    _C.set_isa(isa)


# ---- how far rounding can go -------------------------------------------------------------------------------------


class Rounded:
    """Values in float64, each with a bound on what computing it in another precision can have added to it.

    Running error analysis (Wilkinson; Higham, Accuracy and Stability of Numerical Algorithms, 3.3): every operation adds
    half an ulp of its result and carries on the errors of its operands, by their exact worst case. A plain number is
    rounded to that precision first. The functions of reference.py run on it as on tensors, so cancellation (g + λθ, v − ḡ²,
    Lion's sign) widens the bound as much as it should, and of a new rule nothing need be known. An infinite bound says
    that any result may come out: of a denominator that rounding can make 0, say. A comparison is of this class too: bools,
    with an infinite bound where rounding can change the answer.
    """

    __slots__ = ("error", "info", "value")

    def __init__(self, value: np.ndarray, error: np.ndarray | float, info: torch.finfo):
        self.value, self.error, self.info = value, error, info

    @classmethod
    def exactly(cls, tensor: torch.Tensor, info: torch.finfo) -> Rounded:
        return cls(numbers(tensor), 0.0, info)

    def _result(self, value, carried, operands_to_round: int = 0, tiny: float = 1.0) -> Rounded:
        """One operation: half an ulp, and another for every plain number in it; the smallest subnormal, times `tiny`."""
        magnitude = np.abs(value)
        error = carried + (1 + operands_to_round) * (self.info.eps / 2) * magnitude
        error = np.where((value == 0) & (carried == 0), 0.0, error + tiny * self.info.smallest_normal * self.info.eps)
        beyond = magnitude + error > self.info.max
        if beyond.any():
            error = np.where(beyond, np.inf, error)
        return Rounded(value, error, self.info)

    def __add__(self, other):
        if isinstance(other, Rounded):
            return self._result(self.value + other.value, self.error + other.error)
        return self._result(self.value + other, self.error + self.info.eps / 2 * abs(other))

    def __mul__(self, other):
        if isinstance(other, Rounded):
            if self.info != other.info:
                coarser = max(self.info, other.info, key=lambda info: info.eps)
                return self._in(coarser) * other._in(coarser)
            carried = np.abs(self.value) * other.error + self.error * (np.abs(other.value) + other.error)
            return self._result(self.value * other.value, carried)
        return self._result(self.value * other, self.error * abs(other), 1, 1 + np.abs(self.value))

    def __truediv__(self, other):
        if not isinstance(other, Rounded):
            return self._result(self.value / other, self.error / abs(other), 1, 1 + np.abs(self.value))
        value, smallest = self.value / other.value, np.abs(other.value) - other.error
        carried = np.where(smallest > 0, (self.error + np.abs(value) * other.error) / smallest, np.inf)
        return self._result(value, carried)

    def __neg__(self):
        return Rounded(-self.value, self.error, self.info)

    def __sub__(self, other):
        return self + -other

    def __rsub__(self, other):
        return -self + other

    def __rtruediv__(self, other):
        return self._rounded(other) / self

    def __gt__(self, other):
        return self._is(self.value > other, other)

    def __lt__(self, other):
        return self._is(self.value < other, other)

    def _is(self, answer, other):
        is_certain = (self.error == 0) | (np.abs(self.value - other) > self.error)
        return Rounded(answer, np.where(is_certain, 0.0, np.inf), self.info)

    def __and__(self, other):
        return Rounded(self.value & other.value, np.maximum(self.error, other.error), self.info)

    def _rounded(self, number: float) -> Rounded:
        return Rounded(np.float64(number), self.info.eps / 2 * abs(number), self.info)

    def _in(self, info: torch.finfo) -> Rounded:
        """Rounded to that precision, if it is another."""
        return self if self.info == info else Rounded(self.value, self.error, info)._result(self.value, self.error)

    def double(self):
        return Rounded(self.value, self.error, torch.finfo(torch.float64))

    def item(self):
        return self

    def square(self):
        return self * self

    def sum(self):
        """In any order."""
        error = np.broadcast_to(self.error, self.value.shape)
        largest = (np.abs(self.value) + error).sum()
        error = error.sum() + self.value.size * self.info.eps / 2 * largest
        return Rounded(self.value.sum(), np.where(largest > self.info.max, np.inf, error), self.info)

    def mean(self):
        return self.sum() / float(self.value.size or np.nan)

    def __pow__(self, exponent):
        assert exponent == 2
        return self * self

    __radd__, __rmul__ = __add__, __mul__

    def sqrt(self):
        root, low = np.sqrt(self.value), np.sqrt(np.maximum(self.value - self.error, 0))
        return self._result(root, np.maximum(np.sqrt(self.value + self.error) - root, root - low))

    def clamp(self, min):
        return Rounded(np.maximum(self.value, min), np.maximum(self.error, self.info.eps / 2 * min), self.info)

    def isnan(self) -> torch.Tensor:
        return torch.from_numpy(np.asarray(np.isnan(self.value)))

    def sign(self):
        """Certain, or anything from -1 to 1."""
        return Rounded(np.sign(self.value), np.where(np.abs(self.value) <= self.error, 2.0, 0.0), self.info)

    @classmethod
    def __torch_function__(cls, function, types, args, kwargs=None):
        if function is torch.maximum:
            a, b = args
            return cls(np.maximum(a.value, b.value), np.maximum(a.error, b.error), a.info)
        assert function is torch.where, f"{function} is not known to Rounded"
        condition, a, b = args
        if not isinstance(condition, cls):
            condition = cls(condition.numpy(), 0.0, a.info)
        if not isinstance(b, cls):
            b = a._rounded(b)
        value, error = (np.where(condition.value, x, y) for x, y in ((a.value, b.value), (a.error, b.error)))
        either = np.nan_to_num(np.abs(a.value - b.value) + np.maximum(a.error, b.error), nan=np.inf)
        return cls(value, np.where(condition.error > 0, either, error), a.info)

    def bound(self, stored: torch.dtype) -> np.ndarray:
        """The largest distance from `value` at which a result of that dtype may lie.

        Twice the error of the textbook's order, since a kernel's may round twice where that rounds once; for float64 once
        more, for the rounding of `value` itself. Another half ulp where a 16-bit format stores it.
        """
        bound = self.error * (3 if self.info.eps < 1e-10 else 2)
        narrow = torch.finfo(stored)
        if narrow.eps > self.info.eps:
            _, exponent = np.frexp(np.maximum(np.abs(self.value) + bound, narrow.smallest_normal))
            bound = bound + np.ldexp(narrow.eps / 2, exponent - 1)
        return np.where(np.abs(self.value) + bound > narrow.max, np.inf, bound)


def real(tensor: torch.Tensor) -> torch.Tensor:
    """Complex numbers as pairs of real ones."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def numbers(tensor: torch.Tensor) -> np.ndarray:
    return real(tensor.detach()).double().numpy()


# ---- the plain loop ----------------------------------------------------------------------------------------------


@dataclass
class Tracked:
    """What a parameter should be: copies of its own, never read from the optimizer."""

    param: torch.Tensor
    group: int
    value: torch.Tensor
    grad: torch.Tensor | None = None
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    clipped: str | None = None  # since the deferred clip its gradient was "seen", or "written" to


class Loop:
    """An optimizer in a few lines: for each parameter the function of reference.py, from the values it had before.

    Every step starts from what the optimizer under test stored, once that is found within the bound, so that no error
    is let through because of earlier ones.
    """

    def __init__(self, spec: Spec, optimizer, tally: Counter):
        self.rule, self.optimizer, self.tally = spec.rule, optimizer, tally
        self.tracked: dict[int, Tracked] = {}
        self.groups: list[dict[str, Any]] = []
        self.pending: float | None = None  # the coefficient of a deferred clip
        self.skipped = 0
        self.has_other_powers = optimizer.backend == "triton"
        for group in optimizer.param_groups:
            self.add_group(group)

    def add_group(self, group: dict[str, Any]) -> None:
        for param in group["params"]:
            self.tracked[id(param)] = Tracked(param, len(self.groups), param.detach().clone())
        self.groups.append({name: value for name, value in group.items() if name != "params"})

    def set_grad(self, param: torch.Tensor, grad: torch.Tensor | None) -> None:
        tracked = self.tracked[id(param)]
        tracked.grad, tracked.clipped = None if grad is None else grad.clone(), None

    def write_grad(self, param: torch.Tensor, grad: torch.Tensor) -> None:
        tracked = self.tracked[id(param)]
        tracked.grad, tracked.clipped = grad.clone(), tracked.clipped and "written"

    def active(self) -> list[Tracked]:
        return [tracked for tracked in self.tracked.values() if tracked.grad is not None]

    # ---- clipping

    def norm(self) -> float:
        return float(reference.total_norm([real(tracked.grad) for tracked in self.active()]))

    def clip(self, max_norm: float) -> None:
        if not any(tracked.clipped for tracked in self.active()):
            self.pending = None
        pending = 1.0 if self.pending is None else self.pending
        self.pending = pending * clip_coefficient(self.norm() * pending, max_norm)
        for tracked in self.tracked.values():
            tracked.clipped = "seen" if tracked.grad is not None else None

    def refuses_clip(self) -> bool:
        return self.refuses_step() and any(tracked.clipped for tracked in self.active())

    def refuses_step(self) -> bool:
        return self.pending is not None and any(tracked.clipped != "seen" for tracked in self.active())

    def forget_clip(self) -> None:
        self.pending = None
        for tracked in self.tracked.values():
            tracked.clipped = None

    def skip(self) -> None:
        self.skipped += 1
        self.forget_clip()

    # ---- the step

    def step(self, grad_scale: float = 1.0, max_grad_norm: float | None = None) -> None:
        """Computes one, compares what the optimizer made of its own, and goes on from that."""
        coef = (1.0 if self.pending is None else self.pending) / grad_scale
        if max_grad_norm is not None:
            coef *= clip_coefficient(self.norm() * coef, max_grad_norm)
        self.forget_clip()
        count = sum(tracked.grad.numel() for tracked in self.active())
        # A norm of float64 gradients is itself rounded: a sum in sixteen parts, a root, a division.
        error = abs(coef) * 2.0**-53 * (0 if coef == 1 else 16 + count / 16)
        for tracked in self.active():
            with np.errstate(all="ignore"):
                self._update(tracked, coef, error)

    def _update(self, tracked: Tracked, coef: float, coef_error: float) -> None:
        param, group, info = tracked.param, self.groups[tracked.group], torch.finfo(compute_dtype(tracked.param))
        function, optimizer_state = getattr(reference, self.rule.name), self.optimizer.state.get(param, {})
        stored = [slot for slot in self.rule.stored(group) if slot is not None]
        is_first = not any(slot.name in tracked.state for slot in stored)
        state: dict[str, Any] = {}
        for slot in stored:
            if slot.name not in tracked.state:
                initial, dtype = float(group[slot.initial]) if slot.initial else 0.0, compute_dtype(param)
                dtype = dtype.to_complex() if param.is_complex() else dtype
                initial = complex(initial, initial) if param.is_complex() else initial  # of each of the pair
                tracked.state[slot.name] = torch.full_like(param, initial, dtype=dtype, requires_grad=False)
            state[slot.name] = Rounded.exactly(tracked.state[slot.name], info)
        if self.rule.extra:
            state[self.rule.extra] = float(tracked.state.get(self.rule.extra, 1.0))
        step = 1.0 if is_first else 2.0  # what a rule without a count has to know
        if self.rule.keeps_step:
            step = float(tracked.state.get("step", 0.0)) + 1
        scale = Rounded(np.float64(coef), np.float64(coef_error), info)
        grad = Rounded.exactly(tracked.grad, info) * scale
        options = {name: group[name] if name in group else self.rule.own_options[name] for name in keywords(function)}
        start = Rounded.exactly(tracked.value, info), grad, dict(state)
        value = function(start[0], grad, state, step, **options)
        if self.has_other_powers and info.eps < 1e-10:
            value.error = value.error + self._spread_of_powers(function, options, start, step, value)

        self._compare("parameter", param, value, np.isnan(grad.value))
        tracked.value = param.detach().clone()
        for slot in stored:
            found, before = optimizer_state[slot.name], tracked.state[slot.name]
            assert (found.dtype, found.shape) == (before.dtype, before.shape), slot.name
            self._compare(slot.name, found, state[slot.name], np.isnan(grad.value))
            tracked.state[slot.name] = found.clone()
        if self.rule.keeps_step:
            tracked.state["step"] = torch.tensor(step)
        if self.rule.extra:
            found = optimizer_state[self.rule.extra]
            bound = torch.finfo(found.dtype).eps * state[self.rule.extra] + self.has_other_powers * POWER_ERROR
            assert abs(float(found) - state[self.rule.extra]) <= bound
            tracked.state[self.rule.extra] = found.clone()

    def _spread_of_powers(self, function, options, start, step: float, value: Rounded) -> np.ndarray:
        """As in cases.Oracle: what a difference of POWER_ERROR in each power changes. In float32 `Rounded` covers it."""
        shifts: dict[tuple[float, float], float] = {}
        param, grad, state = start
        function(param, grad, dict(state), StepCount(step, shifts), **options)
        spread = np.zeros_like(value.value)
        for power in shifts:
            count = StepCount(step, {**shifts, power: POWER_ERROR * 2**20})
            moved = function(param, grad, dict(state), count, **options)
            spread += np.nan_to_num(np.abs(moved.value - value.value) / 2**20, nan=0.0, posinf=np.inf)
        return spread

    def _compare(self, what: str, found: torch.Tensor, expected: Rounded, is_nan: np.ndarray) -> None:
        bound, value = expected.bound(found.dtype), numbers(found)
        is_bounded = np.isfinite(bound)
        difference = np.abs(value - expected.value)
        is_wrong = is_bounded & ~(difference <= bound) | is_nan & ~np.isnan(value)
        if is_wrong.any():
            where = tuple(int(i) for i in np.argwhere(is_wrong)[0])
            raise AssertionError(
                f"{what} of shape {tuple(found.shape)} is {value[where]!r} at {where}, not {expected.value[where]!r} "
                f"within {bound[where]:.3g}"
            )
        self.tally["elements"] += is_bounded.size
        self.tally["bounded"] += int(is_bounded.sum())

    # ---- checkpoints

    def checkpoint(self, optimizer) -> list[tuple[dict[str, Any], list[dict[str, torch.Tensor]]]]:
        """Options and states by position, as in a state_dict."""
        states = [[{**self.tracked[id(param)].state} for param in group["params"]] for group in optimizer.param_groups]
        return list(zip(map(dict, self.groups), states, strict=True))

    def restore(self, optimizer, checkpoint) -> None:
        self.optimizer = optimizer
        self.groups = [dict(group) for group, _ in checkpoint]
        for group, (_, states) in zip(optimizer.param_groups, checkpoint, strict=True):
            for param, state in zip(group["params"], states, strict=True):
                self.tracked[id(param)].state = {**state}
        self.forget_clip()

    # ---- is everything as it should be?

    def check(self) -> None:
        """Bit for bit: between steps nothing moves but what the user moves."""
        optimizer = self.optimizer
        assert optimizer.skipped_steps == self.skipped
        assert len(optimizer.param_groups) == len(self.groups)
        for g, (group, expected) in enumerate(zip(optimizer.param_groups, self.groups, strict=True)):
            assert {name: value for name, value in group.items() if name != "params"} == expected
            assert all(self.tracked[id(param)].group == g for param in group["params"])
        self.check_tensors()

    def check_tensors(self) -> None:
        optimizer = self.optimizer
        assert set(map(id, optimizer.state)) <= self.tracked.keys()
        for tracked in self.tracked.values():
            param = tracked.param
            assert same_bits(param, tracked.value), "a parameter changed"
            assert (param.grad is None) == (tracked.grad is None)
            assert param.grad is None or same_bits(param.grad, tracked.grad), "a gradient changed"
            state = optimizer.state.get(param, {})
            assert state.keys() == tracked.state.keys(), f"states are {[*state]}, not {[*tracked.state]}"
            for name, value in tracked.state.items():
                assert same_bits(state[name], value), f"{name} changed"


def clip_coefficient(norm: float, max_norm: float) -> float:
    return float(reference.clip_coefficient(torch.tensor(norm, dtype=torch.float64), max_norm))


def take_step(optimizer, loop: Loop, grad_scale: float = 1.0) -> None:
    """A step of both; versions move for what took part and for nothing else."""
    active = {id(tracked.param) for tracked in loop.active()}
    params = [tracked.param for tracked in loop.tracked.values()]
    versions = [(param._version, param.grad, None if param.grad is None else param.grad._version) for param in params]
    optimizer.step()
    for param, (version, grad, grad_version) in zip(params, versions, strict=True):
        assert (param._version > version) == (id(param) in active), "autograd must notice a write, and only a write"
        assert param.grad is grad
        assert grad is None or grad._version == grad_version
    loop.step(grad_scale, optimizer.max_grad_norm)


# ---- random tensors ----------------------------------------------------------------------------------------------


def one_of_each(**axes) -> st.SearchStrategy:
    """A dict with one of the values of every axis, in a single draw: draws are what an example costs most."""
    sizes = [len(values) for values in axes.values()]

    def decode(index: int) -> dict[str, Any]:
        chosen = {}
        for (name, values), size in zip(axes.items(), sizes, strict=True):
            index, i = divmod(index, size)
            chosen[name] = values[i]
        return chosen

    return st.integers(0, math.prod(sizes) - 1).map(decode)


# Around every vector width, the tile of 256 elements, and shapes of every number of dimensions.
EDGE_SIZES = (1, 0, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 257, 511, 512, 513, 1021, 2999)
SHAPES = (
    *((size,) for size in EDGE_SIZES),
    *((), (0, 3), (3, 0), (1, 1), (2, 0, 2)),
    *itertools.product((1, 3, 8), (1, 7, 16, 33)),
    *itertools.product((1, 3), (2, 5), (1, 3, 8)),
    *itertools.product((1, 2), (1, 3, 5), (2, 3), (1, 4)),
)


@dataclass(frozen=True)
class Layout:
    """How a shape lies in memory: the order of its dimensions, gaps between elements and rows, misalignment."""

    order: int  # 0: contiguous, 1: reversed (transposed), 2: second dimension innermost (channels_last), more: shuffled
    gap: int  # elements skipped after each
    row_gap: int  # elements skipped after each row
    offset: int  # elements before the first
    expanded: int = 0  # bit i: all indices along dimension i share their memory

    def strides(self, shape: tuple[int, ...]) -> list[int]:
        dims = list(range(len(shape)))
        if self.order == 1:
            dims.reverse()
        elif self.order == 2 and len(dims) > 2:
            dims.append(dims.pop(1))
        elif self.order > 2:
            random.Random(self.order).shuffle(dims)
        strides, stride = [0] * len(shape), 1 + self.gap
        for dim in reversed(dims):
            if not self.expanded >> dim & 1:
                strides[dim] = stride
                stride = stride * max(shape[dim], 1) + self.row_gap
        return strides


LAYOUT_AXES = {"order": range(7), "gap": (0, 0, 1, 2), "row_gap": (0, 0, 1, 4), "offset": range(16)}


class Placed:
    """A tensor in a block of memory of its own, which holds NaN of every dtype around and between its elements."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout):
        strides = layout.strides(shape)
        reach = sum(stride * max(size - 1, 0) for size, stride in zip(shape, strides, strict=True))
        extent = layout.offset + 1 + reach + 16
        self.memory = torch.full((extent * dtype.itemsize,), 0xFF, dtype=torch.uint8)
        self._view = (layout.offset, shape, strides)
        self.tensor = self.over(self.memory, dtype)
        self.before = None

    def over(self, memory: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The tensor over that memory, counting versions of its own."""
        return torch.empty(0, dtype=dtype).set_(memory.untyped_storage(), *self._view)

    def watch(self) -> None:
        self.before = self.memory.clone()

    def check_surroundings(self) -> None:
        """Nothing was written but elements."""
        self.over(self.before, self.tensor.dtype).copy_(self.tensor.detach())
        assert torch.equal(self.before, self.memory), "memory beside the tensor was written to"

    def check_untouched(self) -> None:
        assert torch.equal(self.before, self.memory), "the gradient's memory was written to"


class Values:
    """Numbers from 1e-6 to 1e2 with zeros among them, so that eps, moments and clip all matter somewhere.

    Gradients are that times `magnitude`, unless they are float16.
    """

    pool = None

    def __init__(self, seed: int, magnitude: float = 1.0):
        if Values.pool is None:
            generator = torch.Generator().manual_seed(20)
            wide = 10.0 ** (8 * torch.rand(1 << 15, generator=generator, dtype=torch.float64) - 6)
            Values.pool = wide * torch.randn(1 << 15, generator=generator, dtype=torch.float64)
            Values.pool[::19] = 0.0
        self._random, self._magnitude = random.Random(seed), magnitude

    def fill(self, tensor: torch.Tensor, magnitude: float = 1.0) -> torch.Tensor:
        view = real(tensor.detach())
        start = self._random.randrange(len(self.pool) - view.numel())
        numbers = self.pool[start : start + view.numel()]
        view.copy_((numbers if magnitude == 1 else numbers * magnitude).view(view.shape))
        return tensor

    def fill_grad(self, grad: torch.Tensor) -> torch.Tensor:
        """Along an expanded dimension all elements are one."""
        size = [1 if stride == 0 else size for size, stride in zip(grad.shape, grad.stride(), strict=True)]
        magnitude = self._magnitude if torch.finfo(grad.dtype).max > 1e30 else 1.0
        self.fill(grad.as_strided(size, grad.stride()) if 0 in grad.stride() and grad.numel() else grad, magnitude)
        return grad


@dataclass(frozen=True)
class Recipe:
    """How to make a parameter, and gradients for it in two layouts."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    grad_dtype: torch.dtype
    layout: Layout
    grad_layouts: tuple[Layout, Layout]


@functools.cache
def grad_dtypes_of(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    return grad_dtypes(torch.empty(0, dtype=dtype)) if can_mix_dtypes() else (dtype,)


def make_recipe(shape, dtypes, layout, grad_layout) -> Recipe:
    is_first_same, is_expanded = grad_layout.pop("is_first_same"), grad_layout.pop("is_expanded")
    expanded = grad_layout["expanded"] * is_expanded
    own, other = Layout(**layout), Layout(**{**grad_layout, "expanded": expanded})
    return Recipe(shape, *dtypes, own, (own if is_first_same else other, other))


DTYPE_PAIRS = [(dtype, grad_dtype) for dtype in PARAM_DTYPES for grad_dtype in grad_dtypes_of(dtype)]
params = st.builds(
    make_recipe,
    st.sampled_from(SHAPES),
    st.sampled_from(DTYPE_PAIRS),
    one_of_each(**LAYOUT_AXES),
    one_of_each(
        **LAYOUT_AXES, is_first_same=(True, False), is_expanded=(False, False, False, True), expanded=range(1, 16)
    ),
)


# ---- random options, from the table ------------------------------------------------------------------------------


def edges(name: str) -> tuple:
    """Values of one hyperparameter at and near its bounds; a name without bounds is a switch."""
    low, high, includes_high = RANGES.get(name, (None, None, None))
    if low is None:
        return (False, True)
    if high == 1:
        return (0.9, 0.0, 0.5, 0.999, 0.9999, *([1.0] if includes_high else []))
    if name == "eps":
        return (1e-8, 1e-30, 1e-3, 1.0, 0.0)
    return (0.0, 1e-3, 0.125, 0.9, 1.0, 10.0, *([-0.5] if low < 0 else []))


def options(spec: Spec) -> st.SearchStrategy:
    """Valid arguments of the class, all of them: a switch that the others forbid is off."""
    accepted = set(inspect.signature(spec.cls.__init__).parameters)
    if spec.name == "AdamW":
        accepted -= {"decoupled_weight_decay"}  # always True
    axes = {name: edges(name) for name in spec.rule.hyper if name in accepted}
    for state in spec.rule.states:
        if state.option is not None:
            axes.setdefault(state.option, (False, True))
        if state.initial is not None:
            axes[state.initial] = (0.0, 0.5)
    if "betas" in accepted:
        axes["betas"] = tuple(itertools.product(*map(edges, spec.rule.betas)))
    defaults = spec.cls([torch.zeros(1)]).defaults

    def valid(drawn: dict[str, Any]) -> dict[str, Any]:
        try:
            read_options(spec.rule, {**defaults, **drawn})
            return drawn
        except ValueError:
            return {name: False if isinstance(value, bool) else value for name, value in drawn.items()}  # switches off

    return one_of_each(**axes, maximize=(False, True)).map(valid)


# ---- one to four steps -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    backend: str
    isa: str
    clip: str
    max_norm: float
    grad_scale: float | None
    is_poisoned: bool  # one element of the first gradient is NaN
    magnitude: float  # of gradients whose dtype can hold it
    groups: list[tuple[dict[str, Any], list[Recipe]]]
    steps: list[dict[str, str]]  # for each step and parameter, what its gradient becomes
    seed: int


EXAMPLE_AXES = {
    "backend": BACKENDS,
    "isa": _C.available_isas(),
    "clip": ("none", "constructor", "deferred"),
    "max_norm": (1.0, 0.01, 1e6, 0.0),
    "grad_scale": (None, None, 1.0, 0.3, 65536.0),
    "is_poisoned": (*[False] * 15, True),
    "magnitude": (1.0, 1.0, 1.0, 1e-19, 1e18),
}
GRAD_CHANGES = ("new", "in place", "other layout", "none", "kept")


def examples(spec: Spec) -> st.SearchStrategy:
    groups = st.tuples(options(spec), st.lists(params, min_size=1, max_size=2))
    return st.builds(
        lambda axes, groups, steps, seed: Example(**axes, groups=groups, steps=steps, seed=seed),
        one_of_each(**EXAMPLE_AXES),
        st.lists(groups, min_size=1, max_size=2),
        st.lists(one_of_each(**{str(i): GRAD_CHANGES for i in range(4)}), min_size=1, max_size=4),
        st.integers(0, 1 << 16),
    )


def run_example(spec: Spec, example: Example, tally: Counter) -> None:
    values = Values(example.seed, example.magnitude)
    _C.set_isa(example.isa)
    recipes, placed, groups = [], [], []
    for given_options, group_recipes in example.groups:
        params = []
        for recipe in group_recipes:
            place = Placed(recipe.shape, recipe.dtype, recipe.layout)
            values.fill(place.tensor)
            params.append(torch.nn.Parameter(place.tensor))
            recipes.append(recipe)
            placed.append((params[-1], place))
        groups.append({"params": params, **given_options})
    max_grad_norm = (example.max_norm or 1e-9) if example.clip == "constructor" else None
    optimizer = spec.cls(groups, backend=example.backend, max_grad_norm=max_grad_norm)
    loop = Loop(spec, optimizer, tally)
    if example.grad_scale is not None:
        optimizer.grad_scale = torch.tensor(example.grad_scale)
    grads: dict[int, Placed] = {}
    for changes in example.steps:
        for i, ((param, _), recipe) in enumerate(zip(placed, recipes, strict=True)):
            change = changes[str(i)]
            if change == "none":
                param.grad = None
                grads.pop(i, None)
            elif change in ("new", "other layout") or i not in grads:
                grads[i] = Placed(recipe.shape, recipe.grad_dtype, recipe.grad_layouts[change == "other layout"])
                values.fill_grad(grads[i].tensor)
                set_grad(param, grads[i].tensor)
            elif change == "in place":
                values.fill_grad(param.grad)
            if example.is_poisoned and i == 0 and param.grad is not None and param.grad.numel():
                param.grad.as_strided((1,), (1,)).fill_(math.nan)
            loop.set_grad(param, param.grad)
        if example.clip == "deferred":
            optimizer.clip_grad_norm_(example.max_norm)
            loop.clip(example.max_norm)
        for place in [place for _, place in placed] + list(grads.values()):
            place.watch()
        take_step(optimizer, loop, 1.0 if example.grad_scale is None else float(optimizer.grad_scale))
        for _, place in placed:
            place.check_surroundings()
        for place in grads.values():
            place.check_untouched()
        loop.check()
    tally["examples"] += 1


@every_class
def test_random_steps_are_the_reference_to_rounding(spec):
    tally = Counter()

    @VALUE_SETTINGS
    @given(examples(spec))
    def check(example):
        run_example(spec, example, tally)

    check()
    share = tally["bounded"] / tally["elements"]
    print(
        f"\n{spec}: {tally['examples']} examples, {tally['elements']} elements, {share:.1%} of them with a finite bound"
    )
    assert share > 0.75, "the bounds have become so wide that they say nothing"


# ---- at the edge of memory ---------------------------------------------------------------------------------------

GUARDED_SIZES = (1, 2, 3, 7, 9, 15, 16, 17, 31, 33, 65, 255, 257, 1021)


def step_in_guarded_memory(case, dtypes, at_end: bool) -> None:
    """Two steps, the second with every tensor against a page that may not be touched, the same bits as in ordinary memory."""
    params = random_params(GUARDED_SIZES, dtypes[0])
    guards = [guarded.Guarded(param.detach(), at_end) for param in params]
    guarded_params = [torch.nn.Parameter(guard.tensor) for guard in guards]
    plain, optimizer = case.make(params, max_grad_norm=1.0), case.make(guarded_params, max_grad_norm=1.0)
    for step in range(2):
        grads = random_grads(GUARDED_SIZES, dtypes[1], step)
        grad_guards = [guarded.Guarded(grad, at_end) for grad in grads]
        for param, guarded_param, grad, guard in zip(params, guarded_params, grads, grad_guards, strict=True):
            set_grad(param, grad)
            set_grad(guarded_param, guard.tensor)
            state = optimizer.state.get(guarded_param, {})
            for name, value in state.items():
                guards.append(guarded.Guarded(value, at_end))
                state[name] = guards[-1].tensor
        plain.step()
        optimizer.step()
        assert all(guard.is_intact() for guard in guards + grad_guards), "bytes beside a tensor were written to"
        for param, guarded_param in zip(params, guarded_params, strict=True):
            assert same_bits(guarded_param, param)
            for name, value in plain.state.get(param, {}).items():
                assert same_bits(optimizer.state[guarded_param][name], value), name


@every_class
@pytest.mark.parametrize("at_end", [True, False], ids=["at the end", "at the beginning"])
def test_nothing_beside_a_tensor_is_touched(spec, at_end):
    """In a child process, because a stray access kills it; the parent says in which case."""
    cases = [case for case in CASES if case.optimizer == spec.name]
    pairs = [pair for pair in DTYPES if pair[0] == pair[1] or can_mix_dtypes()]
    runs = [(case, pair) for case in cases for pair in pairs]
    guarded.survives(
        [functools.partial(step_in_guarded_memory, *run, at_end) for run in runs], [str(run) for run in runs]
    )


@pytest.mark.parametrize("at_end", [True, False], ids=["at the end", "at the beginning"])
def test_access_beside_a_tensor_is_fatal(at_end):
    """What the test above relies on."""
    tensor = guarded.Guarded(torch.ones(2), at_end).tensor
    address = tensor.data_ptr() + (tensor.nbytes if at_end else -4)
    with pytest.raises(AssertionError, match="SIGSEGV"):
        guarded.survives([lambda: ctypes.c_float.from_address(address).value], ["a read"])


# ---- whole lives -------------------------------------------------------------------------------------------------

SMALL_SHAPES = ((3,), (), (0,), (1, 1), (7,), (9,), (4, 3), (5, 1), (2, 3, 2), (33,), (65,), (257,), (1, 2, 3, 2))
MOSTLY_SMALL_SHAPES = (*SMALL_SHAPES, *SMALL_SHAPES, *SMALL_SHAPES, (9001,))  # now and then work for a second thread
small_params = st.builds(lambda param, shape: replace(param, shape=shape), params, st.sampled_from(MOSTLY_SMALL_SHAPES))
small_groups = st.lists(small_params, min_size=1, max_size=3)
class_options = st.runner().flatmap(lambda life: life.options)
indices = st.integers(0, 11)
grad_changes = one_of_each(**{str(i): GRAD_CHANGES for i in range(6)})


class Boom(Exception):
    """What a hook of the user raises."""


class Life(RuleBasedStateMachine):
    """Everything a training script does to an optimizer, in any order, each followed by a full comparison."""

    def __init__(self, spec: Spec, options: st.SearchStrategy, tally: Counter):
        super().__init__()
        self.spec, self.options, self.tally = spec, options, tally
        self.saved = self.left = None
        tally["examples"] += 1

    @initialize(
        start=one_of_each(backend=BACKENDS, isa=_C.available_isas(), max_grad_norm=(None, 1.0)),
        recipes=small_groups,
        options=class_options,
        seed=st.integers(0, 1 << 16),
    )
    def construct(self, start, recipes, options, seed):
        self.values, self.recipes = Values(seed), {}  # by id of the parameter
        self.backend = start["backend"]
        _C.set_isa(start["isa"])
        group = {"params": self.make_params(recipes), **options}
        self.optimizer = self.spec.cls([group], backend=self.backend, max_grad_norm=start["max_grad_norm"])
        self.loop = Loop(self.spec, self.optimizer, self.tally)

    def make_params(self, recipes: list[Recipe]) -> list[torch.nn.Parameter]:
        made = []
        for recipe in recipes:
            tensor = self.values.fill(Placed(recipe.shape, recipe.dtype, recipe.layout).tensor)
            made.append(torch.nn.Parameter(tensor))
            self.recipes[id(made[-1])] = recipe
        return made

    @property
    def params(self) -> list[torch.nn.Parameter]:
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def param(self, index: int) -> torch.nn.Parameter:
        return self.params[index % len(self.params)]

    def refused(self, call, kind: type[Exception], match: str) -> None:
        """What changed in spite of it, the comparison after the rule sees."""
        with pytest.raises(kind, match=match):
            call()

    @invariant()
    def is_as_the_loop_says(self):
        self.loop.check()

    def teardown(self):
        if self.left is not None:
            self.left.check()  # what was copied took no part in the life of the copy

    # ---- gradients

    @rule(changes=grad_changes)
    def backward(self, changes):
        for i, param in enumerate(self.params):
            change, recipe = changes[str(i % 6)], self.recipes[id(param)]
            if change == "none":
                param.grad = None
                self.loop.set_grad(param, None)
            elif change in ("new", "other layout"):
                layout = recipe.grad_layouts[change == "other layout"]
                set_grad(param, self.values.fill_grad(Placed(recipe.shape, recipe.grad_dtype, layout).tensor))
                self.loop.set_grad(param, param.grad)
            elif change == "in place" and param.grad is not None:
                self.values.fill_grad(param.grad)
                self.loop.write_grad(param, param.grad)

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none):
        for param in self.params:
            if set_to_none:
                self.loop.set_grad(param, None)
            elif param.grad is not None:
                self.loop.set_grad(param, torch.zeros_like(param.grad))
        self.optimizer.zero_grad(set_to_none=set_to_none)
        self.loop.forget_clip()
        self.loop.check()
        self.train_as_before()

    @rule(max_norms=st.lists(st.sampled_from((0.5, 1e-3, 1e9, math.inf)), max_size=2), then=st.sampled_from((0, 1, 2)))
    def clip_and_go_on(self, max_norms, then):
        """Clipping again composes; then comes a step, or it is dropped, or whatever comes next."""
        for max_norm in [1.0, *max_norms]:
            self.clip(max_norm)
        if then == 1:
            self.step()
        elif then == 2:
            self.zero_grad(True)

    def clip(self, max_norm):
        if self.loop.refuses_clip():
            self.refused(lambda: self.optimizer.clip_grad_norm_(max_norm), RuntimeError, "is new or was changed")
        else:
            self.optimizer.clip_grad_norm_(max_norm)
            self.loop.clip(max_norm)
        self.loop.check()

    # ---- steps

    @rule()
    def step(self):
        if self.loop.refuses_step():
            self.refused(self.optimizer.step, RuntimeError, "is new or was changed")
        else:
            take_step(self.optimizer, self.loop)

    @rule(changes=grad_changes, max_norm=st.sampled_from((None, 0.5)))
    def train(self, changes, max_norm):
        self.backward(changes)
        if max_norm is not None:
            self.clip(max_norm)
        self.step()

    def train_as_before(self):
        """So that the plan of the last step is tried on what has happened since: new values in the same layouts."""
        if self.loop.pending is not None:
            self.optimizer.zero_grad()
            self.loop.forget_clip()
        self.backward(dict.fromkeys("012345", "new"))
        self.step()

    @rule(scale=st.sampled_from((1.0, 0.5, 1024.0)), found_inf=st.booleans(), max_norm=st.sampled_from((None, 0.5)))
    def step_of_a_scaler(self, scale, found_inf, max_norm):
        if max_norm is not None:
            self.clip(max_norm)
        self.optimizer.grad_scale, self.optimizer.found_inf = torch.tensor(scale), torch.tensor(float(found_inf))
        if found_inf:
            self.optimizer.step()
            self.loop.skip()
        elif self.loop.refuses_step():
            self.refused(self.optimizer.step, RuntimeError, "is new or was changed")
        else:
            take_step(self.optimizer, self.loop, scale)
        del self.optimizer.grad_scale, self.optimizer.found_inf
        self.loop.check()
        self.train_as_before()

    @precondition(lambda self: self.loop.pending is None)
    @rule(index=indices, mode=st.sampled_from(("skip", "error")), value=st.sampled_from((math.nan, math.inf)))
    def step_with_nonfinite_gradient(self, index, mode, value):
        param = self.param(index)
        if param.numel() > 0:
            self.step_refuses(param, mode, value)
            self.train_as_before()

    def step_refuses(self, param, mode, value):
        set_grad(param, torch.full_like(param, value, requires_grad=False))
        self.loop.set_grad(param, param.grad)
        self.optimizer.nonfinite = mode
        if mode == "skip":
            self.optimizer.step()
            self.loop.skip()
        else:
            self.refused(self.optimizer.step, RuntimeError, "NaN or inf")
        self.optimizer.nonfinite = "propagate"
        self.loop.check()

    @rule()
    def hook_raises(self):
        def boom(optimizer, args, kwargs):
            raise Boom("a hook of the user")

        hook = self.optimizer.register_step_pre_hook(boom)
        self.refused(self.optimizer.step, Boom, "of the user")
        hook.remove()
        self.loop.check()
        self.train_as_before()

    # ---- options

    @rule(index=indices, options=class_options)
    def edit(self, index, options):
        g = index % len(self.loop.groups)
        self.optimizer.param_groups[g].update(options)
        self.loop.groups[g].update(options)
        self.train_as_before()

    @rule(index=indices, which=indices)
    def edit_out_of_range(self, index, which):
        """Refused, and followed again once it is undone."""
        g = index % len(self.loop.groups)
        group = self.optimizer.param_groups[g]
        bad = [wrong for wrong, _ in self.spec.rule.errors if {*wrong} <= {*self.spec.rule.hyper, "betas"}]
        wrong = [*bad, {"lr": -1.0}][which % (len(bad) + 1)]
        right = {name: group[name] for name in wrong}
        try:
            read_options(self.spec.rule, {**group, **wrong})
        except ValueError:
            group.update(wrong)
            self.refused(self.optimizer.step, ValueError, r"param_groups\[\d\]")
            self.refused(lambda: self.optimizer.clip_grad_norm_(1.0), ValueError, r"param_groups\[\d\]")
            self.loop.check_tensors()
            group.update(right)
            self.train_as_before()

    @rule(max_grad_norm=st.sampled_from((None, 0.5, math.inf)))
    def edit_max_grad_norm(self, max_grad_norm):
        self.optimizer.max_grad_norm = max_grad_norm
        self.train_as_before()

    @precondition(lambda self: len(self.loop.groups) < 3)
    @rule(recipes=small_groups, options=class_options, first=st.sampled_from(("step", "clip", "skip", "error")))
    def add_group(self, recipes, options, first):
        """Without a step that succeeds, new parameters stay without state."""
        self.optimizer.add_param_group({"params": self.make_params(recipes), **options})
        self.loop.add_group(self.optimizer.param_groups[-1])
        new = self.params[-1]
        if first == "clip":
            self.backward(dict.fromkeys("012345", "new"))
            self.clip(0.5)
        elif first != "step" and self.loop.pending is None and new.numel() > 0:
            self.step_refuses(new, first, math.nan)
        self.train_as_before()

    @rule(num_threads=st.integers(1, 4))
    def change_threads(self, num_threads):
        torch.set_num_threads(num_threads)
        self.train_as_before()

    # ---- the same objects, elsewhere

    @rule(index=indices, layout=st.none() | one_of_each(**LAYOUT_AXES))
    def move_param(self, index, layout):
        """To other memory, in the same layout or another."""
        param = self.param(index)
        layout = self.recipes[id(param)].layout if layout is None else Layout(**layout)
        self.recipes[id(param)] = replace(self.recipes[id(param)], layout=layout)
        param.data = Placed(tuple(param.shape), param.dtype, layout).tensor.copy_(param.detach())
        self.train_as_before()

    @rule(index=indices, requires_grad=st.booleans())
    def freeze(self, index, requires_grad):
        self.param(index).requires_grad_(requires_grad)
        self.train_as_before()

    @rule(index=indices)
    def reverse_params(self, index):
        self.optimizer.param_groups[index % len(self.loop.groups)]["params"].reverse()
        self.saved = None  # a checkpoint knows parameters by their position
        self.train_as_before()

    @rule(index=indices, which=indices, how=st.sampled_from(("replace", "move", "write", "remove")))
    def touch_state(self, index, which, how):
        param = self.param(index)
        state, expected = self.optimizer.state.get(param, {}), self.loop.tracked[id(param)].state
        if state:
            name = [*state][which % len(state)]
            if how == "replace":
                state[name] = state[name].clone()
            elif how == "move":
                state[name].data = state[name].clone()
            elif how == "write":
                state[name].mul_(0.5)
                expected[name] = expected[name] * 0.5
            else:
                del state[name], expected[name]
            self.train_as_before()

    # ---- copies and checkpoints

    @rule()
    def save(self):
        """As torch.save would, now; what happens later must not change it."""
        self.saved = copy.deepcopy(self.optimizer.state_dict()), self.loop.checkpoint(self.optimizer)

    @rule()
    def load(self):
        if self.saved is None:
            self.save()
            self.train_as_before()
        state_dict, expected = self.saved
        if len(expected) != len(self.loop.groups):
            self.refused(lambda: self.optimizer.load_state_dict(state_dict), ValueError, "parameter groups")
        else:
            for _ in range(2):  # the second time, what the steps of the first may have written to
                self.optimizer.load_state_dict(state_dict)
                self.loop.restore(self.optimizer, expected)
                self.loop.check()
                self.train_as_before()

    @rule()
    def go_on_with_a_fresh_optimizer(self):
        old, expected = self.optimizer, self.loop.checkpoint(self.optimizer)
        groups = [{"params": [*group["params"]]} for group in old.param_groups]
        self.optimizer = self.spec.cls(groups, backend=self.backend, max_grad_norm=old.max_grad_norm)
        self.optimizer.load_state_dict(old.state_dict())
        self.loop.skipped = 0
        self.loop.restore(self.optimizer, expected)
        self.train_as_before()

    @rule(max_norm=st.sampled_from((None, 0.5)))
    def go_on_with_a_copy(self, max_norm):
        if max_norm is not None:
            self.clip(max_norm)
        self.left = self.loop
        params, optimizer = copy.deepcopy((self.params, self.optimizer))
        for param, copied in zip(self.params, params, strict=True):
            self.recipes[id(copied)] = self.recipes[id(param)]
        expected, pairs = self.loop.checkpoint(self.optimizer), zip(self.params, params, strict=True)
        values = {id(copied): self.loop.tracked[id(param)].value for param, copied in pairs}
        self.optimizer, self.loop = optimizer, Loop(self.spec, optimizer, self.tally)
        self.loop.skipped = self.left.skipped
        for copied in params:
            self.loop.tracked[id(copied)].value = values[id(copied)]
            self.loop.set_grad(copied, copied.grad)
        self.loop.restore(optimizer, expected)
        self.loop.check()
        self.train_as_before()


@every_class
def test_random_lives_are_those_of_a_plain_loop(spec):
    tally, drawn = Counter(), options(spec)
    run_state_machine_as_test(lambda: Life(spec, drawn, tally), settings=LIFE_SETTINGS)
    print(f"\n{spec}: {tally['examples']} lives")

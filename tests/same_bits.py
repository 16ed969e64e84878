"""Compares two checkouts of the project: random runs of every optimizer class must give the same bits in both.

    python -m tests.same_bits OTHER                              200 runs of every class
    python -m tests.same_bits OTHER --class AdamW --run 17       one run again, with everything that it does
    python -m tests.same_bits OTHER --strict                     messages, warnings, group options and reprs too

OTHER is the root folder of a checkout whose extension is built in place (`setup.py build_ext --inplace`). Each checkout has one
process, which imports fusedopt from there, draws every run from the same seed, and reports a digest of all that a user can see
after each step: the bytes of parameters, gradients and states, the gradient norm, the number of skipped steps, and the type of
each exception. The first run of a class that differs is printed; the exit status is then 1.

A run uses only what both checkouts have: the classes and constructor arguments that they share, and the public interface.
`--strict` is for checkouts that should not differ at all. Then a run also puts step counts into the state in other forms, and
states and gradients that a step refuses: older versions answer otherwise. `--backend cuda` runs the CUDA kernels compiled for
the host, as the tests do. FUSEDOPT_CPU_ISA chooses the instruction set of both sides.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import inspect
import io
import json
import math
import os
import random
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import fusedopt
from fusedopt.rules import RANGES, RULES

ROOT = Path(__file__).resolve().parent.parent
AROUND = ("AdamW", "SGD")  # the bases of SAM and ASAM: one counts steps in its state, the other one in its plan
# Arguments that change no value, or that a run sets by itself.
NOT_DRAWN = {
    "self", "params", "foreach", "capturable", "differentiable", "fused", "max_grad_norm", "nonfinite", "backend", "sparse"
}  # fmt: skip
SHAPES = (
    (), (0,), (0, 3), (1,), (3,), (7,), (13, 7), (1, 1), (5, 3, 3), (2, 3, 4, 5), (33,), (255,), (257,), (300,), (19, 31),
    (1021,),
)  # fmt: skip
LARGE_SHAPES = ((32_769,), (181, 183), (4, 9_001), (65_543,))
LAYOUTS = ("contiguous", "contiguous", "transposed", "channels_last", "gaps", "misaligned")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
MAX_NORMS = (1.0, 0.01, 0.5, 1e6, math.inf)


# ---- what both checkouts have ------------------------------------------------------------------------------------


def described() -> dict[str, dict[str, Any]]:
    """What a run may use of each optimizer class, as this checkout has it."""
    table = {}
    for rule in RULES.values():
        for name in rule.optimizers:
            parameters = inspect.signature(getattr(fusedopt, name).__init__).parameters
            options = [option for option in parameters if option not in NOT_DRAWN]
            if name == "AdamW":  # always True there
                options = [option for option in options if option != "decoupled_weight_decay"]
            table[name] = {
                "options": options,
                "flags": [option for option in options if isinstance(parameters[option].default, bool)],
                "cases": list(map(dict, rule.cases)),
                "errors": [dict(wrong) for wrong, _ in rule.errors],
                "num_betas": len(rule.betas),
                "takes_sparse": rule.takes_sparse,
            }
    return table


def shared(ours: dict[str, dict[str, Any]], theirs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The part of two descriptions that is the same in both."""
    table = {}
    for name in ours.keys() & theirs.keys():
        a, b = ours[name], theirs[name]
        common = {
            key: [value for value in a[key] if value in b[key]] for key in ("options", "flags", "cases", "errors")
        }
        table[name] = {**common, "num_betas": a["num_betas"], "takes_sparse": a["takes_sparse"] and b["takes_sparse"]}
    return {name: table[name] for name in sorted(table)}


def targets(table: dict[str, dict[str, Any]]) -> list[str]:
    return [*table, *(f"{kind}({base})" for base in AROUND if base in table for kind in ("SAM", "ASAM"))]


# ---- values ------------------------------------------------------------------------------------------------------


class Values:
    """Numbers from 1e-6 to 1e2 with zeros among them, so that eps, the moments and the clip all matter somewhere."""

    pool: torch.Tensor | None = None

    def __init__(self, draw: random.Random):
        if Values.pool is None:
            generator = torch.Generator().manual_seed(20)
            wide = 10.0 ** (8 * torch.rand(1 << 19, generator=generator, dtype=torch.float64) - 6)
            Values.pool = wide * torch.randn(1 << 19, generator=generator, dtype=torch.float64)
            Values.pool[::19] = 0.0
        self._draw = draw

    def vector(self, count: int, dtype: torch.dtype, magnitude: float = 1.0) -> torch.Tensor:
        """A new tensor of one dimension."""
        width = 2 if dtype.is_complex else 1
        start = self._draw.randrange(len(self.pool) - width * count)
        numbers = self.pool[start : start + width * count] * magnitude
        return (torch.view_as_complex(numbers.view(-1, 2)) if dtype.is_complex else numbers).to(dtype, copy=True)

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype, layout: str, magnitude: float = 1.0) -> torch.Tensor:
        """A new tensor of that layout; the memory between its elements and around them holds values too."""
        strides, offset = strides_of(shape, layout), 3 if layout == "misaligned" else 0
        reach = sum(stride * max(size - 1, 0) for size, stride in zip(shape, strides, strict=True))
        return self.vector(offset + reach + 9, dtype, magnitude).as_strided(shape, strides, offset)


def strides_of(shape: tuple[int, ...], layout: str) -> list[int]:
    order = list(range(len(shape)))
    if layout == "transposed":
        order.reverse()
    elif layout == "channels_last" and len(order) > 2:
        order.append(order.pop(1))
    strides, stride = [0] * len(shape), 2 if layout == "gaps" else 1
    for dim in reversed(order):
        if layout != "expanded":
            strides[dim] = stride
            stride *= max(shape[dim], 1)
    return strides


def grad_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """The gradient dtypes that a parameter takes."""
    if dtype.is_complex or not hasattr(torch.Tensor, "grad_dtype"):
        return (dtype,)
    real = (torch.float32, torch.bfloat16, torch.float16)
    return (dtype, *real, torch.float64) if dtype == torch.float64 else (dtype, *real)


def set_grad(param: torch.Tensor, grad: torch.Tensor) -> None:
    if grad.dtype != param.dtype:
        param.grad_dtype = None
    param.grad = grad


def short(value: Any) -> str:
    return str(value).replace("torch.", "")


def fingerprint(tensor: torch.Tensor) -> str:
    """Dtype, layout and bits: all bytes of the storage, with those that lie between the elements."""
    if tensor.layout == torch.sparse_coo:  # torch leaves memory beside its parts as it was
        return f"sparse {fingerprint(tensor._indices().clone())} {fingerprint(tensor._values().clone())}"
    memory = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    digest = hashlib.sha1(memory.numpy()).hexdigest()[:16]
    return f"{short(tensor.dtype)} {tuple(tensor.shape)} strides {tensor.stride()} {digest}"


# ---- one run -----------------------------------------------------------------------------------------------------


class Run:
    """Some steps of one optimizer, or of two that are clipped together; drawn from a seed.

    Args:
        target: a class, "SAM(class)" or "ASAM(class)".
        kept: the index of an event whose values are to be kept, in `values`.
    """

    def __init__(
        self,
        table: dict[str, dict[str, Any]],
        target: str,
        seed: int,
        number: int,
        backend: str,
        is_strict: bool,
        kept: int | None = None,
    ):
        self.is_sam, self.is_adaptive = "(" in target, target.startswith("ASAM")
        self.base = target.rstrip(")").rpartition("(")[2]
        self.spec = table[self.base]
        self.name, self.backend, self.is_strict = f"{seed} {target} {number}", backend, is_strict
        self.kept, self.values = kept, None
        self.events: list[tuple[str, str]] = []  # ("", what the run does) or (what it looks at, what it finds)
        self.versions: dict[int, tuple[torch.Tensor, int]] = {}  # the tensor too, so that no other one gets its id

    def go(self) -> list[tuple[str, str]]:
        self.begin("construction")
        num_steps = self.draw.randint(3, 6)
        self.construct()
        self.look()
        for step in range(1, num_steps + 1):
            self.begin(f"step {step}")
            self.schedule()
            if self.chance(0.35):
                self.draw.choice(HAPPENINGS)(self)
            if not self.is_sam:
                self.set_gradients()
                self.clip()
            self.take_step()
            self.look()
            if self.chance(0.3):
                for optimizer in self.optimizers:
                    optimizer.zero_grad(set_to_none=self.chance(0.5))
        return self.events

    def begin(self, place: str) -> None:
        """A new part of the run, which draws what it draws whatever happened before."""
        self.place = place
        self.draw = random.Random(f"{self.name} {place}")
        self.numbers = Values(self.draw)

    def chance(self, probability: float) -> bool:
        return self.draw.random() < probability

    # ---- what is reported

    def do(self, what: str) -> None:
        self.events.append(("", f"{self.place}: {what}"))

    def see(self, what: str, value: Any) -> None:
        if len(self.events) == self.kept and isinstance(value, torch.Tensor):
            self.values = list(map(str, value.detach().to_dense().flatten().tolist()))
        is_tensor = isinstance(value, torch.Tensor)
        self.events.append((f"{self.place}: {what}", fingerprint(value) if is_tensor else str(value)))

    def attempt(self, what: str, call: Callable[[], Any]) -> bool:
        """Calls something and reports what it returns or raises. False: it raised."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                value, error = call(), None
            except Exception as raised:
                value, error = None, raised
        if self.is_strict:
            for warning in caught:
                self.see(
                    f"{what} warns", f"{warning.category.__name__} at {Path(warning.filename).name}: {warning.message}"
                )
        if error is not None:
            self.see(what, f"raises {type(error).__name__}" + (f": {error}" if self.is_strict else ""))
        elif isinstance(value, torch.Tensor):
            self.see(f"{what} returns", value)
        else:
            self.see(what, "done")
        return error is None

    def look(self) -> None:
        """Reports all that a user can see."""
        for optimizer, group, index, param in self.every_param():
            where = f"params[{index}] of {self.label(optimizer, group)}"
            self.see(where, param)
            _, before = self.versions.get(id(param), (param, 0))
            self.versions[id(param)] = param, param._version
            self.see(f"version of {where}", "advanced" if param._version > before else "the same")
            self.see(f"gradient of {where}", param.grad)
            state = optimizer.state.get(param, {})
            self.see(f"states of {where}", [*state])
            for name, value in state.items():
                self.see(f"state {name!r} of {where}", value)
        for optimizer in self.optimizers:
            self.see("grad_norm", optimizer.grad_norm)
            self.see("skipped_steps", optimizer.skipped_steps)
            self.see("parameters with a state", len(optimizer.state))
            if self.is_strict:
                self.see("repr", repr(optimizer))
                self.see("groups of the state dict", optimizer.state_dict()["param_groups"])

    def label(self, optimizer: Any, group: dict[str, Any]) -> str:
        index = next(i for i, known in enumerate(optimizer.param_groups) if known is group)
        return f"param_groups[{index}]" + (" of the second optimizer" if optimizer is not self.optimizers[0] else "")

    def every_param(self) -> Iterator[tuple[Any, dict[str, Any], int, torch.Tensor]]:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for index, param in enumerate(group["params"]):
                    yield optimizer, group, index, param

    # ---- construction

    def construct(self) -> None:
        self.options = self.drawn_options()
        self.whole: dict[str, Any] = {"backend": self.backend}
        clips = self.draw.choice(("", "", "constructor", "call", "call", "both"))
        self.clips_by_call = clips in ("call", "both")
        if clips in ("constructor", "both"):
            self.whole["max_grad_norm"] = self.draw.choice(MAX_NORMS)
        self.whole["nonfinite"] = self.draw.choice(("propagate", "propagate", "propagate", "skip", "skip", "error"))
        self.has_infinities = self.chance(0.8 if self.whole["nonfinite"] != "propagate" else 0.1)
        self.is_sparse = not self.is_sam and self.spec["takes_sparse"] and self.chance(0.35)
        if self.is_sparse and self.chance(0.85):
            self.whole["sparse"] = "lazy"
        if self.is_sam:
            self.whole.update(rho=self.draw.choice((0.05, 0.5, 2.0, 0.0)), adaptive=self.is_adaptive)
        self.grad_scale = self.draw.choice((1.0, 0.3, 1024.0, 65536.0)) if self.chance(0.25) else None
        self.magnitude = self.draw.choice((1.0, 1.0, 1.0, 1.0, 1e-19, 1e18))
        self.schedules = self.draw.choice(("", "number", "number", "tensor", "scheduler"))
        if self.schedules == "tensor":
            self.options["lr"] = torch.tensor(float(self.options["lr"]))
        dtypes = DTYPES[:-1] if self.options.get("rowwise") else DTYPES
        kind = self.draw.choice(("float32", "float32", "one", "mixed", "mixed"))
        self.dtypes = {"float32": dtypes[:1], "one": (self.draw.choice(dtypes),), "mixed": dtypes}[kind]
        num_threads = self.draw.choice((1, 2))
        torch.set_num_threads(num_threads)

        num_groups = self.draw.choice((1, 1, 2, 3))
        groups: list[dict[str, Any]] = [{"params": [self.new_param()]} for _ in range(num_groups)]
        for _ in range(self.draw.randint(0, 6 - num_groups)):
            self.draw.choice(groups)["params"].append(self.new_param())
        for group in groups[1:]:
            group.update(self.drawn_options() if self.chance(0.6) else {})
            if self.is_sam and self.chance(0.3):
                group["rho"] = 0.1
        if self.chance(0.03):  # an error
            first = groups[0]["params"][0]
            groups[-1]["params"].append(torch.nn.Parameter(first.detach().view(first.shape)))
        for group in groups:
            shown = [f"{short(p.dtype)} {tuple(p.shape)} strides {p.stride()}" for p in group["params"]]
            self.do(f"group of {shown} with { {n: v for n, v in group.items() if n != 'params'} }")
        self.do(
            f"options {self.options}, {self.whole}; threads {num_threads}; gradients times {self.magnitude:g}, "
            f"grad_scale {self.grad_scale}; lr changes by {self.schedules or 'nothing'}"
        )
        parts = [groups]
        if not self.is_sam and num_groups > 1 and self.chance(0.3):
            parts = [groups[:1], groups[1:]]
        self.optimizers, self.scheduler = [], None
        if not self.attempt("constructor", lambda: self.optimizers.extend(map(self.make, parts))):
            self.options = {"lr": 0.01}
            self.optimizers = [self.make([{"params": group["params"]} for group in part]) for part in parts]
        if self.schedules == "scheduler":
            self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizers[0], lambda step: 1 / (1 + 0.3 * step))

    def make(self, groups: list[dict[str, Any]]) -> Any:
        base, groups = getattr(fusedopt, self.base), [{**group, "params": [*group["params"]]} for group in groups]
        if self.is_sam:
            return fusedopt.SAM(groups, base, **self.options, **self.whole)
        return base(groups, **self.options, **self.whole)

    def drawn_options(self) -> dict[str, Any]:
        if self.chance(0.4):
            options = dict(self.draw.choice(self.spec["cases"]))
        else:
            options = {name: self.drawn_option(name) for name in self.spec["options"] if self.chance(0.5)}
        if options.get("nesterov"):
            options.update(momentum=0.9, dampening=0.0)
        if "betas" in options:
            options["betas"] = tuple(options["betas"])
        return {**options, "lr": self.drawn_option("lr")}

    def drawn_option(self, name: str) -> Any:
        if name in self.spec["flags"]:
            return self.chance(0.5)
        if name == "betas":
            return tuple(self.drawn_option(f"beta{i + 1}") for i in range(self.spec["num_betas"]))
        low, high, _ = RANGES[name]
        if name == "lr":
            return self.draw.choice((10 ** self.draw.uniform(-4, -1), 10 ** self.draw.uniform(-4, -1), 0.01, 1, 0.0))
        if name == "eps":
            return self.draw.choice((1e-8, 1e-8, 1e-3, 0.0, 1e-30))
        if high == 1:
            return self.draw.choice((self.draw.uniform(0.5, 1), 0.9, 0.999, 0.0))
        return self.draw.choice((self.draw.uniform(0, 1), 0.0, 0.0, 0.125, -0.5 if low < 0 else 0.9))

    def new_param(self) -> torch.nn.Parameter:
        shape = self.draw.choice(LARGE_SHAPES if self.chance(0.03) else SHAPES)
        tensor = self.numbers.tensor(shape, self.draw.choice(self.dtypes), self.draw.choice(LAYOUTS))
        return torch.nn.Parameter(tensor)

    # ---- gradients

    def set_gradients(self) -> None:
        for optimizer, group, index, param in self.every_param():
            how = self.draw.choice(("new", "new", "new", "in place", "in place", "none", "kept"))
            is_strided = param.grad is not None and param.grad.layout == torch.strided and 0 not in param.grad.stride()
            if how == "none":
                param.grad = None
            elif how == "in place" and is_strided:
                param.grad.copy_(self.new_grad(param, param.grad.dtype, "contiguous"))
            elif how != "kept":
                dtype, layout = self.draw.choice(grad_dtypes(param.dtype)), self.draw.choice((*LAYOUTS, "expanded"))
                if self.chance(0.5):
                    dtype, layout = param.dtype, "contiguous"
                is_sparse = self.is_sparse and param.dim() > 0 and self.chance(0.7)
                set_grad(param, self.sparse_grad(param, dtype) if is_sparse else self.new_grad(param, dtype, layout))
                if self.chance(0.01):  # a parameter's own memory
                    param.grad = param.detach()
            grad = param.grad
            has_elements = grad is not None and grad.layout == torch.strided and grad.numel() > 0
            if has_elements and self.has_infinities and self.chance(0.2):
                grad[(0,) * grad.dim()] = self.draw.choice((math.inf, math.nan))
                self.do(f"gradient of params[{index}] of {self.label(optimizer, group)} is not finite")

    def new_grad(self, param: torch.Tensor, dtype: torch.dtype, layout: str) -> torch.Tensor:
        return self.numbers.tensor(tuple(param.shape), dtype, layout, self.magnitude_of(dtype))

    def magnitude_of(self, dtype: torch.dtype) -> float:
        """What a dtype can hold of the run's magnitude."""
        return 1.0 if dtype == torch.float16 else self.magnitude * (self.grad_scale or 1.0)

    def sparse_grad(self, param: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Of some rows, or of some elements; in any order and with repetitions."""
        num_sparse = self.draw.choice((1, 1, param.dim()))
        count = self.draw.randint(0, 6) if all(param.shape[:num_sparse]) else 0
        index = [[self.draw.randrange(size) for _ in range(count)] for size in param.shape[:num_sparse]]
        row = tuple(param.shape[num_sparse:])
        values = self.numbers.vector(count * math.prod(row), dtype, self.magnitude_of(dtype)).view(count, *row)
        if values.numel() and self.has_infinities and self.chance(0.2):
            values.view(-1)[-1] = math.inf
        indices = torch.tensor(index, dtype=torch.int64).view(num_sparse, count)
        grad = torch.sparse_coo_tensor(indices, values, tuple(param.shape), check_invariants=True)
        return grad.coalesce() if self.chance(0.3) and dtype != torch.float16 else grad

    # ---- a step

    def schedule(self) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if self.schedules == "number":
                    group["lr"] = float(group["lr"]) * 0.9
                elif self.schedules == "tensor" and isinstance(group["lr"], torch.Tensor):
                    group["lr"].mul_(0.9)

    def clip(self) -> None:
        """Clips by call, and now and then does what must not come between the clip and the step."""
        if not self.clips_by_call or self.chance(0.15):
            return
        for _ in range(self.draw.choice((1, 1, 1, 2))):
            max_norm, is_error = self.draw.choice((*MAX_NORMS, 0.0)), self.chance(0.1)
            clips = [optimizer.clip_grad_norm_ for optimizer in self.optimizers]
            if len(clips) > 1 and self.chance(0.7):
                clips = [functools.partial(fusedopt.clip_grad_norm_, self.optimizers)]
            for clip in clips:
                call = functools.partial(clip, max_norm, error_if_nonfinite=is_error)
                self.attempt(f"{'common ' * isinstance(clip, functools.partial)}clip_grad_norm_ to {max_norm}", call)
        then = self.draw.choice((*[""] * 12, "zero_grad", "new gradients", "no gradient"))
        if then == "zero_grad":
            for optimizer in self.optimizers:
                optimizer.zero_grad()
        elif then == "new gradients":
            self.set_gradients()
        elif then == "no gradient":
            next(self.every_param())[-1].grad = None
        if then:
            self.do(f"{then} after the clip")

    def take_step(self) -> None:
        for optimizer in self.optimizers:
            if self.grad_scale is not None:
                found_inf = float(self.chance(0.1))
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(self.grad_scale), torch.tensor(found_inf)
                self.do(f"grad_scale {self.grad_scale}, found_inf {found_inf}")
            is_done = self.step_of_sam(optimizer) if self.is_sam else self.attempt("step", optimizer.step)
            if self.grad_scale is not None:
                del optimizer.grad_scale, optimizer.found_inf
            if not is_done:
                optimizer.zero_grad()
        if self.scheduler is not None:
            self.attempt("scheduler", self.scheduler.step)

    def step_of_sam(self, optimizer: Any) -> bool:
        if self.chance(0.4):
            return self.attempt("step with a closure", lambda: optimizer.step(self.closure))
        self.set_gradients()
        if not self.attempt("first_step", optimizer.first_step):
            return False
        self.look()
        self.set_gradients()
        self.clip()
        how = optimizer.restore if self.chance(0.1) else optimizer.second_step
        is_done = self.attempt(how.__name__, how)
        self.look()
        optimizer.restore()
        return is_done

    def closure(self) -> torch.Tensor:
        self.set_gradients()
        return self.numbers.vector(1, torch.float32)

    # ---- what happens between two steps

    def edit_options(self) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                drawn = {name: value for name, value in self.drawn_options().items() if name in group}
                chosen = {name: value for name, value in drawn.items() if self.chance(0.6)}
                if {**group, **chosen}.get("nesterov"):
                    chosen.update(momentum=0.9, dampening=0.0)
                group.update(chosen)
                self.do(f"{self.label(optimizer, group)} gets {chosen}")

    def edit_out_of_range(self) -> None:
        optimizer = self.optimizers[0]
        group = optimizer.param_groups[-1]
        wrong = dict(self.draw.choice([*self.spec["errors"], {"lr": -1.0}, {"lr": "1"}, {"maximize": 2}]))
        right = {name: group[name] for name in wrong if name in group}
        group.update(wrong)
        self.attempt_step(optimizer, f"step with {wrong}")
        for name in wrong:
            del group[name]
        group.update(right)

    def attempt_step(self, optimizer: Any, what: str) -> None:
        self.attempt(what, lambda: optimizer.step(*([self.closure] if self.is_sam else [])))

    def spoil(self) -> None:
        """Puts in what a step refuses, and then puts it right again."""
        optimizer, param = self.drawn_param()
        state, grad = optimizer.state.get(param, {}), param.grad
        if self.is_strict and grad is not None and grad.layout == torch.strided and self.chance(0.4):
            param.grad = torch._neg_view(grad)
            self.attempt_step(optimizer, "step with a lazily negated gradient")
            param.grad = grad
        elif self.is_strict and state:
            name = self.draw.choice([*state])
            right = state[name]
            wrong = {
                "dtype": torch.zeros_like(right, dtype=torch.float16),
                "shape": torch.zeros(2, *right.shape, dtype=right.dtype),
                "class": "1",
                "memory": param.detach(),
            }
            kind = self.draw.choice([*wrong])
            state[name] = wrong[kind]
            self.attempt_step(optimizer, f"step with state {name!r} of another {kind}")
            state[name] = right

    def edit_whole(self) -> None:
        for optimizer in self.optimizers:
            optimizer.max_grad_norm = self.draw.choice((None, *MAX_NORMS))
            optimizer.nonfinite = self.draw.choice(("propagate", "skip", "error"))
            self.do(f"max_grad_norm {optimizer.max_grad_norm}, nonfinite {optimizer.nonfinite!r}")

    def change_threads(self) -> None:
        torch.set_num_threads(self.draw.choice((1, 2)))

    def add_group(self) -> None:
        group = {"params": [self.new_param()], **self.drawn_options()}
        self.attempt(f"add_param_group {group}", lambda: self.optimizers[0].add_param_group(group))
        self.scheduler = None  # it knows only the groups from before

    def drawn_param(self) -> tuple[Any, torch.Tensor]:
        optimizer, group, index, param = self.draw.choice(list(self.every_param()))
        self.do(f"takes params[{index}] of {self.label(optimizer, group)}")
        return optimizer, param

    def touch_state(self) -> None:
        optimizer, param = self.drawn_param()
        state = optimizer.state.get(param, {})
        if not state:
            return
        name = self.draw.choice([*state])
        how = self.draw.choice(("replace", "remove", "write", "move"))
        self.do(f"{how} state {name!r}")
        if how == "replace":
            state[name] = state[name].clone()
        elif how == "remove":
            del state[name]
        elif how == "write":
            state[name].mul_(0.5)
        else:
            state[name].data = state[name].clone()

    def count_otherwise(self) -> None:
        """Puts the step count, where the state has one, into a tensor of another form."""
        optimizer, param = self.drawn_param()
        state = optimizer.state.get(param, {})
        if self.is_strict and "step" in state:
            count = float(state["step"])
            state["step"] = self.draw.choice((torch.tensor([count]), torch.tensor(int(count)), count, int(count)))
            self.do(f"step count {state['step']!r}")

    def move_param(self) -> None:
        _, param = self.drawn_param()
        moved = self.numbers.tensor(tuple(param.shape), param.dtype, self.draw.choice(LAYOUTS))
        param.data = moved.copy_(param.detach())

    def freeze(self) -> None:
        _, param = self.drawn_param()
        param.requires_grad_(not param.requires_grad)

    def load(self) -> None:
        """Its own state dict, as it is or through a file."""
        for optimizer in self.optimizers:
            state_dict = optimizer.state_dict()
            if self.chance(0.5):
                file = io.BytesIO()
                torch.save(state_dict, file)
                file.seek(0)
                state_dict = torch.load(file, weights_only=False)
            self.attempt("load_state_dict", lambda o=optimizer, s=state_dict: o.load_state_dict(s))

    def go_on_with_another(self) -> None:
        """A fresh optimizer that loads the state dict, or a copy."""
        for i, optimizer in enumerate(self.optimizers):
            if self.chance(0.5):
                groups = [{"params": [*group["params"]]} for group in optimizer.param_groups]
                self.optimizers[i] = self.make(groups)
                self.attempt(
                    "a fresh optimizer loads",
                    lambda i=i, o=optimizer: self.optimizers[i].load_state_dict(o.state_dict()),
                )
            else:
                self.do("goes on with a copy")
                self.optimizers[i] = copy.deepcopy(optimizer)
        self.scheduler = None


HAPPENINGS: tuple[Callable[[Run], None], ...] = (
    Run.edit_options, Run.edit_options, Run.edit_out_of_range, Run.edit_whole, Run.change_threads, Run.add_group,
    Run.touch_state, Run.count_otherwise, Run.spoil, Run.move_param, Run.freeze, Run.load, Run.load, Run.go_on_with_another,
)  # fmt: skip


# ---- a process for each checkout ---------------------------------------------------------------------------------


def answer_requests(backend: str) -> None:
    """The process of a checkout: reads one run per line and writes what the run reports."""
    answers, sys.stdout = sys.stdout, sys.stderr
    root = Path(fusedopt.__file__).resolve().parent.parent
    sys.path.insert(0, str(root / "tests"))  # what replaces the GPU knows a checkout from inside: each side has its own
    if backend == "triton":
        import triton_interpreter  # noqa: F401
    if backend in ("cuda", "triton"):
        import cuda_emulator  # noqa: F401

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    answer({"root": str(root), "table": described()})
    table = json.loads(sys.stdin.readline())
    for line in sys.stdin:
        run = Run(table, backend=backend, **json.loads(line))
        answer({"events": run.go(), "values": run.values})


class Side:
    """One of the two checkouts, and its process."""

    def __init__(self, folder: Path, backend: str):
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--answer", "--backend", backend],
            env={**os.environ, "PYTHONPATH": str(folder), "PYTHONHASHSEED": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        known = self.receive("the first import")
        if known["root"] != str(folder):
            sys.exit(f"{folder}: fusedopt was imported from {known['root']}")
        self.table = known["table"]

    def send(self, value: Any) -> None:
        print(json.dumps(value), file=self.process.stdin, flush=True)

    def receive(self, what: str) -> Any:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.folder}: the process ended with status {self.process.wait()} in {what}")
        return json.loads(line)


def answers_of(sides: list[Side], **request: Any) -> list[dict[str, Any]]:
    """What a run reports in each checkout."""
    for side in sides:
        side.send(request)
    return [side.receive(f"run {request}") for side in sides]


def first_difference(ours: list[Any], theirs: list[Any]) -> int | None:
    index = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return None if index == len(ours) == len(theirs) else index


def explain(sides: list[Side], found: list[dict[str, Any]], index: int, request: dict[str, Any]) -> None:
    """Prints what a run did up to the first difference, and the elements that differ."""
    for what, value in found[0]["events"][:index]:
        if not what or value.startswith("raises"):
            print(f"  {what}{': ' * bool(what)}{value}")
    for side, answer in zip(sides, found, strict=True):
        what, value = (*answer["events"], ("nothing more", ""))[index]
        print(f"  in {side.folder}\n    {what}: {value}")
    ours, theirs = (answer["values"] for answer in answers_of(sides, **request, kept=index))
    if ours and theirs and len(ours) == len(theirs):
        differing = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
        first = f", the first is {differing[0]}: {ours[differing[0]]} and {theirs[differing[0]]}" if differing else ""
        print(f"  {len(differing)} of {len(ours)} elements differ{first}")


# ---- the command -------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(prog="same_bits", description=__doc__.split("\n")[0])
    parser.add_argument("other", nargs="?", type=Path, help="the root folder of the other checkout")
    parser.add_argument("--runs", type=int, default=200, help="runs of each class (default: %(default)s)")
    parser.add_argument("--class", dest="target", help='only this class; "SAM(AdamW)" is one too')
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=int, help="only the run of this number")
    parser.add_argument("--backend", choices=("cpu", "reference", "cuda", "triton"), default="cpu")
    parser.add_argument("--strict", action="store_true", help="compare messages, group options and reprs too")
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.answer:
        return answer_requests(arguments.backend)
    if arguments.other is None:
        parser.error("which checkout is the other one?")

    sides = [Side(folder, arguments.backend) for folder in (ROOT, arguments.other.resolve())]
    table = shared(*(side.table for side in sides))
    for name in sorted(sides[0].table.keys() ^ sides[1].table.keys()):
        print(f"{name}: only in one of the two")
    for side in sides:
        side.send(table)
    chosen = [target for target in targets(table) if arguments.target in (None, target)]
    if not chosen:
        parser.error(f"no class {arguments.target!r}; there are {', '.join(targets(table))}")
    began, num_differing = time.perf_counter(), 0
    for target in chosen:
        differing, raised, num_tensors = [], Counter(), 0
        numbers = range(arguments.runs) if arguments.run is None else [arguments.run]
        for number in numbers:
            request = dict(target=target, number=number, seed=arguments.seed, is_strict=arguments.strict)
            found = answers_of(sides, **request)
            index = first_difference(*(answer["events"] for answer in found))
            raised.update(value.split()[1].rstrip(":") for _, value in found[0]["events"] if value.startswith("raises"))
            num_tensors += sum(" strides " in value for what, value in found[0]["events"] if what)
            if index is None:
                continue
            if not differing:
                print(f"{target}, run {number}:")
                explain(sides, found, index, request)
                options = "".join(f" --{name}" for name in ("strict",) if arguments.strict)
                options += f" --backend {arguments.backend}" * (arguments.backend != "cpu")
                print(
                    f"  again: python -m tests.same_bits {arguments.other} --class '{target}' --seed {arguments.seed} "
                    f"--run {number}{options}"
                )
            differing.append(number)
        refused = ", ".join(f"{count} {name}" for name, count in sorted(raised.items())) or "none"
        outcome = f"{len(differing)} DIFFER: {differing[:10]}" if differing else "all the same"
        print(f"{target:14} {len(numbers)} runs, {num_tensors} tensors; exceptions: {refused}; {outcome}", flush=True)
        num_differing += len(differing)
    print(f"{num_differing} runs differ ({time.perf_counter() - began:.0f} s)")
    sys.exit(num_differing > 0)


if __name__ == "__main__":
    main()

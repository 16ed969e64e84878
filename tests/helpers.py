"""What the contract, checkpoint, clip and error tests share: the classes under test, their peers, data, and bitwise checks."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import fusedopt
from fusedopt.rules import RULES, Rule

# Every contract test runs once on each of these (`on_backend` in conftest.py); one that cannot run here is skipped, with its
# reason. A new backend joins by its name.
BACKENDS = ("cpu", "reference", "cuda", "triton")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Odd sizes: none a multiple of a vector width, one across several 256-element tiles, an empty one and a scalar.
SHAPES = ((13, 7), (1021,), (), (0, 3), (5, 3, 3))


@dataclass(frozen=True)
class Spec:
    """One optimizer class, with the first options of its row that decay weights."""

    name: str
    rule: Rule
    twin_name: str | None

    def __str__(self) -> str:
        return self.name

    @property
    def cls(self) -> type:
        return getattr(fusedopt, self.name)

    @property
    def twin(self) -> type:
        return getattr(torch.optim, self.twin_name)

    @property
    def options(self) -> dict[str, Any]:
        return {"lr": 0.01, **next(case for case in self.rule.cases if case.get("weight_decay"))}

    def make(self, params, **extra):
        return self.cls(params, **{**self.options, **extra})

    @property
    def peer(self) -> Callable:
        """What must come to the same: the twin in torch.optim, else the reference backend."""
        if self.twin_name is None:
            return functools.partial(self.make, backend="reference")
        return lambda params, **extra: self.twin(params, **{**self.options, **extra})

    @property
    def tolerance(self) -> float:
        """For float64 runs; torch keeps NAdam's mu_product in float32 always."""
        return 1e-5 if self.rule.extra else 1e-11


SPECS = [Spec(name, rule, twin) for rule in RULES.values() for name, twin in rule.optimizers.items()]
every_class = pytest.mark.parametrize("spec", SPECS, ids=str)
every_twin = pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.twin_name], ids=str)


# Classes that contract tests run with on these backends, besides `cpu`, where they run with all and in every dtype: those that
# differ in what is kept and how (no step count, a second scalar, sums over tensors). FUSEDOPT_TEST_ALL=1: all everywhere.
# The rules' own mathematics has tests for each backend (test_parity.py, test_device.py).
CLASSES_ON = {
    "reference": ("SGD", "Adagrad", "AdamW", "NAdam", "LAMB"),
    "cuda": ("SGD", "AdamW", "NAdam", "LAMB"),
    "triton": ("AdamW",),  # its interpreter is slow
}
if os.environ.get("FUSEDOPT_TEST_ALL") == "1":
    CLASSES_ON = {}


def specs_on(backend: str) -> list[Spec]:
    """For contract tests of all classes at once."""
    return [spec for spec in SPECS if spec.name in CLASSES_ON.get(backend, (spec.name,))]


def only_on(backend: str, why: str) -> pytest.MarkDecorator:
    """Marks a contract test that says nothing new on the other backends."""
    return pytest.mark.only_on(backend, why=why)


# Adam and AdamW of torch 2.6 have no such option.
ADAM_HAS_DECOUPLED = "decoupled_weight_decay" in torch.optim.Adam([torch.zeros(1)]).defaults


def known_to_torch(options: dict[str, Any]) -> dict[str, Any]:
    """A group's options less the one that this torch may be too old for."""
    return {name: value for name, value in options.items() if ADAM_HAS_DECOUPLED or name != "decoupled_weight_decay"}


def randn(shape, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    """The same normal values for every dtype, to its rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def make_params(shapes=SHAPES, dtype=torch.float32, seed: int = 0) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(randn(shape, dtype, 1000 * seed + i)) for i, shape in enumerate(shapes)]


def clone_params(params) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(param.detach().clone(), requires_grad=param.requires_grad) for param in params]


def set_grads(params, seed: int) -> None:
    """New gradient tensors, other values for every seed and parameter."""
    for i, param in enumerate(params):
        param.grad = randn(param.shape, param.dtype, 7919 * (seed + 1) + i)


def train(optimizer, params, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        set_grads(params, step)
        optimizer.step()


def bits(tensor: torch.Tensor) -> bytes:
    """The elements in row-major order, so that NaN equals itself and -0.0 is not 0.0."""
    if tensor.is_meta:
        return b""
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def _integers(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, read as integers."""
    if tensor.is_quantized:
        return tensor.int_repr()  # torch.equal of a view would crash
    tensor = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def same_bits(a, b) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and (a.is_meta or torch.equal(_integers(a), _integers(b)))
    return type(a) is type(b) and (a == b or a != a)


def assert_same_bits(ours, theirs, what: str = "tensor") -> None:
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert same_bits(a, b), f"{what} {i} differs"


def assert_close(ours, theirs, tolerance: float) -> None:
    """To a part of the largest magnitude in each tensor."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.shape == b.shape
        a, b = a.detach().double(), b.detach().double()
        scale = b.abs().max() if b.numel() else 0
        error = (a - b).abs().max() if b.numel() else 0
        assert error <= tolerance * scale, f"tensor {i} is off by {float(error):.3g} at scale {float(scale):.3g}"


def assert_same_run(ours, theirs, tolerance: float) -> None:
    """Parameters and states of two optimizers, by position; states that hold nothing yet may be absent."""

    def params(optimizer):
        return [param for group in optimizer.param_groups for param in group["params"]]

    assert_close(params(ours), params(theirs), tolerance)
    for i, (a, b) in enumerate(zip(params(ours), params(theirs), strict=True)):
        mine, other = ours.state.get(a, {}), theirs.state.get(b, {})
        if "step" in other and float(other["step"]) == 0 and not mine:
            continue  # torch's Adagrad makes its state at construction
        other = {name: value for name, value in other.items() if value is not None}
        assert mine.keys() == other.keys(), f"parameter {i} has states {[*mine]}, not {[*other]}"
        for name in mine:
            if name == "step":
                assert float(mine[name]) == float(other[name]), (
                    f"parameter {i}: step is {mine[name]}, not {other[name]}"
                )
            else:
                assert_close([mine[name]], [other[name]], tolerance)


def snapshot(optimizer) -> tuple:
    """Everything a refused step must leave alone, copied."""
    groups = [{**group, "params": [id(param) for param in group["params"]]} for group in optimizer.param_groups]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    values = [
        param.detach().clone() if param.layout == torch.strided and not param.is_meta else None for param in params
    ]
    grads = [
        None if p.grad is None or p.grad.layout != torch.strided or p.grad.is_meta else p.grad.clone() for p in params
    ]
    state = {
        id(param): {
            name: value.clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)
            for name, value in state.items()
        }
        for param, state in optimizer.state.items()
    }
    return copy.deepcopy(groups), values, grads, state


def assert_unchanged(before: tuple, optimizer) -> None:
    groups, values, grads, state = before
    groups_now, values_now, grads_now, state_now = snapshot(optimizer)
    assert len(groups_now) == len(groups)
    for group, now in zip(groups, groups_now, strict=True):
        assert group.keys() == now.keys()
        for name in group:
            equal = same_bits if isinstance(group[name], (torch.Tensor, float)) else lambda a, b: repr(a) == repr(b)
            assert equal(group[name], now[name]), f"group option {name}"
    for what, old, new in (("parameter", values, values_now), ("gradient", grads, grads_now)):
        assert_same_bits(old, new, what)
    assert state.keys() == state_now.keys(), "state appeared or vanished"
    for param, old in state.items():
        assert old.keys() == state_now[param].keys(), f"states {[*old]} became {[*state_now[param]]}"
        assert_same_bits(old.values(), state_now[param].values(), "state")


@contextlib.contextmanager
def nothing_changes(optimizer) -> Iterator[None]:
    """Parameters, gradients, states, step counts and groups are bitwise the same at the end."""
    before = snapshot(optimizer)
    yield
    assert_unchanged(before, optimizer)


def in_a_new_process(code: str, **environment: str | None) -> str:
    """What a program prints, with this one's environment but for the variables given; None: without that one."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    environment = {name: value for name, value in environment.items() if value is not None}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return run.stdout


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
ignores_fork_warning = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def run_in_fork(body: Callable[[], bytes | None], timeout: float = 300) -> bytes:
    """What body() returns in a forked child, which must end well, and in time."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            answer = body() or b""
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(answer)
            status = 0
        except BaseException as error:
            os.write(2, f"in the child: {error!r}\n".encode())
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        has_answered, _, _ = select.select([pipe], [], [], timeout)
        if not has_answered:
            os.kill(child, signal.SIGKILL)
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    assert has_answered, "the child hangs"
    assert os.waitstatus_to_exitcode(status) == 0
    return answer

"""What parity is proved on: rows of the table x options x dtypes x awkward sizes, an oracle in float64, and the bound."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

import fusedopt
from fusedopt import reference
from fusedopt.rules import RULES, Rule

# 0, 1, around every vector width (2 to 16 elements and unrolled multiples), the 256-element tile and the chunk of 32768
# elements, primes, and one tensor of more than a million.
SIZES = (
    0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 263, 511, 513, 1021,
    4099, 16383, 16384, 16385, 32767, 32768, 32769, 65543, 1_000_003,
)  # fmt: skip
SMALL_SIZES = (1, 7, 8, 33, 257, 1021)

# (parameter, gradient)
DTYPES = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
)


def dtype_id(pair: tuple[torch.dtype, torch.dtype]) -> str:
    """How a row of `DTYPES` is called in the name of a test."""
    return "-".join(str(dtype).removeprefix("torch.") for dtype in pair)


def can_mix_dtypes() -> bool:
    """Whether this torch lets a gradient have another dtype than its parameter."""
    return hasattr(torch.Tensor, "grad_dtype")


def set_grad(param: torch.Tensor, grad: torch.Tensor) -> None:
    """``param.grad = grad``, also where the dtypes differ."""
    if grad.dtype != param.dtype:
        param.grad_dtype = None
    param.grad = grad


@dataclass(frozen=True)
class Case:
    """One optimizer class with one set of constructor arguments."""

    optimizer: str
    rule: Rule
    kwargs: dict[str, Any]

    def __str__(self) -> str:
        options = ",".join(f"{name}={value}" for name, value in self.kwargs.items())
        return f"{self.optimizer}({options})"

    def make(self, params, **extra):
        return getattr(fusedopt, self.optimizer)(params, **{"lr": 0.01, **self.kwargs, **extra})

    @property
    def twin(self):
        """The same algorithm in torch.optim, or None where torch has not this option."""
        name = self.rule.optimizers[self.optimizer]
        return None if name is None or set(self.kwargs) & set(self.rule.own_options) else getattr(torch.optim, name)


CASES = [
    Case(optimizer, rule, dict(kwargs))
    for rule in RULES.values()
    for optimizer in rule.optimizers
    for kwargs in rule.cases
]


def random_params(sizes, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> list[torch.nn.Parameter]:
    values = _normal(sum(sizes), seed).to(dtype).to(device).split(list(sizes))
    return [torch.nn.Parameter(value.clone()) for value in values]


def random_grads(sizes, dtype: torch.dtype, step: int, seed: int = 0, device: str = "cpu") -> list[torch.Tensor]:
    """Normal values times magnitudes from 1e-6 to 1e2, so that eps, the moments and the clip all matter somewhere."""
    return [
        grad.clone() for grad in _wide(sum(sizes), seed + 1000 * (step + 1)).to(dtype).to(device).split(list(sizes))
    ]


@functools.lru_cache(maxsize=32)
def _normal(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@functools.lru_cache(maxsize=32)
def _wide(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    magnitude = 10.0 ** (8 * torch.rand(count, generator=generator, dtype=torch.float64) - 6)
    return magnitude * torch.randn(count, generator=generator, dtype=torch.float64)


# The largest difference between two libraries' float64 powers of a number below 1. The unit is 2^-53, the last place of a value
# from 0.5 to 1. pow(x, y) is off by at most 1 unit. exp2(y * log2(x)) is off by 1 unit for exp2, and by 1.1 units because its
# argument has been rounded twice: this moves a power p by at most 1.5 eps * |p ln p|, and |p ln p| <= 1/e. Both powers are
# multiples of the unit, so their difference is at most 3 units.
POWER_ERROR = 3 * 2.0**-53


class StepCount(float):
    """A step count whose powers can be shifted: ``beta ** step`` returns the power plus ``shifts[beta, step]``.

    A power that is not in ``shifts`` yet is added, with a shift of 0.
    """

    def __new__(cls, value: float, shifts: dict[tuple[float, float], float]):
        self = super().__new__(cls, value)
        self.shifts = shifts
        return self

    def __add__(self, other):
        return StepCount(float(self) + other, self.shifts)

    def __mul__(self, other):
        return StepCount(float(self) * other, self.shifts)

    def __rpow__(self, base):
        return base ** float(self) + self.shifts.setdefault((base, float(self)), 0.0)


class Oracle:
    """The reference function in float64 over all parameters as one vector, with the states it needs.

    Over each tensor by itself for a rule that sums over tensors.

    Args:
        has_other_powers: whether the optimizer takes its powers from another library than Python does. `spread` then bounds
            the difference that this makes to each parameter.
    """

    def __init__(self, case: Case, group: dict[str, Any], params: list[torch.Tensor], has_other_powers: bool = False):
        self.rule = case.rule
        self.function = getattr(reference, case.rule.name)
        self.options = {
            name: group[name] if name in group else self.rule.own_options[name] for name in keywords(self.function)
        }
        self.param = _flat(params)
        self.sizes = [param.numel() for param in params] if case.rule.num_sums else [len(self.param)]
        self.step_count = 0
        self.state = {}
        for slot in self.rule.stored(group):
            if slot is not None:
                initial = float(group[slot.initial]) if slot.initial else 0.0
                self.state[slot.name] = torch.full_like(self.param, initial)
        if self.rule.extra:
            self.state[self.rule.extra] = 1.0
        self.is_ambiguous = torch.zeros_like(self.param, dtype=torch.bool)
        self.has_other_powers = has_other_powers
        self.spread = torch.zeros_like(self.param)

    def load(self, params: list[torch.Tensor], optimizer, step_count: int) -> None:
        """Continues from an optimizer's parameters and states, after that many steps."""
        self.param, self.step_count = _flat(params), step_count
        for name in self.state:
            values = [optimizer.state[param][name] for param in params]
            self.state[name] = float(values[0]) if name == self.rule.extra else _flat(values)

    def step(self, grads: list[torch.Tensor], max_grad_norm: float | None = None) -> None:
        self.step_count += 1
        grad = _flat(grads)
        if max_grad_norm is not None:
            grad = grad * reference.clip_coefficient(reference.total_norm([grad]), max_grad_norm)
        if self.rule.name == "lion":
            # A sign has no rounding error but at the jump: where the terms cancel to 1e-6, either sign is right.
            beta1 = self.options["betas"][0]
            terms = beta1 * self.state["exp_avg"], (1 - beta1) * grad * (-1 if self.options["maximize"] else 1)
            self.is_ambiguous |= (terms[0] + terms[1]).abs() < 1e-6 * (terms[0].abs() + terms[1].abs())
        param, state = self._computed(grad, self.state, self.step_count)
        if self.has_other_powers:
            self.spread += self._spread_of_powers(grad, param)
        self.param, self.state = param, state

    def _computed(self, grad: torch.Tensor, state: dict[str, Any], step: float) -> tuple[torch.Tensor, dict[str, Any]]:
        vectors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
        parts = []
        for values in zip(*(vector.split(self.sizes) for vector in (self.param, grad, *vectors.values())), strict=True):
            new = {**state, **dict(zip(vectors, values[2:], strict=True))}
            parts.append((self.function(*values[:2], new, step, **self.options), new))
        param = torch.cat([param for param, _ in parts])
        return param, parts[-1][1] | {name: torch.cat([new[name] for _, new in parts]) for name in vectors}

    def _spread_of_powers(self, grad: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
        """The first-order change of each parameter in this step if every power in it is off by POWER_ERROR.

        One power at a time is moved by 2^20 times as much, so that the rounding of the step itself does not show.
        """
        shifts: dict[tuple[float, float], float] = {}
        self._computed(grad, self.state, StepCount(self.step_count, shifts))
        moved = [
            self._computed(grad, self.state, StepCount(self.step_count, {**shifts, power: POWER_ERROR * 2**20}))
            for power in shifts
        ]
        if (
            self.rule.extra
        ):  # a product of one factor per step, each off by the error of its power and by its own rounding
            factor = 1 + (self.step_count - 1) * 2 * POWER_ERROR * 2**20
            state = {**self.state, self.rule.extra: self.state[self.rule.extra] * factor}
            moved.append(self._computed(grad, state, self.step_count))
        return sum(((param - expected).abs() for param, _ in moved), torch.zeros_like(expected)) / 2**20


def keywords(function) -> list[str]:
    code = function.__code__
    return list(code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount])


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors]).cpu()


def check_parity(
    case: Case,
    param_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    sizes=SIZES,
    steps: int = 10,
    max_grad_norm: float | None = None,
    seed: int = 0,
    device: str = "cpu",
    **optimizer_kwargs,
) -> float:
    """Runs an optimizer against the oracle; returns the largest part of the tolerance that was used.

    The bound, for each element and after each of the steps: 16 eps of the computing dtype (32 for a rule that sums over
    tensors) times the larger of |param| and the largest update so far; for 16-bit parameters 1 ulp more. For these, and with L2
    decay, the oracle starts every step from the stored parameter: where g + λθ cancels, the rounding of θ in the step before is
    a large part of the sum. Triton and GPUs do not take powers from the C library, as Python does: there the bound of float64
    parameters is larger by `Oracle.spread`. In float32 the 16 eps suffice: a scalar is the same number or its neighbour.

    Raises:
        AssertionError: an element is off by more, or a gradient was written to.
    """
    params = random_params(sizes, param_dtype, seed, device)
    optimizer = case.make(params, max_grad_norm=max_grad_norm, **optimizer_kwargs)
    has_other_powers = device != "cpu" or optimizer_kwargs.get("backend") == "triton"
    oracle = Oracle(case, optimizer.param_groups[0], params, has_other_powers and param_dtype == torch.float64)
    eps = torch.finfo(torch.float64 if param_dtype == torch.float64 else torch.float32).eps
    is_narrow = param_dtype in (torch.bfloat16, torch.float16)
    has_l2 = oracle.options["weight_decay"] != 0 and not oracle.options.get(
        "decoupled_weight_decay", case.rule.name == "lion"
    )
    largest = torch.zeros_like(oracle.param)
    used = 0.0
    for step in range(steps):
        if is_narrow or has_l2:
            oracle.param = _flat(params)
            oracle.spread.zero_()
        grads = random_grads(sizes, grad_dtype, step, seed, device)
        for param, grad in zip(params, grads, strict=True):
            set_grad(param, grad.clone())
        started_from = oracle.param
        oracle.step(grads, max_grad_norm)
        optimizer.step()

        for param, grad in zip(params, grads, strict=True):
            assert torch.equal(param.grad, grad), "the gradient was written to"
        largest = torch.maximum(largest, torch.maximum(started_from.abs(), (oracle.param - started_from).abs()))
        bound = (32 if oracle.rule.num_sums else 16) * eps * largest  # of a million elements float64 rounds the sum too
        if is_narrow:
            bound = bound + _ulp(oracle.param, param_dtype)
        bound = bound + oracle.spread
        error = (_flat(params) - oracle.param).abs().masked_fill(oracle.is_ambiguous, 0)
        ratio = torch.where(error == 0, 0, error / bound)
        worst = float(ratio.max())
        assert worst <= 1, (
            f"{case} {param_dtype} (grad {grad_dtype}), step {step + 1}: element {int(ratio.argmax())} is off by "
            f"{float(error[ratio.argmax()]):.3g}, {worst:.3g} times the bound"
        )
        used = max(used, worst)
        if oracle.rule.name == "lion":
            # Where the signs differed legitimately, go on from one value.
            assert oracle.is_ambiguous.sum() <= 1 + 1e-4 * len(oracle.param)
            oracle.param = torch.where(oracle.is_ambiguous, _flat(params), oracle.param)
    return used


def _ulp(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Distance between neighbours of a 16-bit format at a float64 value."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(value.abs().clamp(min=info.smallest_normal)).exponent - 1
    return torch.ldexp(torch.full_like(value, info.eps), exponent)

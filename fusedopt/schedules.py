"""Learning-rate schedules over optimizer steps: one call each, for any optimizer of torch.optim or fusedopt.

Each returns a scheduler of ``torch.optim.lr_scheduler``; call its ``step()`` after every ``optimizer.step()``. Steps are
counted from 1, and the lr that the optimizer was made with is the peak, of each group its own:

- with a warmup of w steps, step t ≤ w takes t/w of the peak: the first lr is above 0, step w takes the peak itself. A warmup of
  0 is one of 1: the first step takes the peak;
- where there is a total, the last step takes the floor, and steps after it stay there. A warmup that takes all steps ends at
  the peak.

To resume, make optimizer and scheduler as before, then load the state of both: it holds the schedule's numbers too, which
replace those given. Only numbers and strings are in it, so that ``torch.load(..., weights_only=True)`` takes it.

All but `one_cycle` are torch's LambdaLR, each with one callable that gives the factor of a step. SequentialLR over LinearLR and
CosineAnnealingLR would avoid the callables, but these work out an lr from the one before: rounding lets them miss the peak, and
after its end the cosine climbs again. A lambda would be left out of the scheduler's state; a dataclass is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from fusedopt.optimizers import Lion
from fusedopt.ranges import integer, number

__all__ = ["inverse_sqrt", "linear", "one_cycle", "step", "warmup_cosine", "warmup_stable_decay"]

# What is left of the distance from peak to floor when a part x of the decay is over, 0 < x < 1.
DECAYS = {
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "linear": lambda x: 1 - x,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
}


def warmup_cosine(optimizer: Optimizer, total_steps: int, warmup_steps: int, min_lr_ratio: float = 0.1) -> LambdaLR:
    r"""Linear warmup, then half a cosine down to a floor: the usual one to pretrain transformers.

    .. math::
        \eta_t / \eta = t / w \ \ (t \le w), \qquad
        r + (1 - r)\,\tfrac12 \left( 1 + \cos \pi \frac{t - w}{T - w} \right) \ \ (w < t \le T), \qquad r \ \ (t > T)

    Args:
        optimizer: whose groups' lr η is the peak; floats or 0-d tensors.
        total_steps: T, >= 1.
        warmup_steps: w, from 0 to T.
        min_lr_ratio: r, the floor as a part of the peak, in [0, 1].

    Returns:
        A LambdaLR.

    Raises:
        ValueError: an argument out of its range, by name. Then the optimizer is unchanged.

    Example:
        >>> import torch, fusedopt
        >>> opt = fusedopt.AdamW([torch.nn.Parameter(torch.ones(2))], lr=1.0)
        >>> scheduler = fusedopt.schedules.warmup_cosine(opt, total_steps=6, warmup_steps=2)
        >>> lrs = []
        >>> for _ in range(7):
        ...     lrs += scheduler.get_last_lr()
        ...     opt.step()
        ...     scheduler.step()
        >>> [round(lr, 3) for lr in lrs]
        [0.5, 1.0, 0.868, 0.55, 0.232, 0.1, 0.1]

    Reference: Loshchilov & Hutter 2017, "SGDR: Stochastic gradient descent with warm restarts", arXiv:1608.03983, of which it
    is one cycle; with warmup and a tenth for the floor: Brown et al. 2020 (GPT-3), arXiv:2005.14165, appendix B.
    """
    return _warmup_and_decay(optimizer, total_steps, warmup_steps, min_lr_ratio, "cosine")


def linear(optimizer: Optimizer, total_steps: int, warmup_steps: int, min_lr_ratio: float = 0.0) -> LambdaLR:
    r"""Linear warmup, then a straight line down to a floor: the usual one to fine-tune.

    .. math::
        \eta_t / \eta = t / w \ \ (t \le w), \qquad
        r + (1 - r)\,\frac{T - t}{T - w} \ \ (w < t \le T), \qquad r \ \ (t > T)

    Args:
        optimizer: whose groups' lr η is the peak; floats or 0-d tensors.
        total_steps: T, >= 1.
        warmup_steps: w, from 0 to T.
        min_lr_ratio: r, the floor as a part of the peak, in [0, 1]. With 0 the last step moves nothing.

    Returns:
        A LambdaLR.

    Raises:
        ValueError: an argument out of its range, by name. Then the optimizer is unchanged.

    Example:
        >>> import torch, fusedopt
        >>> opt = fusedopt.AdamW([torch.nn.Parameter(torch.ones(2))], lr=1.0)
        >>> scheduler = fusedopt.schedules.linear(opt, total_steps=6, warmup_steps=2)
        >>> lrs = []
        >>> for _ in range(7):
        ...     lrs += scheduler.get_last_lr()
        ...     opt.step()
        ...     scheduler.step()
        >>> [round(lr, 2) for lr in lrs]
        [0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]

    Reference: Devlin et al. 2019 (BERT), arXiv:1810.04805, appendix A.2; why a line: Defazio et al. 2023, "When, why and how
    much? Adaptive learning rate scheduling by refinement", arXiv:2310.07831.
    """
    return _warmup_and_decay(optimizer, total_steps, warmup_steps, min_lr_ratio, "linear")


def warmup_stable_decay(
    optimizer: Optimizer,
    total_steps: int,
    warmup_steps: int,
    decay_steps: int,
    min_lr_ratio: float = 0.0,
    decay: str = "1-sqrt",
) -> LambdaLR:
    r"""Linear warmup, the peak for most of the steps, and a short decay (WSD): to pretrain without knowing for how long.

    A checkpoint from before the decay can be trained on at the peak; each length needs its own decay only.

    .. math::
        \eta_t / \eta = t / w \ \ (t \le w), \qquad 1 \ \ (w < t \le T - d), \qquad
        r + (1 - r)\,f\!\left( \frac{t - (T - d)}{d} \right) \ \ (T - d < t \le T), \qquad r \ \ (t > T)

    with :math:`f(x) = 1 - x` or :math:`1 - \sqrt x`.

    Args:
        optimizer: whose groups' lr η is the peak; floats or 0-d tensors.
        total_steps: T, >= 1.
        warmup_steps: w, >= 0.
        decay_steps: d, >= 1; w + d at most T. A tenth (Hu et al.) to a fifth (Hägele et al.) of T.
        min_lr_ratio: r, the floor as a part of the peak, in [0, 1]. With 0 the last step moves nothing.
        decay: f, ``"1-sqrt"`` or ``"linear"``.

    Returns:
        A LambdaLR.

    Raises:
        ValueError: an argument out of its range, by name. Then the optimizer is unchanged.

    Example:
        >>> import torch, fusedopt
        >>> opt = fusedopt.AdamW([torch.nn.Parameter(torch.ones(2))], lr=1.0)
        >>> scheduler = fusedopt.schedules.warmup_stable_decay(opt, total_steps=8, warmup_steps=2, decay_steps=4)
        >>> lrs = []
        >>> for _ in range(9):
        ...     lrs += scheduler.get_last_lr()
        ...     opt.step()
        ...     scheduler.step()
        >>> [round(lr, 2) for lr in lrs]
        [0.5, 1.0, 1.0, 1.0, 0.5, 0.29, 0.13, 0.0, 0.0]

    Reference: Hu et al. 2024, "MiniCPM: Unveiling the potential of small language models with scalable training strategies",
    arXiv:2404.06395; 1 − √x: Hägele et al. 2024, "Scaling laws and compute-optimal training beyond fixed training durations",
    arXiv:2405.18392.
    """
    total_steps, warmup_steps = _total_and_warmup(total_steps, warmup_steps)
    decay_steps = integer("decay_steps", decay_steps, 1)
    if warmup_steps + decay_steps > total_steps:
        raise ValueError(
            f"warmup_steps + decay_steps must be at most total_steps, got {warmup_steps} + {decay_steps} > {total_steps}"
        )
    if decay not in ("1-sqrt", "linear"):
        raise ValueError(f"decay must be '1-sqrt' or 'linear', got {decay!r}")
    return LambdaLR(optimizer, _Decay(total_steps, warmup_steps, decay_steps, _ratio(min_lr_ratio), decay))


def inverse_sqrt(optimizer: Optimizer, warmup_steps: int) -> LambdaLR:
    r"""Linear warmup, then a decay with the square root of the step: no total is needed, and no floor is reached.

    .. math::
        \eta_t / \eta = \min \left( t / w, \ \sqrt{w / t} \right)

    In Vaswani et al. the peak η is :math:`1 / \sqrt{d_{model}\,w}`, which is 7e-4 for their base model (512 wide, 4000 steps of
    warmup).

    Args:
        optimizer: whose groups' lr η is the peak; floats or 0-d tensors.
        warmup_steps: w, >= 1.

    Returns:
        A LambdaLR.

    Raises:
        ValueError: warmup_steps out of its range. Then the optimizer is unchanged.

    Example:
        >>> import torch, fusedopt
        >>> opt = fusedopt.Adam([torch.nn.Parameter(torch.ones(2))], lr=1.0)
        >>> scheduler = fusedopt.schedules.inverse_sqrt(opt, warmup_steps=4)
        >>> lrs = []
        >>> for _ in range(9):
        ...     lrs += scheduler.get_last_lr()
        ...     opt.step()
        ...     scheduler.step()
        >>> [round(lr, 2) for lr in lrs]
        [0.25, 0.5, 0.75, 1.0, 0.89, 0.82, 0.76, 0.71, 0.67]

    Reference: Vaswani et al. 2017, "Attention is all you need", arXiv:1706.03762, section 5.3.
    """
    return LambdaLR(optimizer, _InverseSqrt(integer("warmup_steps", warmup_steps, 1)))


def step(optimizer: Optimizer, step_size: int, gamma: float = 0.1, warmup_steps: int = 0) -> LambdaLR:
    r"""The peak for `step_size` steps, then `gamma` times as much for as many, and so on; optionally with linear warmup.

    .. math::
        \eta_t / \eta = t / w \ \ (t \le w), \qquad \gamma^{\lfloor (t - 1) / n \rfloor} \ \ (t > w)

    Args:
        optimizer: whose groups' lr η is the peak; floats or 0-d tensors.
        step_size: n, >= 1; counted from the first step, so that the warmup is part of the first n.
        gamma: γ, in [0, 1].
        warmup_steps: w, from 0 to n.

    Returns:
        A LambdaLR.

    Raises:
        ValueError: an argument out of its range, by name. Then the optimizer is unchanged.

    Example:
        >>> import torch, fusedopt
        >>> opt = fusedopt.SGD([torch.nn.Parameter(torch.ones(2))], lr=1.0, momentum=0.9)
        >>> scheduler = fusedopt.schedules.step(opt, step_size=3, warmup_steps=2)
        >>> lrs = []
        >>> for _ in range(7):
        ...     lrs += scheduler.get_last_lr()
        ...     opt.step()
        ...     scheduler.step()
        >>> [round(lr, 2) for lr in lrs]
        [0.5, 1.0, 1.0, 0.1, 0.1, 0.1, 0.01]

    Reference: He et al. 2016, "Deep residual learning for image recognition", arXiv:1512.03385; with warmup: Goyal et al. 2017,
    "Accurate, large minibatch SGD", arXiv:1706.02677.
    """
    step_size = integer("step_size", step_size, 1)
    warmup_steps = integer("warmup_steps", warmup_steps, 0)
    if warmup_steps > step_size:
        raise ValueError(f"warmup_steps must be at most step_size, got {warmup_steps} > {step_size}")
    return LambdaLR(optimizer, _Step(step_size, _ratio(gamma, "gamma"), warmup_steps))


def one_cycle(
    optimizer: Optimizer,
    total_steps: int,
    warmup_steps: int,
    initial_lr_ratio: float = 1 / 25,
    min_lr_ratio: float = 4e-6,
    momentum_range: tuple[float, float] | None = (0.85, 0.95),
) -> OneCycleLR:
    r"""Half a cosine up to the peak and half a cosine down to almost nothing, with momentum going the other way.

    With :math:`h(x) = \tfrac12 (1 - \cos \pi x)`,

    .. math::
        \eta_t / \eta = s + (1 - s)\,h\!\left( \frac{t - 1}{w - 1} \right) \ \ (t \le w), \qquad
        1 - (1 - r)\,h\!\left( \frac{t - w}{T - w} \right) \ \ (w < t \le T), \qquad r \ \ (t > T)

    and the momentum falls from its upper end to the lower one until step w, and rises again until step T. It is SGD's and
    RMSprop's ``momentum``, and ``betas[0]`` of Adam and its kin. It is left alone where it is 0, because that would switch
    momentum on; in Lion, whose ``betas[0]`` weighs gradient against momentum in one step and is no rate of decay; and in
    Adagrad, which has none.

    Args:
        optimizer: whose groups' lr η is the peak; floats or 0-d tensors.
        total_steps: T, >= 3.
        warmup_steps: w, from 2 to T − 1; usual are 0.3 T to 0.45 T.
        initial_lr_ratio: s, the first lr as a part of the peak, in (0, 1].
        min_lr_ratio: r, the floor as a part of the peak, in [0, 1].
        momentum_range: lower and upper end of the momentum, each in [0, 1); None: leave it alone.

    Returns:
        A OneCycleLR of torch, but that it stays at the floor where torch's would rise again and then raise. The ends of lr and
        momentum are in the optimizer's groups, and so in the optimizer's checkpoint.

    Raises:
        ValueError: an argument out of its range, by name. Then the optimizer is unchanged.

    Example:
        >>> import torch, fusedopt
        >>> opt = fusedopt.SGD([torch.nn.Parameter(torch.ones(2))], lr=1.0, momentum=0.9)
        >>> scheduler = fusedopt.schedules.one_cycle(opt, total_steps=7, warmup_steps=3)
        >>> for _ in range(4):
        ...     print(round(opt.param_groups[0]["lr"], 2), round(opt.param_groups[0]["momentum"], 2))
        ...     opt.step()
        ...     scheduler.step()
        0.04 0.95
        0.52 0.9
        1.0 0.85
        0.85 0.86

    Reference: Smith & Topin 2018, "Super-convergence: Very fast training of neural networks using large learning rates",
    arXiv:1708.07120; momentum: Smith 2018, "A disciplined approach to neural network hyper-parameters", arXiv:1803.09820.
    """
    total_steps = integer("total_steps", total_steps, 3)
    warmup_steps = integer("warmup_steps", warmup_steps, 2)
    if warmup_steps >= total_steps:
        raise ValueError(f"warmup_steps must be less than total_steps, got {warmup_steps} >= {total_steps}")
    initial_lr_ratio, min_lr_ratio = _ratio(initial_lr_ratio, "initial_lr_ratio"), _ratio(min_lr_ratio)
    if initial_lr_ratio == 0:
        raise ValueError("initial_lr_ratio must be above 0")
    ranges, moves = _momentum_ranges(optimizer, momentum_range)
    return _OneCycle(
        optimizer,
        max_lr=[float(group["lr"]) for group in optimizer.param_groups],
        total_steps=total_steps,
        # The next float above, so that rounding cannot end the rise before step w, which would then miss the peak.
        pct_start=math.nextafter(warmup_steps / total_steps, 1),
        cycle_momentum=moves,
        base_momentum=[low for low, _ in ranges],
        max_momentum=[high for _, high in ranges],
        div_factor=1 / initial_lr_ratio,
        final_div_factor=initial_lr_ratio / min_lr_ratio if min_lr_ratio else math.inf,
    )


class _OneCycle(OneCycleLR):
    def step(self, epoch: int | None = None) -> None:
        if self.last_epoch < self.total_steps - 1:
            super().step(epoch)


def _momentum_ranges(
    optimizer: Optimizer, momentum_range: tuple[float, float] | None
) -> tuple[list[tuple[float, float]], bool]:
    """Lower and upper end of every group's momentum, the same where it is to stay; and whether any moves."""
    now = [
        group["betas"][0] if "betas" in optimizer.defaults else group.get("momentum", 0.0)
        for group in optimizer.param_groups
    ]
    if momentum_range is None or isinstance(optimizer, Lion):
        return [(value, value) for value in now], False
    if not isinstance(momentum_range, (tuple, list)) or len(momentum_range) != 2:
        raise ValueError(f"momentum_range must be two numbers, got {momentum_range!r}")
    low, high = (number(f"momentum_range[{i}]", value) for i, value in enumerate(momentum_range))
    if not 0 <= low <= high < 1:
        raise ValueError(f"momentum_range must rise and be in [0, 1), got {momentum_range}")
    return [(low, high) if value > 0 else (value, value) for value in now], any(value > 0 for value in now)


# ---- the factor of each step; a scheduler calls them with the number of steps that are done ------------------------


@dataclass
class _Decay:
    total_steps: int
    warmup_steps: int
    decay_steps: int
    min_lr_ratio: float
    decay: str

    def __call__(self, steps_done: int) -> float:
        step, peak = steps_done + 1, max(self.warmup_steps, 1)
        if step <= peak:
            return step / peak
        if step >= self.total_steps:
            return self.min_lr_ratio
        part = (step - (self.total_steps - self.decay_steps)) / self.decay_steps
        if part <= 0:
            return 1.0
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * DECAYS[self.decay](part)


@dataclass
class _InverseSqrt:
    warmup_steps: int

    def __call__(self, steps_done: int) -> float:
        step = steps_done + 1
        return min(step / self.warmup_steps, math.sqrt(self.warmup_steps / step))


@dataclass
class _Step:
    step_size: int
    gamma: float
    warmup_steps: int

    def __call__(self, steps_done: int) -> float:
        if steps_done < self.warmup_steps:
            return (steps_done + 1) / self.warmup_steps
        return self.gamma ** (steps_done // self.step_size)


def _warmup_and_decay(
    optimizer: Optimizer, total_steps: int, warmup_steps: int, min_lr_ratio: float, shape: str
) -> LambdaLR:
    """The decay begins where the warmup ends."""
    total_steps, warmup_steps = _total_and_warmup(total_steps, warmup_steps)
    decay_steps = total_steps - max(warmup_steps, 1)
    return LambdaLR(optimizer, _Decay(total_steps, warmup_steps, decay_steps, _ratio(min_lr_ratio), shape))


# ---- arguments -----------------------------------------------------------------------------------------------------


def _total_and_warmup(total_steps: Any, warmup_steps: Any) -> tuple[int, int]:
    total_steps, warmup_steps = integer("total_steps", total_steps, 1), integer("warmup_steps", warmup_steps, 0)
    if warmup_steps > total_steps:
        raise ValueError(f"warmup_steps must be at most total_steps, got {warmup_steps} > {total_steps}")
    return total_steps, warmup_steps


def _ratio(value: Any, name: str = "min_lr_ratio") -> float:
    checked = number(name, value)
    if not 0 <= checked <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return checked

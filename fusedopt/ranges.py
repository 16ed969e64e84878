"""What an option of a group may be: numbers, switches, and the range of every hyperparameter."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

BETAS = ("beta1", "beta2", "beta3")  # what a group's `betas` holds
# Every hyperparameter that must lie in a range: (smallest, largest, whether the largest is allowed).
RANGES = {
    "lr": (0, math.inf, False),
    "beta1": (0, 1, False),
    "beta2": (0, 1, False),
    "beta3": (0, 1, False),
    "eps": (0, math.inf, False),
    "weight_decay": (0, math.inf, False),
    "momentum": (0, math.inf, False),
    "dampening": (-math.inf, math.inf, False),
    "alpha": (0, 1, True),
    "lr_decay": (0, math.inf, False),
    "momentum_decay": (0, math.inf, False),
    "rho": (0, math.inf, False),
    "initial_accumulator_value": (0, math.inf, False),
}


def number(name: str, value: Any, takes_bool: bool = False) -> float:
    """An option's value as a float: a number, or a tensor of one element. A bool or a string is a mistake, not a number."""
    if type(value) is float:
        return value
    try:
        is_bool = isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))
        if not isinstance(value, (str, bytes)) and (takes_bool or not is_bool):
            return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise ValueError(f"{name} must be a number, got {value!r}")


def is_sequence(value: Any) -> bool:
    """Whether it holds values in an order: a tuple or list, one of a configuration library, a NumPy array, a 1-d tensor."""
    if isinstance(value, (str, bytes, Mapping)):
        return False
    return isinstance(value, Sequence) or getattr(value, "ndim", 0) == 1


def integer(name: str, value: Any, low: int) -> int:
    """A count as Python's int: of any library's integers, but no bool."""
    try:
        checked = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        checked = None
    if checked is None or checked < low:
        raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")
    return checked


def is_elsewhere(value: Any) -> bool:
    """Whether it is a tensor of one element that some device has: reading it would wait for the device."""
    return not getattr(value, "is_cpu", True) and value.numel() == 1


def flag(name: str, value: Any) -> bool:
    """An option that is on or off."""
    if isinstance(value, int) and value in (0, 1):  # True and False too
        return bool(value)
    raise ValueError(f"{name} must be True or False, got {value!r}")


def check_range(name: str, value: float, given: Any) -> None:
    """Raises ValueError if a hyperparameter is out of its range. ``given``: the value as the user wrote it."""
    low, high, includes_high = RANGES[name]
    if value > -math.inf and (low <= value < high or (includes_high and value == high)):
        return
    label = f"betas[{BETAS.index(name)}]" if name in BETAS else name
    bounds = [f">= {low:g}"] if low > -math.inf else []
    if high < math.inf:
        bounds.append(f"{'<=' if includes_high else '<'} {high:g}")
    raise ValueError(f"{label} must be {' and '.join(bounds) or 'a finite number'}, got {given}")

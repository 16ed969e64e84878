"""Which backend works on which device, and why. A backend is a module with `unavailable()`, `supports()` and a `Bucket` class.

`supports(device)`: whether it is made for such tensors. `unavailable(device)` is None, or the reason why it cannot be used
there; without a device, on this machine. SCALARS_ON_DEVICE: whether it keeps step counts where the parameters are, or in host
memory. `formats()`: the names of the storage formats that it has codecs for.

`Bucket(rule, entries, is_alone)` takes the entries of one device; what it offers is the protocol `fusedopt.entry.Bucket`.
`is_alone`: whether the plan has no other bucket. One that `is_asynchronous` can leave clipping and skipping to the device, so
that nobody waits for it: `measure()`, more arguments of `prepare()`, `has_launched` (see device.py).

A backend that can update single rows where they are has `Rows(touched)` too: made for one step, with what sparse gradients
touch (sparse.py), it offers `grad_norm`, `first_nonfinite` (an index into ``touched``) and `prepare` as a bucket does.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType

import torch

from fusedopt.backends import cpu, cuda, reference, triton
from fusedopt.errors import warn

BACKENDS: dict[str, ModuleType] = {"cuda": cuda, "triton": triton, "cpu": cpu, "reference": reference}


def resolve(name: str | None) -> str:
    """The backend asked for: the argument, else FUSEDOPT_BACKEND, else "auto".

    Raises:
        ValueError: no backend has that name.
        RuntimeError: it cannot be used on this machine; the message says why.
    """
    source = "backend" if name is not None else "FUSEDOPT_BACKEND"
    name = name if name is not None else os.environ.get("FUSEDOPT_BACKEND") or "auto"
    if name not in ["auto", *BACKENDS]:
        raise ValueError(f"{source} must be one of 'auto', {', '.join(map(repr, BACKENDS))}, got {name!r}")
    reason = None if name == "auto" else BACKENDS[name].unavailable()
    if reason is not None:
        raise RuntimeError(f"{source}={name!r} cannot be used: {reason}")
    return name


def choose(device: torch.device, name: str | None) -> ModuleType:
    """The backend module for the tensors of one device."""
    resolved = resolve(name)
    if resolved != "auto":
        module = BACKENDS[resolved]
        if not module.supports(device, is_asked_for=True):
            raise RuntimeError(f"backend={resolved!r} does not work on {device}; use backend='auto' or 'reference'")
        reason = module.unavailable(device)
        if reason is not None:
            raise RuntimeError(f"backend={resolved!r} cannot be used on {device}: {reason}")
        return module
    return BACKENDS[explain(device)[0]]


def explain(device: torch.device) -> tuple[str, dict[str, str]]:
    """What "auto" picks for a device, and for each faster backend why not."""
    passed_over = {}
    for name, module in BACKENDS.items():
        reason = module.unavailable(device) if module.supports(device) else f"does not work on {device.type}"
        if reason is None:
            return name, passed_over
        passed_over[name] = reason
    raise AssertionError("the reference works everywhere")


@functools.cache
def warn_of_fallback(device_type: str) -> None:
    """Once per kind of device: says so if "auto" picks the reference where a faster backend is made for such tensors.

    The warning comes when an optimizer is made. At import it would also reach users who never step on such a device, or who
    chose a backend. At the first step it would not point to the line that made the optimizer.
    """
    device = torch.device(device_type)
    picked, passed_over = explain(device)
    reasons = [f"not {name!r}: {reason}" for name, reason in passed_over.items() if BACKENDS[name].supports(device)]
    if picked == "reference" and reasons:
        warn(f"fusedopt updates parameters on {device_type} by its slow backend 'reference'; {'; '.join(reasons)}")

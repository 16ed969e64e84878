"""The Triton kernels (kernels/, installed as fusedopt.kernels)."""

from __future__ import annotations

import torch


def unavailable() -> str | None:
    """Why not: this version has no Triton kernels."""
    return "this version has no Triton kernels yet"


def supports(device: torch.device) -> bool:
    """Whether it takes tensors of that device."""
    return device.type in ("cuda", "xpu")

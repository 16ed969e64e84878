"""Types of public arguments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

from torch import Tensor

Params: TypeAlias = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
Betas: TypeAlias = Sequence[float | Tensor]
Nonfinite: TypeAlias = Literal["propagate", "skip", "error"]
Backend: TypeAlias = Literal["auto", "cuda", "triton", "cpu", "reference"]
Sparse: TypeAlias = Literal["lazy"]
Loss = TypeVar("Loss")  # what a closure returns

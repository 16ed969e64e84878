"""How a parameter is named in every error, the ending that says nothing happened, and warnings at the user's own line."""

import itertools
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch

UNCHANGED = "nothing was updated"


def short_dtype(tensor: torch.Tensor) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(tensor.dtype).removeprefix("torch.")


def name_param(group_index: int, index: int, name: str | None, param: torch.Tensor) -> str:
    """``param_groups[1]['params'][3] ('layer4.weight'), shape (4, 3), bfloat16 on cuda:1``."""
    quoted = f" ({name!r})" if name else ""
    return (
        f"param_groups[{group_index}]['params'][{index}]{quoted}, shape {tuple(param.shape)}, "
        f"{short_dtype(param)} on {param.device}"
    )


def fail(kind: type[Exception], owner: str, where: object, reason: str) -> NoReturn:
    """Raises an error that says who refuses what, why, and that nothing was updated."""
    raise kind(f"{owner}: {where}: {reason}; {UNCHANGED}")


def named_params(group: Mapping[str, Any]) -> Iterator[tuple[int, str | None, Any]]:
    """(index, name, parameter) of a group. None for one without a name, as one that was appended to the list later."""
    names = itertools.chain(group.get("param_names") or (), itertools.repeat(None))
    for index, (param, name) in enumerate(zip(group["params"], names, strict=False)):
        yield index, name, param


def warn(message: str) -> None:
    """A UserWarning that points to the line which called fusedopt, perhaps through torch."""
    level, frame = 1, sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("fusedopt", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)

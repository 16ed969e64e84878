"""How a parameter is named in every error, and the ending that says nothing happened."""

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

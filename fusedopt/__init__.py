"""fusedopt: the optimizer step of torch.optim, fused over all tensors, with the gradient clip inside.

In a training loop::

    from fusedopt import AdamW

    opt = AdamW(model.parameters(), lr=3e-4, max_grad_norm=1.0)
    loss.backward()
    opt.step()  # global norm, clip and update; opt.grad_norm is the norm
"""

import torch  # noqa: F401  first, so that the extension shares torch's OpenMP runtime

from fusedopt import recipes, schedules
from fusedopt.clip import clip_grad_norm_
from fusedopt.optimizers import (
    LAMB,
    SGD,
    Adagrad,
    Adam,
    AdamW,
    Adan,
    Lion,
    NAdam,
    RAdam,
    RMSprop,
    StableAdamW,
)
from fusedopt.param_groups import param_groups_weight_decay
from fusedopt.sam import SAM

__version__ = "0.1.0"
__all__ = [
    "LAMB",
    "SAM",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adan",
    "Lion",
    "NAdam",
    "RAdam",
    "RMSprop",
    "StableAdamW",
    "clip_grad_norm_",
    "param_groups_weight_decay",
    "recipes",
    "schedules",
]

"""StableAdamW: AdamW with Adafactor's update clipping."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import OptimizerOptions
from fusedopt.rules import RULES
from fusedopt.types import Betas, Params


class StableAdamW(FusedOptimizer):
    r"""AdamW that takes a shorter step of each tensor whose gradient is larger than its past. torch.optim has none.

    In place of clipping by global norm, which can be added.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1)\,g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2)\,g^2, \qquad
        \hat v = v / (1 - \beta_2^t) \\
        \eta &\leftarrow \eta / \max(1, \mathrm{RMS}), \qquad \mathrm{RMS}^2 = \operatorname{mean}\bigl(
        (g / \max(\sqrt{\hat v}, \epsilon))^2 \bigr) \\
        \theta &\leftarrow (1 - \eta\lambda)\,\theta - \eta\,\frac{m / (1 - \beta_1^t)}{\sqrt{\hat v} + \epsilon}

    Args:
        params: tensors, ``(name, tensor)`` pairs, or dicts of groups; float32, float64, bfloat16, float16,
            complex64 or complex128 (as pairs of reals).
        lr: η, >= 0; a float or a 0-d tensor.
        betas: β₁ and β₂, each in [0, 1).
        eps: ε, >= 0.
        weight_decay: λ, >= 0; decoupled, and shortened with the step.
        maximize: ascend instead of descend.
        foreach: accepted and ignored: it chooses among torch's implementations.
        fused: True: under a GradScaler the step unscales gradients and checks them for infinities itself, as torch's
            fused optimizers do. Else the scaler does, in a pass of its own. Nothing else depends on it.
        capturable: whether a step may be captured in a CUDA graph.

    State: ``step`` (0-d float32), ``exp_avg`` m, ``exp_avg_sq`` v (shape of the parameter, float32, or float64
    for float64). One pass more over memory
    takes the mean. The states are AdamW's, and so are checkpoints.

    Raises:
        ValueError: an option out of its range. TypeError: a parameter of a dtype that is not supported.

    Example:
        >>> import torch, fusedopt
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> opt = fusedopt.StableAdamW([weight], lr=0.1)
        >>> weight.grad = torch.tensor([1.0, -100.0])
        >>> opt.step()
        >>> weight.data
        tensor([0.8990, 1.0990])

    Reference: Wortsman et al. 2023, "Stable and low-precision training for large-scale vision-language models",
    arXiv:2304.13013, algorithm 2.
    """

    rule = RULES["stableadamw"]

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[OptimizerOptions],
    ):
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        super().__init__(params, defaults, {}, **options)

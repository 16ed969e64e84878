"""Adan, with proximal or decoupled weight decay."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import OptimizerOptions
from fusedopt.rules import RULES
from fusedopt.types import Betas, Params


class Adan(FusedOptimizer):
    r"""Adam with Nesterov momentum taken from the differences of successive gradients. torch.optim has none.

    Usual lr: 5 to 10 times AdamW's, with warmup. Four states: twice AdamW's memory.

    .. math::
        d_g &= g - g_{t-1}, \qquad m \leftarrow \beta_1 m + (1 - \beta_1)\,g \\
        d &\leftarrow \beta_2 d + (1 - \beta_2)\,d_g, \qquad n \leftarrow \beta_3 n + (1 - \beta_3)\,(g + \beta_2 d_g)^2 \\
        \theta &\leftarrow \frac{1}{1 + \eta\lambda} \left[ \theta - \eta\,\frac{m / (1 - \beta_1^t) + \beta_2\,d / (1 -
        \beta_2^t)}{\sqrt{n / (1 - \beta_3^t)} + \epsilon} \right]

    Args:
        params: tensors, ``(name, tensor)`` pairs, or dicts of groups; float32, float64, bfloat16, float16,
            complex64 or complex128 (as pairs of reals).
        lr: η, >= 0; a float or a 0-d tensor.
        betas: β₁, β₂ and β₃, each in [0, 1); one minus the paper's, as in its published code.
        eps: ε, >= 0.
        weight_decay: λ, >= 0; as above, or θ ← (1 − ηλ)θ first where ``decoupled_weight_decay``.
        decoupled_weight_decay: weight decay as in AdamW (the published code's ``no_prox``).
        maximize: ascend instead of descend.
        foreach: accepted and ignored: it chooses among torch's implementations.
        fused: True: under a GradScaler the step unscales gradients and checks them for infinities itself, as torch's
            fused optimizers do. Else the scaler does, in a pass of its own. Nothing else depends on it.
        capturable: whether a step may be captured in a CUDA graph.

    State: ``step`` (0-d float32), ``exp_avg`` m, ``exp_avg_diff`` d, ``exp_avg_sq`` n, ``previous_grad``, the last gradient as
    it was applied, clipped (shape of the parameter, float32, or float64 for float64).

    Raises:
        ValueError: an option out of its range. TypeError: a parameter of a dtype that is not supported.

    Example:
        >>> import torch, fusedopt
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> opt = fusedopt.Adan([weight], lr=0.1)
        >>> weight.grad = torch.tensor([1.0, -100.0])
        >>> opt.step()
        >>> weight.data
        tensor([0.9000, 1.1000])

    Reference: Xie et al. 2022, "Adan: adaptive Nesterov momentum algorithm", arXiv:2208.06677.
    """

    rule = RULES["adan"]

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
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
            decoupled_weight_decay=decoupled_weight_decay,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        super().__init__(params, defaults, {}, **options)

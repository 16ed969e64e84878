"""LAMB: Adam with a step as long as its tensor."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import OptimizerOptions
from fusedopt.rules import RULES
from fusedopt.types import Betas, Params


class LAMB(FusedOptimizer):
    r"""Adam whose update of each tensor is as long as the tensor, for batches of many thousands. torch.optim has none.

    ``max_grad_norm=1.0`` is part of the usual recipe.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1)\,g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2)\,g^2 \\
        u &= \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} + \lambda\theta, \qquad
        \theta \leftarrow \theta - \eta\,\frac{\lVert\theta\rVert}{\lVert u\rVert}\,u

    Args:
        params: tensors, ``(name, tensor)`` pairs, or dicts of groups; float32, float64, bfloat16, float16,
            complex64 or complex128 (as pairs of reals).
        lr: η, >= 0; a float or a 0-d tensor.
        betas: β₁ and β₂, each in [0, 1).
        eps: ε, >= 0.
        weight_decay: λ, >= 0.
        bias_correction: divide m and v by 1 − βᵗ.
        always_adapt: the ratio of norms also where λ is 0, as published; False: there it is 1, as in other libraries.
        maximize: ascend instead of descend.
        foreach: accepted and ignored: it chooses among torch's implementations.
        fused: True: under a GradScaler the step unscales gradients and checks them for infinities itself, as torch's
            fused optimizers do. Else the scaler does, in a pass of its own. Nothing else depends on it.
        capturable: whether a step may be captured in a CUDA graph.

    State: ``step`` (0-d float32), ``exp_avg`` m, ``exp_avg_sq`` v (shape of the parameter, float32, or float64
    for float64). One pass more over memory
    takes the norms.

    Raises:
        ValueError: an option out of its range. TypeError: a parameter of a dtype that is not supported.

    Example:
        >>> import torch, fusedopt
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> opt = fusedopt.LAMB([weight], lr=0.1)
        >>> weight.grad = torch.tensor([1.0, -100.0])
        >>> opt.step()
        >>> weight.data
        tensor([0.8990, 1.0990])

    Reference: You et al. 2020, "Large batch optimization for deep learning: training BERT in 76 minutes", arXiv:1904.00962. The
    ratio is 1 where one of the norms is 0 or not finite.
    """

    rule = RULES["lamb"]

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        bias_correction: bool = True,
        always_adapt: bool = True,
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
        own_options = {"bias_correction": bias_correction, "always_adapt": always_adapt}
        super().__init__(params, defaults, own_options, **options)

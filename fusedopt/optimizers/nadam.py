"""NAdam, with L2 or decoupled weight decay."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from typing_extensions import Unpack

from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import OptimizerOptions
from fusedopt.rules import RULES
from fusedopt.types import Betas, Params


class NAdam(FusedOptimizer):
    r"""Adam with Nesterov momentum. A drop-in for :class:`torch.optim.NAdam`.

    Usual lr: 2e-3, or what Adam would take.

    .. math::
        \mu_t &= \beta_1\,(1 - \tfrac12\,0.96^{t\psi}), \qquad \Pi_t = \mu_1 \cdots \mu_t \\
        m &\leftarrow \beta_1 m + (1 - \beta_1)\,g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2)\,g^2 \\
        \theta &\leftarrow \theta - \eta \left[ \frac{(1 - \mu_t)\,g}{1 - \Pi_t} + \frac{\mu_{t+1}\,m}{1 - \Pi_t
        \mu_{t+1}} \right] \Big/ \left( \sqrt{v / (1 - \beta_2^t)} + \epsilon \right)

    Args:
        params: tensors, ``(name, tensor)`` pairs, or dicts of groups; float32, float64, bfloat16, float16,
            complex64 or complex128 (as pairs of reals).
        lr: η, >= 0; a float or a 0-d tensor.
        betas: β₁ and β₂, each in [0, 1).
        eps: ε, >= 0.
        weight_decay: λ, >= 0; g ← g + λθ, or θ ← (1 − ηλ)θ where ``decoupled_weight_decay``.
        momentum_decay: ψ, >= 0.
        decoupled_weight_decay: weight decay as in AdamW.
        maximize: ascend instead of descend.
        foreach: accepted and ignored: it chooses among torch's implementations.
        fused: True: under a GradScaler the step unscales gradients and checks them for infinities itself, as torch's
            fused optimizers do. Else the scaler does, in a pass of its own. Nothing else depends on it.
        capturable: whether a step may be captured in a CUDA graph.

    State: ``step`` (0-d float32), ``mu_product`` Π (0-d), ``exp_avg`` m, ``exp_avg_sq`` v (shape of the parameter); Π, m
    and v are float32, or float64 for float64.

    Raises:
        ValueError: an option out of its range. TypeError: a parameter of a dtype that is not supported.

    Example:
        >>> import torch, fusedopt
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> opt = fusedopt.NAdam([weight], lr=0.1)
        >>> weight.grad = torch.tensor([1.0, -100.0])
        >>> opt.step()
        >>> weight.data
        tensor([0.8944, 1.1056])

    Reference: Dozat 2016, "Incorporating Nesterov momentum into Adam".
    """

    rule = RULES["nadam"]
    _whole_options: ClassVar = {**FusedOptimizer._whole_options, "fused": None}  # torch's groups have no such option

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 2e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
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
            momentum_decay=momentum_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        super().__init__(params, defaults, {}, **options)

"""RAdam, with L2 or decoupled weight decay."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from typing_extensions import Unpack

from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import OptimizerOptions
from fusedopt.rules import RULES
from fusedopt.types import Betas, Params


class RAdam(FusedOptimizer):
    r"""Adam that begins as SGD with momentum, in place of a warmup. A drop-in for :class:`torch.optim.RAdam`.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1)\,g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2)\,g^2 \\
        \rho_t &= \rho_\infty - \frac{2t\beta_2^t}{1 - \beta_2^t}, \qquad \rho_\infty = \frac{2}{1 - \beta_2} - 1 \\
        \theta &\leftarrow \theta - \eta\,\frac{m}{1 - \beta_1^t} \cdot \begin{cases} \sqrt{\frac{(\rho_t - 4)(\rho_t - 2)
        \rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2)\rho_t}}\,\frac{\sqrt{1 - \beta_2^t}}{\sqrt{v} + \epsilon} &
        \rho_t > 5 \\ 1 & \text{else} \end{cases}

    Args:
        params: tensors, ``(name, tensor)`` pairs, or dicts of groups; float32, float64, bfloat16, float16,
            complex64 or complex128 (as pairs of reals).
        lr: η, >= 0; a float or a 0-d tensor.
        betas: β₁ and β₂, each in [0, 1).
        eps: ε, >= 0.
        weight_decay: λ, >= 0; g ← g + λθ, or θ ← (1 − ηλ)θ where ``decoupled_weight_decay``.
        decoupled_weight_decay: weight decay as in AdamW.
        maximize: ascend instead of descend.
        foreach: accepted and ignored: it chooses among torch's implementations.
        fused: True: under a GradScaler the step unscales gradients and checks them for infinities itself, as torch's
            fused optimizers do. Else the scaler does, in a pass of its own. Nothing else depends on it.
        capturable: whether a step may be captured in a CUDA graph.

    State: ``step`` (0-d float32), ``exp_avg`` m, ``exp_avg_sq`` v (shape of the parameter, float32, or float64
    for float64).

    Raises:
        ValueError: an option out of its range. TypeError: a parameter of a dtype that is not supported.

    Example:
        >>> import torch, fusedopt
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> opt = fusedopt.RAdam([weight], lr=0.1)
        >>> weight.grad = torch.tensor([1.0, -100.0])
        >>> opt.step()
        >>> weight.data
        tensor([ 0.9000, 11.0000])

    Reference: Liu et al. 2020, "On the variance of the adaptive learning rate and beyond", arXiv:1908.03265.
    """

    rule = RULES["radam"]
    _whole_options: ClassVar = {**FusedOptimizer._whole_options, "fused": None}  # torch's groups have no such option

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
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

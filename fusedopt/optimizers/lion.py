"""Lion."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import OptimizerOptions
from fusedopt.rules import RULES
from fusedopt.types import Betas, Params


class Lion(FusedOptimizer):
    r"""Lion: moves every element by lr in the direction of a sign; one state instead of Adam's two.

    From AdamW: lr 3 to 10 times smaller, weight decay 3 to 10 times larger. torch.optim has no Lion.

    .. math::
        \theta &\leftarrow (1 - \eta\lambda)\,\theta - \eta\,\mathrm{sign}(\beta_1 m + (1 - \beta_1)\,g) \\
        m &\leftarrow \beta_2 m + (1 - \beta_2)\,g

    Args:
        params: tensors, ``(name, tensor)`` pairs, or dicts of groups; float32, float64, bfloat16, float16,
            complex64 or complex128 (as pairs of reals).
        lr: η, >= 0; a float or a 0-d tensor.
        betas: β₁ (what the sign is taken of) and β₂ (what is kept), each in [0, 1).
        weight_decay: λ, >= 0, decoupled.
        maximize: ascend instead of descend.
        foreach: accepted and ignored: it chooses among torch's implementations.
        fused: True: under a GradScaler the step unscales gradients and checks them for infinities itself, as torch's
            fused optimizers do. Else the scaler does, in a pass of its own. Nothing else depends on it.
        capturable: whether a step may be captured in a CUDA graph.

    State: ``exp_avg`` m (shape of the parameter, float32, or float64 for float64).

    Raises:
        ValueError: an option out of its range. TypeError: a parameter of a dtype that is not supported.

    Example:
        >>> import torch, fusedopt
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> opt = fusedopt.Lion([weight], lr=0.1)
        >>> weight.grad = torch.tensor([1.0, -100.0])
        >>> opt.step()
        >>> weight.data
        tensor([0.9000, 1.1000])

    Reference: Chen et al. 2023, "Symbolic discovery of optimization algorithms", arXiv:2302.06675. The sign of NaN is NaN,
    so that a NaN gradient shows.
    """

    rule = RULES["lion"]

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: Betas = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[OptimizerOptions],
    ):
        defaults = dict(
            lr=lr,
            betas=betas,
            weight_decay=weight_decay,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        super().__init__(params, defaults, {}, **options)

"""SGD with momentum, dampening and Nesterov momentum."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import SparseOptions
from fusedopt.rules import RULES
from fusedopt.types import Params


class SGD(FusedOptimizer):
    r"""Stochastic gradient descent, optionally with momentum. A drop-in for :class:`torch.optim.SGD`.

    With momentum 0 it keeps no state at all. With momentum and weight decay 0, it takes sparse gradients without
    ``sparse="lazy"``: the lazy update is then exact. Recommended for convolutional networks: lr 0.1, momentum 0.9, weight decay
    1e-4, cosine schedule.

    .. math::
        g &\leftarrow g + \lambda\theta \\
        b &\leftarrow \mu b + (1 - d)\,g \qquad (b \leftarrow g \text{ at the first step}) \\
        \theta &\leftarrow \theta - \eta\,b \qquad \text{or, with Nesterov, } \theta - \eta\,(g + \mu b)

    Args:
        params: tensors, ``(name, tensor)`` pairs, or dicts of groups; float32, float64, bfloat16, float16,
            complex64 or complex128 (as pairs of reals).
        lr: η, >= 0; a float or a 0-d tensor.
        momentum: μ, >= 0.
        dampening: d.
        weight_decay: λ, >= 0, as L2.
        nesterov: Nesterov momentum; needs momentum > 0 and dampening 0.
        maximize: ascend instead of descend.
        foreach: accepted and ignored: it chooses among torch's implementations.
        fused: True: under a GradScaler the step unscales gradients and checks them for infinities itself, as torch's
            fused optimizers do. Else the scaler does, in a pass of its own. Nothing else depends on it.

    State: ``momentum_buffer`` (shape of the parameter, float32, or float64 for float64), with momentum only.

    Raises:
        ValueError: an option out of its range. TypeError: a parameter of a dtype that is not supported.

    Example:
        >>> import torch, fusedopt
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> opt = fusedopt.SGD([weight], lr=0.1, momentum=0.9)
        >>> weight.grad = torch.tensor([1.0, 2.0])
        >>> opt.step()
        >>> weight.data
        tensor([0.9000, 0.8000])

    Reference: Sutskever, Martens, Dahl, Hinton 2013, "On the importance of initialization and momentum in deep
    learning"; η multiplies the velocity, as in torch, instead of entering it.
    """

    rule = RULES["sgd"]

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[SparseOptions],
    ):
        defaults = dict(
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        super().__init__(params, defaults, {}, **options)

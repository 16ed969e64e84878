"""RMSProp, centered or not, with or without momentum."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from typing_extensions import Unpack

from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import OptimizerOptions
from fusedopt.rules import RULES
from fusedopt.types import Params


class RMSprop(FusedOptimizer):
    r"""RMSProp: divides the gradient by a running root mean square of itself. A drop-in for :class:`torch.optim.RMSprop`.

    Usual for recurrent networks and reinforcement learning: lr 1e-4 to 1e-3, alpha 0.99 (0.9 in the lecture).

    .. math::
        v &\leftarrow \alpha v + (1 - \alpha)\,g^2 \\
        u &= g \,/\, (\sqrt{v} + \epsilon) \\
        \theta &\leftarrow \theta - \eta\,u

    ``centered`` takes :math:`v - \bar g^2` for v in u, with the running mean :math:`\bar g \leftarrow \alpha\bar g +
    (1 - \alpha) g`; it is bounded below by 0, where torch gives NaN when rounding takes it there. With ``momentum`` μ,
    :math:`b \leftarrow \mu b + u` moves θ in place of u.

    Args:
        params: tensors, ``(name, tensor)`` pairs, or dicts of groups; float32, float64, bfloat16, float16,
            complex64 or complex128 (as pairs of reals).
        lr: η, >= 0; a float or a 0-d tensor.
        alpha: α, in [0, 1].
        eps: ε, >= 0.
        weight_decay: λ, >= 0, as L2 (g ← g + λθ).
        momentum: μ, >= 0.
        centered: divide by the standard deviation instead of the root mean square.
        eps_inside_sqrt: √(v + ε) instead of √v + ε, as TensorFlow does.
        maximize: ascend instead of descend.
        foreach: accepted and ignored: it chooses among torch's implementations.
        fused: True: under a GradScaler the step unscales gradients and checks them for infinities itself, as torch's
            fused optimizers do. Else the scaler does, in a pass of its own. Nothing else depends on it.
        capturable: whether a step may be captured in a CUDA graph.

    State: ``step`` (0-d float32), ``square_avg``, with centered ``grad_avg``, with momentum ``momentum_buffer`` (shape of
    the parameter, float32, or float64 for float64).

    Raises:
        ValueError: an option out of its range. TypeError: a parameter of a dtype that is not supported.

    Example:
        >>> import torch, fusedopt
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> opt = fusedopt.RMSprop([weight], lr=0.01)
        >>> weight.grad = torch.tensor([1.0, 100.0])
        >>> opt.step()
        >>> weight.data
        tensor([0.9000, 0.9000])

    Reference: Tieleman & Hinton 2012, lecture 6.5 of "Neural networks for machine learning"; centered: Graves 2013,
    arXiv:1308.0850.
    """

    rule = RULES["rmsprop"]
    _whole_options: ClassVar = {**FusedOptimizer._whole_options, "fused": None}  # torch's groups have no such option

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        fused: bool | None = None,
        eps_inside_sqrt: bool = False,
        **options: Unpack[OptimizerOptions],
    ):
        defaults = dict(
            lr=lr,
            momentum=momentum,
            alpha=alpha,
            eps=eps,
            centered=centered,
            weight_decay=weight_decay,
            capturable=capturable,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
        )
        super().__init__(params, defaults, {"eps_inside_sqrt": eps_inside_sqrt}, **options)

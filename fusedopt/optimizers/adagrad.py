"""AdaGrad."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import SparseOptions
from fusedopt.rules import RULES
from fusedopt.types import Params


class Adagrad(FusedOptimizer):
    r"""AdaGrad: every element's step shrinks with the squares of its gradients so far. For :class:`torch.optim.Adagrad`.

    Suits sparse features, where rare elements keep large steps. With weight decay 0, it takes sparse gradients without
    ``sparse="lazy"``: the lazy update is then exact. Usual lr: 0.01 to 0.1.

    .. math::
        s &\leftarrow s + g^2 \\
        \theta &\leftarrow \theta - \frac{\eta}{1 + (t - 1)\,\eta_d}\,\frac{g}{\sqrt{s} + \epsilon}

    Args:
        params: tensors, ``(name, tensor)`` pairs, or dicts of groups; float32, float64, bfloat16, float16,
            complex64 or complex128 (as pairs of reals).
        lr: η, >= 0; a float or a 0-d tensor.
        lr_decay: η_d, >= 0.
        weight_decay: λ, >= 0, as L2 (g ← g + λθ).
        initial_accumulator_value: first value of s, >= 0.
        eps: ε, >= 0.
        eps_inside_sqrt: √(s + ε) instead of √s + ε.
        rowwise: one s for all elements of a row, an index of the first dimension: s ← s + mean(g²) over the row. For large
            tables of embeddings, whose state it makes as small as one column. A vector's rows are its elements. No backend
            but ``"reference"`` has it, which is used whatever was asked for; complex parameters are refused.
        maximize: ascend instead of descend.
        foreach: accepted and ignored: it chooses among torch's implementations.
        fused: True: under a GradScaler the step unscales gradients and checks them for infinities itself, as torch's
            fused optimizers do. Else the scaler does, in a pass of its own. Nothing else depends on it.

    State: ``step`` (0-d float32), ``sum`` s (shape of the parameter, with ``rowwise`` (rows, 1, …, 1); float32, or float64
    for float64). Made at the first step, not, as in torch, at construction.

    Raises:
        ValueError: an option out of its range. TypeError: a parameter of a dtype that is not supported.

    Example:
        >>> import torch, fusedopt
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> opt = fusedopt.Adagrad([weight], lr=0.1)
        >>> weight.grad = torch.tensor([1.0, 100.0])
        >>> opt.step()
        >>> weight.data
        tensor([0.9000, 0.9000])

    Reference: Duchi, Hazan, Singer 2011, "Adaptive subgradient methods for online learning and stochastic optimization",
    JMLR 12. Row-wise: Mudigere et al. 2022, arXiv:2104.05158, FBGEMM's "exact row-wise AdaGrad".
    """

    rule = RULES["adagrad"]

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        eps_inside_sqrt: bool = False,
        rowwise: bool = False,
        **options: Unpack[SparseOptions],
    ):
        defaults = dict(
            lr=lr,
            lr_decay=lr_decay,
            eps=eps,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
        )
        own_options = {"eps_inside_sqrt": eps_inside_sqrt, "rowwise": rowwise}
        super().__init__(params, defaults, own_options, **options)

    def share_memory(self) -> None:
        """Puts ``sum`` of every parameter in memory that processes share, as torch; what has no state yet gets it now."""
        for group in self.param_groups:
            for param in group["params"]:
                self._make_first_state(group, param)
                self.state[param]["sum"].share_memory_()

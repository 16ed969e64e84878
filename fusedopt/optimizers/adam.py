"""Adam, AdamW and AMSGrad."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import SparseOptions
from fusedopt.rules import RULES
from fusedopt.types import Betas, Params


class Adam(FusedOptimizer):
    r"""Adam, and with ``amsgrad`` AMSGrad. A drop-in for :class:`torch.optim.Adam`.

    Weight decay is L2 here: it passes through the moments. For decay that does not, use `AdamW`. Every element moves in every
    step, so sparse gradients need ``sparse="lazy"``. This is torch.optim.SparseAdam, except that eps is added after the bias
    correction of v, not before it.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1)\,g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2)\,g^2 \\
        \theta &\leftarrow \theta - \eta\,\frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    Args:
        params: tensors, ``(name, tensor)`` pairs, or dicts of groups; float32, float64, bfloat16, float16,
            complex64 or complex128 (as pairs of reals).
        lr: η, >= 0; a float or a 0-d tensor.
        betas: β₁ and β₂, each in [0, 1).
        eps: ε, >= 0.
        weight_decay: λ, >= 0; g ← g + λθ, or θ ← (1 − ηλ)θ where ``decoupled_weight_decay``.
        amsgrad: the largest v so far in place of v.
        decoupled_weight_decay: AdamW's weight decay.
        bias_correction: divide m and v by 1 − βᵗ. False with ``amsgrad`` is AMSGrad as first published.
        maximize: ascend instead of descend.
        foreach: accepted and ignored: it chooses among torch's implementations.
        fused: True: under a GradScaler the step unscales gradients and checks them for infinities itself, as torch's
            fused optimizers do. Else the scaler does, in a pass of its own. Nothing else depends on it.
        capturable: whether a step may be captured in a CUDA graph.

    State: ``step`` (0-d float32), ``exp_avg`` m, ``exp_avg_sq`` v, with amsgrad ``max_exp_avg_sq`` (shape of the
    parameter, float32, or float64 for float64).

    Raises:
        ValueError: an option out of its range. TypeError: a parameter of a dtype that is not supported.

    Example:
        >>> import torch, fusedopt
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> opt = fusedopt.Adam([weight], lr=0.1)
        >>> weight.grad = torch.tensor([1.0, -100.0])
        >>> opt.step()
        >>> weight.data
        tensor([0.9000, 1.1000])

    Reference: Kingma & Ba 2015, arXiv:1412.6980; AMSGrad: Reddi, Kale, Kumar 2018, arXiv:1904.09237. As in torch, amsgrad
    takes the maximum of v before its bias correction.
    """

    rule = RULES["adam"]

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        bias_correction: bool = True,
        **options: Unpack[SparseOptions],
    ):
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        super().__init__(params, defaults, {"bias_correction": bias_correction}, **options)


class AdamW(Adam):
    r"""Adam with decoupled weight decay. A drop-in for :class:`torch.optim.AdamW`.

    Usual for transformers: lr 1e-4 to 1e-3 with warmup and cosine, betas (0.9, 0.95), weight decay 0.1 on matrices only,
    ``max_grad_norm=1.0``.

    .. math::
        \theta &\leftarrow (1 - \eta\lambda)\,\theta \\
        m &\leftarrow \beta_1 m + (1 - \beta_1)\,g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2)\,g^2 \\
        \theta &\leftarrow \theta - \eta\,\frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    Args: as `Adam`, with ``weight_decay`` 0.01 and always decoupled; and options of the whole optimizer:

    State, Raises: as `Adam`.

    Example:
        >>> import torch, fusedopt
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> opt = fusedopt.AdamW([weight], lr=0.1, weight_decay=0.5, max_grad_norm=1.0)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> opt.step()
        >>> weight.data, opt.grad_norm
        (tensor([0.8500, 0.8500]), tensor(5.))

    Reference: Loshchilov & Hutter 2019, arXiv:1711.05101; as in torch, the decay is multiplied by the scheduled lr.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = True,
        bias_correction: bool = True,
        **options: Unpack[SparseOptions],
    ):
        if decoupled_weight_decay is not True:  # an argument at all so that AdamW(params, **opt.defaults) works
            raise ValueError("AdamW always decouples weight decay; use Adam for decoupled_weight_decay=False")
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
            bias_correction=bias_correction,
            **options,
        )

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        # As torch: an AdamW stays one, whatever the checkpoint came from.
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True

r"""The specification: every rule as a short pure-PyTorch function, in the textbook's order, in the dtype it is given.

Each function takes one parameter, its gradient, its ``state`` (a dict of tensors under torch.optim's names, updated by
replacing its entries) and ``step`` (1 at the first update), and returns the new parameter. Nothing is done in place.
Called with float64 tensors they are what every kernel is proved against; they are also ``backend="reference"``.

Common symbols: θ parameter, g gradient, η ``lr``, λ ``weight_decay``, ε ``eps``.
"""

import torch


def total_norm(grads):
    r"""Global 2-norm ‖g‖ = sqrt(Σ g²) over all elements of all ``grads``, in float64.

    Divided by the largest element first, so that the squares of no finite gradient overflow or vanish.
    """
    grads = [grad for grad in grads if grad.numel() > 0]
    if not grads:
        return torch.zeros((), dtype=torch.float64)
    largest = torch.stack([grad.abs().max().double() for grad in grads]).max()
    if not 0 < largest < float("inf"):
        return largest  # 0, inf or NaN
    return largest * torch.stack([torch.linalg.vector_norm(grad.double() / largest) for grad in grads]).norm()


def clip_coefficient(norm, max_norm):
    r"""What clipping by global norm multiplies every gradient with: min(1, τ / (‖g‖ + 1e-6)).

    Pascanu, Mikolov, Bengio 2013, arXiv:1211.5063; the 1e-6 as in :func:`torch.nn.utils.clip_grad_norm_`.
    """
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def sgd(param, grad, state, step, *, lr, momentum, dampening, weight_decay, nesterov, maximize=False):
    r"""g ← g + λθ;  b ← μb + (1 − d)g  (b ← g at the first step);  θ ← θ − η (g + μb if Nesterov else b).

    Sutskever, Martens, Dahl, Hinton 2013, "On the importance of initialization and momentum in deep learning".
    μ ``momentum``, d ``dampening``, b ``momentum_buffer``. As in torch, η multiplies the velocity.
    """
    grad = _with_l2(param, -grad if maximize else grad, weight_decay)
    if momentum != 0:
        buffer = grad if step == 1 else momentum * state["momentum_buffer"] + (1 - dampening) * grad
        state["momentum_buffer"] = buffer
        grad = grad + momentum * buffer if nesterov else buffer
    return param - lr * grad


def adagrad(
    param, grad, state, step, *, lr, lr_decay, weight_decay, eps, eps_inside_sqrt=False, rowwise=False, maximize=False
):
    r"""s ← s + g²;  θ ← θ − η/(1 + (t−1) η_decay) · g / (√s + ε), or g / √(s + ε) with ``eps_inside_sqrt``.

    Duchi, Hazan, Singer 2011, JMLR 12. s ``sum`` starts at ``initial_accumulator_value``.
    ``rowwise``: one s for all elements of a row (an index of the first dimension), s ← s + mean(g²) over the row, as
    FBGEMM's and TorchRec's "exact row-wise AdaGrad" (Mudigere et al. 2022, arXiv:2104.05158).
    """
    grad = _with_l2(param, -grad if maximize else grad, weight_decay)
    square = grad * grad
    if rowwise and grad.dim() > 1:
        square = square.sum(dim=tuple(range(1, grad.dim())), keepdim=True) / max(1, grad[:1].numel())
    state["sum"] = state["sum"] + square
    return param - lr / (1 + (step - 1) * lr_decay) * grad / _denominator(state["sum"], eps, eps_inside_sqrt)


def rmsprop(
    param, grad, state, step, *, lr, alpha, eps, weight_decay, momentum, centered, eps_inside_sqrt=False, maximize=False
):
    r"""v ← αv + (1 − α)g²;  u = g / (√v + ε), or g / √(v + ε) with ``eps_inside_sqrt``;  θ ← θ − ηu.

    Tieleman & Hinton 2012, lecture 6.5. ``centered`` (Graves 2013, arXiv:1308.0850): ḡ ← αḡ + (1 − α)g and v − ḡ² for v
    in u, bounded below by 0, which only rounding can cross. ``momentum`` μ: b ← μb + u;  θ ← θ − ηb.
    v ``square_avg``, ḡ ``grad_avg``, b ``momentum_buffer``.
    """
    grad = _with_l2(param, -grad if maximize else grad, weight_decay)
    state["square_avg"] = alpha * state["square_avg"] + (1 - alpha) * grad * grad
    variance = state["square_avg"]
    if centered:
        state["grad_avg"] = alpha * state["grad_avg"] + (1 - alpha) * grad
        variance = (state["square_avg"] - state["grad_avg"] ** 2).clamp(min=0)
    update = grad / _denominator(variance, eps, eps_inside_sqrt)
    if momentum != 0:
        state["momentum_buffer"] = momentum * state["momentum_buffer"] + update
        update = state["momentum_buffer"]
    return param - lr * update


def adam(
    param, grad, state, step, *,
    lr, betas, eps, weight_decay, amsgrad, decoupled_weight_decay, bias_correction=True, maximize=False,
):  # fmt: skip
    r"""m ← β₁m + (1 − β₁)g;  v ← β₂v + (1 − β₂)g²;  θ ← θ − η m̂ / (√v̂ + ε),  m̂ = m/(1 − β₁ᵗ),  v̂ = v/(1 − β₂ᵗ).

    Adam: Kingma & Ba 2015, arXiv:1412.6980, with weight decay as L2 (g ← g + λθ).
    AdamW (``decoupled_weight_decay``): Loshchilov & Hutter 2019, arXiv:1711.05101, θ ← (1 − ηλ)θ first, g as it is.
    AMSGrad (``amsgrad``): Reddi, Kale, Kumar 2018, arXiv:1904.09237, v_max ← max(v_max, v) in place of v. With
    ``bias_correction=False`` (m̂ = m, v̂ = v) this is AMSGrad as first published.
    m ``exp_avg``, v ``exp_avg_sq``, v_max ``max_exp_avg_sq``.
    """
    grad = -grad if maximize else grad
    beta1, beta2 = betas
    if decoupled_weight_decay:
        param = param * (1 - lr * weight_decay)
    else:
        grad = _with_l2(param, grad, weight_decay)
    state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * grad
    state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * grad * grad
    second_moment = state["exp_avg_sq"]
    if amsgrad:
        state["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], state["exp_avg_sq"])
        second_moment = state["max_exp_avg_sq"]
    bias_correction1 = 1 - beta1**step if bias_correction else 1.0
    bias_correction2 = 1 - beta2**step if bias_correction else 1.0
    denom = (second_moment / bias_correction2).sqrt() + eps
    return param - lr * (state["exp_avg"] / bias_correction1) / denom


def nadam(
    param, grad, state, step, *, lr, betas, eps, weight_decay, momentum_decay, decoupled_weight_decay, maximize=False
):
    r"""θ ← θ − η [ (1 − μₜ) g / (1 − Πₜ) + μₜ₊₁ m / (1 − Πₜ μₜ₊₁) ] / (√v̂ + ε),  μₜ = β₁(1 − ½·0.96^{tψ}),  Πₜ = μ₁…μₜ.

    Dozat 2016, "Incorporating Nesterov momentum into Adam"; m, v, v̂ and both kinds of weight decay as in :func:`adam`.
    ψ ``momentum_decay``, Π ``mu_product`` (starts at 1).
    """
    grad = -grad if maximize else grad
    beta1, beta2 = betas
    if decoupled_weight_decay:
        param = param * (1 - lr * weight_decay)
    else:
        grad = _with_l2(param, grad, weight_decay)
    mu = beta1 * (1 - 0.5 * 0.96 ** (step * momentum_decay))
    mu_next = beta1 * (1 - 0.5 * 0.96 ** ((step + 1) * momentum_decay))
    state["mu_product"] = state["mu_product"] * mu
    state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * grad
    state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * grad * grad
    denom = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt() + eps
    param = param - lr * (1 - mu) / (1 - state["mu_product"]) * grad / denom
    return param - lr * mu_next / (1 - state["mu_product"] * mu_next) * state["exp_avg"] / denom


def lion(param, grad, state, step, *, lr, betas, weight_decay, maximize=False):
    r"""θ ← (1 − ηλ)θ − η sign(β₁m + (1 − β₁)g);  m ← β₂m + (1 − β₂)g.

    Chen et al. 2023, arXiv:2302.06675. sign(NaN) is NaN here (torch.sign gives 0), so that a NaN gradient shows.
    m ``exp_avg``.
    """
    grad = -grad if maximize else grad
    beta1, beta2 = betas
    update = beta1 * state["exp_avg"] + (1 - beta1) * grad
    state["exp_avg"] = beta2 * state["exp_avg"] + (1 - beta2) * grad
    return param * (1 - lr * weight_decay) - lr * torch.where(update.isnan(), update, update.sign())


def radam(param, grad, state, step, *, lr, betas, eps, weight_decay, decoupled_weight_decay, maximize=False):
    r"""θ ← θ − η m̂ rₜ √(1 − β₂ᵗ) / (√v + ε) where ρₜ > 5, else θ ← θ − η m̂.

    Liu et al. 2020, "On the variance of the adaptive learning rate and beyond", arXiv:1908.03265. While the variance of
    1/√v cannot be told from so few steps, v is not divided by. ρ∞ = 2/(1 − β₂) − 1;  ρₜ = ρ∞ − 2tβ₂ᵗ/(1 − β₂ᵗ);
    rₜ = √( (ρₜ − 4)(ρₜ − 2)ρ∞ / ((ρ∞ − 4)(ρ∞ − 2)ρₜ) );  m, v, m̂ and both kinds of weight decay as in :func:`adam`.
    """
    grad = -grad if maximize else grad
    beta1, beta2 = betas
    if decoupled_weight_decay:
        param = param * (1 - lr * weight_decay)
    else:
        grad = _with_l2(param, grad, weight_decay)
    state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * grad
    state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * grad * grad
    update = state["exp_avg"] / (1 - beta1**step)
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * step * beta2**step / (1 - beta2**step)
    if rho > 5:
        rect = ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) ** 0.5
        update = update * rect * (1 - beta2**step) ** 0.5 / (state["exp_avg_sq"].sqrt() + eps)
    return param - lr * update


def adan(param, grad, state, step, *, lr, betas, eps, weight_decay, decoupled_weight_decay=False, maximize=False):
    r"""θ ← (θ − η (m̂ + β₂ d̂) / (√n̂ + ε)) / (1 + ηλ), or (1 − ηλ)θ − … with ``decoupled_weight_decay``.

    Xie et al. 2022, "Adan: adaptive Nesterov momentum algorithm", arXiv:2208.06677, with the betas of its published code
    (one minus the paper's) and its bias corrections. m ← β₁m + (1 − β₁)g;  d ← β₂d + (1 − β₂)(g − g₋);
    n ← β₃n + (1 − β₃)(g + β₂(g − g₋))²;  m̂ = m/(1 − β₁ᵗ),  d̂ = d/(1 − β₂ᵗ),  n̂ = n/(1 − β₃ᵗ).
    m ``exp_avg``, d ``exp_avg_diff``, n ``exp_avg_sq``, g₋ ``previous_grad``, clipped as it was; g at the first step.
    """
    grad = -grad if maximize else grad
    beta1, beta2, beta3 = betas
    diff = grad - (state["previous_grad"] if step > 1 else grad)
    nesterov = grad + beta2 * diff
    state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * grad
    state["exp_avg_diff"] = beta2 * state["exp_avg_diff"] + (1 - beta2) * diff
    state["exp_avg_sq"] = beta3 * state["exp_avg_sq"] + (1 - beta3) * nesterov * nesterov
    state["previous_grad"] = grad
    update = state["exp_avg"] / (1 - beta1**step) + beta2 * state["exp_avg_diff"] / (1 - beta2**step)
    update = update / ((state["exp_avg_sq"] / (1 - beta3**step)).sqrt() + eps)
    if decoupled_weight_decay:
        return param * (1 - lr * weight_decay) - lr * update
    return (param - lr * update) / (1 + lr * weight_decay)


def lamb(
    param, grad, state, step, *, lr, betas, eps, weight_decay, bias_correction=True, always_adapt=True, maximize=False
):
    r"""u = m̂ / (√v̂ + ε) + λθ;  θ ← θ − η (‖θ‖ / ‖u‖) u, with the 2-norms of the whole tensor.

    You et al. 2020, "Large batch optimization for deep learning: training BERT in 76 minutes", arXiv:1904.00962; m, v, m̂
    and v̂ as in :func:`adam`. The ratio is 1 where the square of one of the norms is 0 or infinite, and without ``always_adapt``
    where λ is 0.
    """
    grad = -grad if maximize else grad
    beta1, beta2 = betas
    state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * grad
    state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * grad * grad
    bias_correction1 = 1 - beta1**step if bias_correction else 1.0
    bias_correction2 = 1 - beta2**step if bias_correction else 1.0
    denom = (state["exp_avg_sq"] / bias_correction2).sqrt() + eps
    update = _with_l2(param, state["exp_avg"] / bias_correction1 / denom, weight_decay)
    if always_adapt or weight_decay != 0:
        squared_param, squared_update = param.double().square().sum(), update.double().square().sum()
        is_adapted = _is_length(squared_param) & _is_length(squared_update)
        lr = lr * torch.where(is_adapted, squared_param.sqrt() / squared_update.sqrt(), 1.0).item()
    return param - lr * update


def stableadamw(param, grad, state, step, *, lr, betas, eps, weight_decay, maximize=False):
    r"""η ← η / max(1, RMS);  θ ← (1 − ηλ)θ − η m̂ / (√v̂ + ε),  RMS² = mean of (g / max(√v̂, ε))² over the tensor.

    Wortsman et al. 2023, "Stable and low-precision training for large-scale vision-language models", arXiv:2304.13013,
    algorithm 2: AdamW with the update clipping of Adafactor. m, v, m̂ and v̂ as in :func:`adam`, from which its moments with
    debiased betas differ in form only.
    """
    grad = -grad if maximize else grad
    beta1, beta2 = betas
    state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * grad
    state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * grad * grad
    root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt()
    rms = (grad / root.clamp(min=eps)).double().square().mean().sqrt()
    lr = lr / torch.where(rms > 1, rms, 1.0).item()  # as it is where the mean is NaN
    update = state["exp_avg"] / (1 - beta1**step) / (root + eps)
    return param * (1 - lr * weight_decay) - lr * update


def sam(param, grad, state, step, *, rho, adaptive, maximize=False):
    r"""The ascent before the second gradient: θ₋ ← θ;  θ ← θ + ρ g, or θ + ρ θ² g with ``adaptive``.

    Foret et al. 2021, "Sharpness-aware minimization", arXiv:2010.01412; ASAM: Kwon et al. 2021, arXiv:2102.11600, with θ
    itself as the scale. g comes divided by its global norm, that of θg with ``adaptive``. θ₋ ``old_param``.
    """
    grad = -grad if maximize else grad
    state["old_param"] = param
    ascent = rho * grad * (param * param if adaptive else 1.0)
    return param + torch.where(grad == 0, 0.0, ascent)  # a mask, -inf, stays where its gradient is 0


def _with_l2(param, grad, weight_decay):
    """L2 regularisation: g + λθ. Without it θ is not looked at, so that an infinite θ does not make g NaN."""
    return grad + weight_decay * param if weight_decay != 0 else grad


def _is_length(squared):
    """Whether a length has that square; that of a masked tensor, which holds -inf, is none."""
    return (squared > 0) & (squared < torch.inf)


def _denominator(second_moment, eps, eps_inside_sqrt):
    """√v + ε, torch's; or √(v + ε), TensorFlow's and some textbooks'."""
    return (second_moment + eps).sqrt() if eps_inside_sqrt else second_moment.sqrt() + eps

"""Every update rule in Triton: the formulas of csrc/rules/*.h, in the same order and with the same names.

A rule is two functions, found by its name in fusedopt/rules.py. ``prepare_<rule>`` folds a group's hyperparameters (0-d
float64, in the order of that table), the coefficient of the gradient and the step count into scalars, once for a chunk of a
tensor; ``<rule>`` takes these, blocks of the parameter and the gradient, and a tuple of the rule's states (STORES: which of
them are kept), and returns the new parameter and states. A rule that sums over tensors has two more: ``measure_<rule>`` gives
blocks of float64 that are added up over each tensor, and ``adapt_<rule>`` folds the sums, and the number of elements, into the
scalars. All know values only: loading, storing and chunks are in engine.py.
"""

import triton
import triton.language as tl

# ---- what rules are written with (csrc/rules/math.h) -----------------------------------------------------------


@triton.jit
def weighted(weight, x):
    """weight * x, except that a zero weight contributes nothing, whatever x is."""
    return tl.where(weight == 0, 0, weight * x)


@triton.jit
def maximum(a, b):
    """The larger; NaN if either is."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def sign(x):
    """-1, 0 or 1; NaN for NaN."""
    return tl.where(x > 0, 1, tl.where(x < 0, -1, x)).to(x.dtype)


@triton.jit
def square_root(x):
    """Correctly rounded; the plain one is approximate in float32."""
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit
def quotient(a, b):
    """Correctly rounded; the plain one is approximate in float32."""
    return tl.div_rn(a, b) if a.dtype == tl.float32 else a / b


@triton.jit
def power(base, exponent):
    """base ** exponent for 0 <= base < 1 and exponent > 0, in float64."""
    return tl.where(base > 0, tl.exp2(exponent * tl.log2(tl.where(base > 0, base, 1.0))), 0.0)


# ---- SGD (sgd.h) -----------------------------------------------------------------------------------------------


@triton.jit
def prepare_sgd(hyper, grad_coef, step, extra, dtype: tl.constexpr):
    lr, momentum, dampening, weight_decay, nesterov = hyper
    is_first = step <= 1  # starts the buffer at the gradient itself: no dampening, nothing to decay
    buffer_weight = tl.where(is_first, 0.0, momentum)
    one_minus_dampening = tl.where(is_first, 1.0, 1 - dampening)
    buffer_share = tl.where(nesterov != 0, momentum, 1.0)
    return (
        grad_coef.to(dtype),
        weight_decay.to(dtype),
        buffer_weight.to(dtype),
        one_minus_dampening.to(dtype),
        nesterov.to(dtype),
        buffer_share.to(dtype),
        lr.to(dtype),
    ), extra


@triton.jit
def sgd(scalars, param, grad, states, STORES: tl.constexpr):
    grad_coef, l2, momentum, one_minus_dampening, grad_share, buffer_share, lr = scalars
    momentum_buffer = states[0]
    grad = grad_coef * grad + weighted(l2, param)
    if STORES[0]:
        momentum_buffer = weighted(momentum, momentum_buffer) + one_minus_dampening * grad
        grad = weighted(grad_share, grad) + buffer_share * momentum_buffer
    return param - lr * grad, (momentum_buffer,)


# ---- AdaGrad (adagrad.h) ---------------------------------------------------------------------------------------


@triton.jit
def prepare_adagrad(hyper, grad_coef, step, extra, dtype: tl.constexpr):
    lr, lr_decay, weight_decay, eps, eps_inside_sqrt = hyper
    eps_inside = tl.where(eps_inside_sqrt != 0, eps, 0.0)
    step_size = lr / (1 + (step - 1) * lr_decay)
    return (
        grad_coef.to(dtype),
        weight_decay.to(dtype),
        eps_inside.to(dtype),
        (eps - eps_inside).to(dtype),
        step_size.to(dtype),
    ), extra


@triton.jit
def adagrad(scalars, param, grad, states, STORES: tl.constexpr):
    grad_coef, l2, eps_inside, eps_outside, step_size = scalars
    grad = grad_coef * grad + weighted(l2, param)
    sum = states[0] + grad * grad
    denom = square_root(sum + eps_inside) + eps_outside
    return param - step_size * quotient(grad, denom), (sum,)


# ---- RMSProp (rmsprop.h) ---------------------------------------------------------------------------------------


@triton.jit
def prepare_rmsprop(hyper, grad_coef, step, extra, dtype: tl.constexpr):
    lr, alpha, eps, weight_decay, momentum, eps_inside_sqrt = hyper
    eps_inside = tl.where(eps_inside_sqrt != 0, eps, 0.0)
    return (
        grad_coef.to(dtype),
        weight_decay.to(dtype),
        alpha.to(dtype),
        (1 - alpha).to(dtype),
        eps_inside.to(dtype),
        (eps - eps_inside).to(dtype),
        momentum.to(dtype),
        lr.to(dtype),
    ), extra


@triton.jit
def rmsprop(scalars, param, grad, states, STORES: tl.constexpr):
    grad_coef, l2, alpha, one_minus_alpha, eps_inside, eps_outside, momentum, lr = scalars
    square_avg, grad_avg, momentum_buffer = states
    grad = grad_coef * grad + weighted(l2, param)
    square_avg = alpha * square_avg + one_minus_alpha * grad * grad
    variance = square_avg
    if STORES[1]:  # centered
        grad_avg = alpha * grad_avg + one_minus_alpha * grad
        variance = maximum(square_avg - grad_avg * grad_avg, 0.0)  # only rounding makes it negative
    update = quotient(grad, square_root(variance + eps_inside) + eps_outside)
    if STORES[2]:
        momentum_buffer = momentum * momentum_buffer + update
        update = momentum_buffer
    return param - lr * update, (square_avg, grad_avg, momentum_buffer)


# ---- Adam, AdamW, AMSGrad (adam.h) -----------------------------------------------------------------------------


@triton.jit
def prepare_adam(hyper, grad_coef, step, extra, dtype: tl.constexpr):
    lr, beta1, beta2, eps, weight_decay, is_decoupled, has_bias_correction = hyper
    bias_correction1 = tl.where(has_bias_correction != 0, 1 - power(beta1, step), 1.0)
    bias_correction2 = tl.where(has_bias_correction != 0, 1 - power(beta2, step), 1.0)
    l2 = tl.where(is_decoupled != 0, 0.0, weight_decay)
    decay = tl.where(is_decoupled != 0, 1 - lr * weight_decay, 1.0)
    return (
        grad_coef.to(dtype),
        l2.to(dtype),
        decay.to(dtype),
        beta1.to(dtype),
        (1 - beta1).to(dtype),
        beta2.to(dtype),
        (1 - beta2).to(dtype),
        (lr / bias_correction1).to(dtype),
        (1 / tl.sqrt(bias_correction2)).to(dtype),
        eps.to(dtype),
    ), extra


@triton.jit
def adam(scalars, param, grad, states, STORES: tl.constexpr):
    grad_coef, l2, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, inv_root_of_correction2, eps = (
        scalars
    )
    exp_avg, exp_avg_sq, max_exp_avg_sq = states
    grad = grad_coef * grad + weighted(l2, param)
    exp_avg = beta1 * exp_avg + one_minus_beta1 * grad
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * grad * grad
    second_moment = exp_avg_sq
    if STORES[2]:  # AMSGrad
        max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)
        second_moment = max_exp_avg_sq
    denom = square_root(second_moment) * inv_root_of_correction2 + eps
    return decay * param - step_size * quotient(exp_avg, denom), (exp_avg, exp_avg_sq, max_exp_avg_sq)


# ---- NAdam (nadam.h) -------------------------------------------------------------------------------------------


@triton.jit
def prepare_nadam(hyper, grad_coef, step, mu_product, dtype: tl.constexpr):
    lr, beta1, beta2, eps, weight_decay, momentum_decay, is_decoupled = hyper
    base = tl.full((), 0.96, tl.float64)  # a literal would be float32
    mu = beta1 * (1 - 0.5 * power(base, step * momentum_decay))
    mu_next = beta1 * (1 - 0.5 * power(base, (step + 1) * momentum_decay))
    mu_product = mu_product * mu
    l2 = tl.where(is_decoupled != 0, 0.0, weight_decay)
    decay = tl.where(is_decoupled != 0, 1 - lr * weight_decay, 1.0)
    return (
        grad_coef.to(dtype),
        l2.to(dtype),
        decay.to(dtype),
        beta1.to(dtype),
        (1 - beta1).to(dtype),
        beta2.to(dtype),
        (1 - beta2).to(dtype),
        (1 / tl.sqrt(1 - power(beta2, step))).to(dtype),
        eps.to(dtype),
        (lr * (1 - mu) / (1 - mu_product)).to(dtype),
        (lr * mu_next / (1 - mu_product * mu_next)).to(dtype),
    ), mu_product


@triton.jit
def nadam(scalars, param, grad, states, STORES: tl.constexpr):
    (
        grad_coef,
        l2,
        decay,
        beta1,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        inv_root_of_correction2,
        eps,
        grad_step_size,
        exp_avg_step_size,
    ) = scalars
    exp_avg, exp_avg_sq = states
    grad = grad_coef * grad + weighted(l2, param)
    exp_avg = beta1 * exp_avg + one_minus_beta1 * grad
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * grad * grad
    denom = square_root(exp_avg_sq) * inv_root_of_correction2 + eps
    return decay * param - quotient(grad_step_size * grad + exp_avg_step_size * exp_avg, denom), (exp_avg, exp_avg_sq)


# ---- Lion (lion.h) ---------------------------------------------------------------------------------------------


@triton.jit
def prepare_lion(hyper, grad_coef, step, extra, dtype: tl.constexpr):
    lr, beta1, beta2, weight_decay = hyper
    return (
        grad_coef.to(dtype),
        (1 - lr * weight_decay).to(dtype),
        beta1.to(dtype),
        (1 - beta1).to(dtype),
        beta2.to(dtype),
        (1 - beta2).to(dtype),
        lr.to(dtype),
    ), extra


@triton.jit
def lion(scalars, param, grad, states, STORES: tl.constexpr):
    grad_coef, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, lr = scalars
    exp_avg = states[0]
    grad = grad_coef * grad
    update = sign(beta1 * exp_avg + one_minus_beta1 * grad)
    exp_avg = beta2 * exp_avg + one_minus_beta2 * grad
    return decay * param - lr * update, (exp_avg,)


# ---- RAdam (radam.h) -------------------------------------------------------------------------------------------


@triton.jit
def prepare_radam(hyper, grad_coef, step, extra, dtype: tl.constexpr):
    lr, beta1, beta2, eps, weight_decay, is_decoupled = hyper
    power2, rho_inf = power(beta2, step), 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * step * power2 / (1 - power2)
    is_adaptive = rho > 5  # else the second moment stands for too few steps
    ratio = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
    rectified = tl.where(is_adaptive, tl.sqrt(tl.where(is_adaptive, ratio * (1 - power2), 1.0)), 1.0)
    return (
        grad_coef.to(dtype),
        tl.where(is_decoupled != 0, 0.0, weight_decay).to(dtype),
        tl.where(is_decoupled != 0, 1 - lr * weight_decay, 1.0).to(dtype),
        beta1.to(dtype),
        (1 - beta1).to(dtype),
        beta2.to(dtype),
        (1 - beta2).to(dtype),
        (lr * rectified / (1 - power(beta1, step))).to(dtype),
        tl.where(is_adaptive, 1.0, 0.0).to(dtype),
        tl.where(is_adaptive, eps, 1.0).to(dtype),
    ), extra


@triton.jit
def radam(scalars, param, grad, states, STORES: tl.constexpr):
    grad_coef, l2, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, root_share, offset = scalars
    exp_avg, exp_avg_sq = states
    grad = grad_coef * grad + weighted(l2, param)
    exp_avg = beta1 * exp_avg + one_minus_beta1 * grad
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * grad * grad
    denom = weighted(root_share, square_root(exp_avg_sq)) + offset
    return decay * param - step_size * quotient(exp_avg, denom), (exp_avg, exp_avg_sq)


# ---- Adan (adan.h) ---------------------------------------------------------------------------------------------


@triton.jit
def prepare_adan(hyper, grad_coef, step, extra, dtype: tl.constexpr):
    lr, beta1, beta2, beta3, eps, weight_decay, is_decoupled = hyper
    decay = lr * weight_decay
    return (
        grad_coef.to(dtype),
        tl.where(step > 1, 1.0, 0.0).to(dtype),
        tl.where(is_decoupled != 0, 1 - decay, 1.0).to(dtype),
        tl.where(is_decoupled != 0, 1.0, 1 / (1 + decay)).to(dtype),
        beta1.to(dtype),
        (1 - beta1).to(dtype),
        beta2.to(dtype),
        (1 - beta2).to(dtype),
        beta3.to(dtype),
        (1 - beta3).to(dtype),
        (lr / (1 - power(beta1, step))).to(dtype),
        (lr * beta2 / (1 - power(beta2, step))).to(dtype),
        (1 / tl.sqrt(1 - power(beta3, step))).to(dtype),
        eps.to(dtype),
    ), extra


@triton.jit
def adan(scalars, param, grad, states, STORES: tl.constexpr):
    (
        grad_coef,
        has_previous,
        decay,
        shrink,
        beta1,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        beta3,
        one_minus_beta3,
        exp_avg_step_size,
        diff_step_size,
        inv_root_of_correction3,
        eps,
    ) = scalars
    exp_avg, exp_avg_diff, exp_avg_sq, previous_grad = states
    grad = grad_coef * grad
    diff = grad - tl.where(has_previous != 0, previous_grad, grad)
    nesterov = grad + beta2 * diff
    exp_avg = beta1 * exp_avg + one_minus_beta1 * grad
    exp_avg_diff = beta2 * exp_avg_diff + one_minus_beta2 * diff
    exp_avg_sq = beta3 * exp_avg_sq + one_minus_beta3 * nesterov * nesterov
    denom = square_root(exp_avg_sq) * inv_root_of_correction3 + eps
    update = quotient(exp_avg_step_size * exp_avg + diff_step_size * exp_avg_diff, denom)
    return shrink * (decay * param - update), (exp_avg, exp_avg_diff, exp_avg_sq, grad)


# ---- LAMB (lamb.h) ---------------------------------------------------------------------------------------------


@triton.jit
def prepare_lamb(hyper, grad_coef, step, extra, dtype: tl.constexpr):
    lr, beta1, beta2, eps, weight_decay, has_bias_correction, always_adapt = hyper
    bias_correction1 = tl.where(has_bias_correction != 0, 1 - power(beta1, step), 1.0)
    bias_correction2 = tl.where(has_bias_correction != 0, 1 - power(beta2, step), 1.0)
    return (
        grad_coef.to(dtype),
        weight_decay.to(dtype),
        beta1.to(dtype),
        (1 - beta1).to(dtype),
        beta2.to(dtype),
        (1 - beta2).to(dtype),
        (1 / bias_correction1).to(dtype),
        (1 / tl.sqrt(bias_correction2)).to(dtype),
        eps.to(dtype),
        (always_adapt != 0) | (weight_decay != 0),
        lr,
    ), extra


@triton.jit
def _lamb_update(scalars, param, grad, states):
    (
        grad_coef,
        l2,
        beta1,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        inv_correction1,
        inv_root_of_correction2,
        eps,
        _,
        _,
    ) = scalars
    exp_avg, exp_avg_sq = states
    grad = grad_coef * grad
    exp_avg = beta1 * exp_avg + one_minus_beta1 * grad
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * grad * grad
    denom = square_root(exp_avg_sq) * inv_root_of_correction2 + eps
    return inv_correction1 * quotient(exp_avg, denom) + weighted(l2, param), (exp_avg, exp_avg_sq)


@triton.jit
def measure_lamb(scalars, param, grad, states, STORES: tl.constexpr):
    update, _ = _lamb_update(scalars, param, grad, states)
    param, update = param.to(tl.float64), update.to(tl.float64)
    return param * param, update * update


@triton.jit
def _is_length(squared):
    """A norm of a masked tensor, which holds -inf, is no measure."""
    return (squared > 0) & (squared < float("inf"))


@triton.jit
def adapt_lamb(scalars, sums, count):
    squared_param, squared_update = sums
    is_adapted, lr = scalars[9], scalars[10]
    is_adapted = is_adapted & _is_length(squared_param) & _is_length(squared_update)
    ratio = tl.where(is_adapted, tl.sqrt(squared_param) / tl.sqrt(squared_update), 1.0)
    return scalars[:10] + (lr * ratio,)


@triton.jit
def lamb(scalars, param, grad, states, STORES: tl.constexpr):
    update, states = _lamb_update(scalars, param, grad, states)
    return param - scalars[10].to(param.dtype) * update, states


# ---- StableAdamW (stableadamw.h) -------------------------------------------------------------------------------


@triton.jit
def prepare_stableadamw(hyper, grad_coef, step, extra, dtype: tl.constexpr):
    lr, beta1, beta2, eps, weight_decay = hyper
    return (
        grad_coef.to(dtype),
        beta1.to(dtype),
        (1 - beta1).to(dtype),
        beta2.to(dtype),
        (1 - beta2).to(dtype),
        (1 / tl.sqrt(1 - power(beta2, step))).to(dtype),
        eps.to(dtype),
        weight_decay,
        lr,
        1 / (1 - power(beta1, step)),
    ), extra


@triton.jit
def measure_stableadamw(scalars, param, grad, states, STORES: tl.constexpr):
    grad_coef, _, _, beta2, one_minus_beta2, inv_root_of_correction2, eps, _, _, _ = scalars
    grad = grad_coef * grad
    exp_avg_sq = beta2 * states[1] + one_minus_beta2 * grad * grad
    ratio = quotient(grad, maximum(square_root(exp_avg_sq) * inv_root_of_correction2, eps)).to(tl.float64)
    return (ratio * ratio,)


@triton.jit
def adapt_stableadamw(scalars, sums, count):
    weight_decay, lr, inv_correction1 = scalars[7], scalars[8], scalars[9]
    rms = tl.sqrt(sums[0] / count)
    lr = tl.where(rms > 1, lr / rms, lr)
    return scalars[:7] + (1 - lr * weight_decay, lr * inv_correction1)


@triton.jit
def stableadamw(scalars, param, grad, states, STORES: tl.constexpr):
    grad_coef, beta1, one_minus_beta1, beta2, one_minus_beta2, inv_root_of_correction2, eps, decay, step_size = scalars
    exp_avg, exp_avg_sq = states
    grad = grad_coef * grad
    exp_avg = beta1 * exp_avg + one_minus_beta1 * grad
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * grad * grad
    denom = square_root(exp_avg_sq) * inv_root_of_correction2 + eps
    step_size, decay = step_size.to(param.dtype), decay.to(param.dtype)
    return decay * param - step_size * quotient(exp_avg, denom), (exp_avg, exp_avg_sq)


# ---- SAM's ascent (sam.h) --------------------------------------------------------------------------------------


@triton.jit
def prepare_sam(hyper, grad_coef, step, extra, dtype: tl.constexpr):
    rho, adaptive = hyper
    return (
        (rho * grad_coef).to(dtype),  # grad_coef is one over the norm that the gradients are divided by
        tl.where(adaptive != 0, 0.0, 1.0).to(dtype),
        tl.where(adaptive != 0, 1.0, 0.0).to(dtype),
    ), extra


@triton.jit
def sam(scalars, param, grad, states, STORES: tl.constexpr):
    length, plain_share, adaptive_share = scalars
    weight = plain_share + weighted(adaptive_share, param * param)
    return param + weighted(length * grad, weight), (param,)

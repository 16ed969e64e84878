// Adan, with proximal or decoupled weight decay.  Xie et al. 2022, arXiv:2208.06677; the published code's betas.
#pragma once

#include "math.h"

namespace fusedopt {

template <class T>
struct Adan {
  struct Hyper {
    double lr, beta1, beta2, beta3, eps, weight_decay, decoupled_weight_decay;
  };
  static constexpr const char* hyper_names = "lr beta1 beta2 beta3 eps weight_decay decoupled_weight_decay";
  static constexpr bool stores[] = {true, true, true, true};  // exp_avg, exp_avg_diff, exp_avg_sq, previous_grad

  T grad_coef, has_previous, decay, shrink, beta1, one_minus_beta1, beta2, one_minus_beta2, beta3, one_minus_beta3;
  T exp_avg_step_size, diff_step_size, inv_bias_correction3_sqrt, eps;

  static FO_HD Adan prepare(const Hyper& hyper, double grad_coef, double step, double&) {
    const bool is_decoupled = hyper.decoupled_weight_decay != 0;
    const double decay = hyper.lr * hyper.weight_decay;
    Adan rule;
    rule.grad_coef = T(grad_coef);
    rule.has_previous = T(step > 1 ? 1 : 0);
    rule.decay = T(is_decoupled ? 1 - decay : 1);
    rule.shrink = T(is_decoupled ? 1 : 1 / (1 + decay));
    rule.beta1 = T(hyper.beta1);
    rule.one_minus_beta1 = T(1 - hyper.beta1);
    rule.beta2 = T(hyper.beta2);
    rule.one_minus_beta2 = T(1 - hyper.beta2);
    rule.beta3 = T(hyper.beta3);
    rule.one_minus_beta3 = T(1 - hyper.beta3);
    rule.exp_avg_step_size = T(hyper.lr / (1 - std::pow(hyper.beta1, step)));
    rule.diff_step_size = T(hyper.lr * hyper.beta2 / (1 - std::pow(hyper.beta2, step)));
    rule.inv_bias_correction3_sqrt = T(1 / std::sqrt(1 - std::pow(hyper.beta3, step)));
    rule.eps = T(hyper.eps);
    return rule;
  }

  FO_HD void operator()(T& param, T grad, T& exp_avg, T& exp_avg_diff, T& exp_avg_sq, T& previous_grad) const {
    grad = grad_coef * grad;
    const T diff = weighted(has_previous, grad - previous_grad);
    const T nesterov = grad + beta2 * diff;
    exp_avg = beta1 * exp_avg + one_minus_beta1 * grad;
    exp_avg_diff = beta2 * exp_avg_diff + one_minus_beta2 * diff;
    exp_avg_sq = beta3 * exp_avg_sq + one_minus_beta3 * nesterov * nesterov;
    previous_grad = grad;
    const T denom = square_root(exp_avg_sq) * inv_bias_correction3_sqrt + eps;
    param = shrink * (decay * param - (exp_avg_step_size * exp_avg + diff_step_size * exp_avg_diff) / denom);
  }
};

}  // namespace fusedopt

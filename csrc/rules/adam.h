// Adam, AdamW and AMSGrad.  Kingma & Ba 2015, arXiv:1412.6980; Loshchilov & Hutter 2019, arXiv:1711.05101;
// Reddi, Kale, Kumar 2018, arXiv:1904.09237; torch.optim.Adam's form.
#pragma once

#include "math.h"

namespace fusedopt {

template <class T, bool is_amsgrad>
struct Adam {
  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay, bias_correction;
  };
  static constexpr const char* hyper_names = "lr beta1 beta2 eps weight_decay decoupled_weight_decay bias_correction";
  static constexpr bool stores[] = {true, true, is_amsgrad};  // exp_avg, exp_avg_sq, max_exp_avg_sq

  T grad_coef, l2, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, inv_bias_correction2_sqrt, eps;

  static FO_HD Adam prepare(const Hyper& hyper, double grad_coef, double step, double&) {
    const bool is_decoupled = hyper.decoupled_weight_decay != 0;
    double bias_correction1 = 1, bias_correction2 = 1;
    if (hyper.bias_correction != 0) {
      bias_correction1 = 1 - std::pow(hyper.beta1, step);
      bias_correction2 = 1 - std::pow(hyper.beta2, step);
    }
    Adam rule;
    rule.grad_coef = T(grad_coef);
    rule.l2 = T(is_decoupled ? 0 : hyper.weight_decay);
    rule.decay = T(is_decoupled ? 1 - hyper.lr * hyper.weight_decay : 1);
    rule.beta1 = T(hyper.beta1);
    rule.one_minus_beta1 = T(1 - hyper.beta1);
    rule.beta2 = T(hyper.beta2);
    rule.one_minus_beta2 = T(1 - hyper.beta2);
    rule.step_size = T(hyper.lr / bias_correction1);
    rule.inv_bias_correction2_sqrt = T(1 / std::sqrt(bias_correction2));
    rule.eps = T(hyper.eps);
    return rule;
  }

  FO_HD void operator()(T& param, T grad, T& exp_avg, T& exp_avg_sq, T& max_exp_avg_sq) const {
    grad = grad_coef * grad + weighted(l2, param);
    exp_avg = beta1 * exp_avg + one_minus_beta1 * grad;
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * (grad * grad);
    T second_moment = exp_avg_sq;
    if constexpr (is_amsgrad) {
      max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq);
      second_moment = max_exp_avg_sq;
    }
    const T denom = square_root(second_moment) * inv_bias_correction2_sqrt + eps;
    param = decay * param - step_size * (exp_avg / denom);
  }
};

}  // namespace fusedopt

// NAdam, with L2 or decoupled weight decay.  Dozat 2016; torch.optim.NAdam's form.
#pragma once

#include "math.h"

namespace fusedopt {

template <class T>
struct NAdam {
  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay, momentum_decay, decoupled_weight_decay;
  };
  static constexpr const char* hyper_names = "lr beta1 beta2 eps weight_decay momentum_decay decoupled_weight_decay";
  static constexpr bool stores[] = {true, true};  // exp_avg, exp_avg_sq

  T grad_coef, l2, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, inv_bias_correction2_sqrt, eps;
  T grad_step_size, exp_avg_step_size;

  // mu_product is the running product of the scheduled momenta mu_1 ... mu_step, kept per parameter.
  static FO_HD NAdam prepare(const Hyper& hyper, double grad_coef, double step, double& mu_product) {
    const bool is_decoupled = hyper.decoupled_weight_decay != 0;
    const double mu = hyper.beta1 * (1 - 0.5 * std::pow(0.96, step * hyper.momentum_decay));
    const double mu_next = hyper.beta1 * (1 - 0.5 * std::pow(0.96, (step + 1) * hyper.momentum_decay));
    mu_product *= mu;
    NAdam rule;
    rule.grad_coef = T(grad_coef);
    rule.l2 = T(is_decoupled ? 0 : hyper.weight_decay);
    rule.decay = T(is_decoupled ? 1 - hyper.lr * hyper.weight_decay : 1);
    rule.beta1 = T(hyper.beta1);
    rule.one_minus_beta1 = T(1 - hyper.beta1);
    rule.beta2 = T(hyper.beta2);
    rule.one_minus_beta2 = T(1 - hyper.beta2);
    rule.inv_bias_correction2_sqrt = T(1 / std::sqrt(1 - std::pow(hyper.beta2, step)));
    rule.eps = T(hyper.eps);
    rule.grad_step_size = T(hyper.lr * (1 - mu) / (1 - mu_product));
    rule.exp_avg_step_size = T(hyper.lr * mu_next / (1 - mu_product * mu_next));
    return rule;
  }

  FO_HD void operator()(T& param, T grad, T& exp_avg, T& exp_avg_sq) const {
    grad = grad_coef * grad + weighted(l2, param);
    exp_avg = beta1 * exp_avg + one_minus_beta1 * grad;
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * (grad * grad);
    const T denom = square_root(exp_avg_sq) * inv_bias_correction2_sqrt + eps;
    param = decay * param - (grad_step_size * grad + exp_avg_step_size * exp_avg) / denom;
  }
};

}  // namespace fusedopt

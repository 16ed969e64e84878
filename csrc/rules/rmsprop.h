// RMSProp, centered or not, with or without momentum.  Tieleman & Hinton 2012, lecture 6.5; Graves 2013 (centered);
// torch.optim.RMSprop's form, and eps inside the root (TensorFlow's).
#pragma once

#include "math.h"

namespace fusedopt {

template <class T, bool is_centered, bool has_momentum>
struct RMSprop {
  struct Hyper {
    double lr, alpha, eps, weight_decay, momentum, eps_inside_sqrt;
  };
  static constexpr const char* hyper_names = "lr alpha eps weight_decay momentum eps_inside_sqrt";
  static constexpr bool stores[] = {true, is_centered, has_momentum};  // square_avg, grad_avg, momentum_buffer

  T grad_coef, l2, alpha, one_minus_alpha, eps_inside, eps_outside, momentum, lr;

  static FO_HD RMSprop prepare(const Hyper& hyper, double grad_coef, double, double&) {
    const bool is_inside = hyper.eps_inside_sqrt != 0;
    RMSprop rule;
    rule.grad_coef = T(grad_coef);
    rule.l2 = T(hyper.weight_decay);
    rule.alpha = T(hyper.alpha);
    rule.one_minus_alpha = T(1 - hyper.alpha);
    rule.eps_inside = T(is_inside ? hyper.eps : 0);
    rule.eps_outside = T(is_inside ? 0 : hyper.eps);
    rule.momentum = T(hyper.momentum);
    rule.lr = T(hyper.lr);
    return rule;
  }

  FO_HD void operator()(T& param, T grad, T& square_avg, T& grad_avg, T& momentum_buffer) const {
    grad = grad_coef * grad + weighted(l2, param);
    square_avg = alpha * square_avg + one_minus_alpha * (grad * grad);
    T variance = square_avg;
    if constexpr (is_centered) {
      grad_avg = alpha * grad_avg + one_minus_alpha * grad;
      // Never negative but for rounding, which a constant gradient provokes: without the bound, sqrt gives NaN.
      variance = maximum(square_avg - grad_avg * grad_avg, T(0));
    }
    T update = grad / (square_root(variance + eps_inside) + eps_outside);
    if constexpr (has_momentum) {
      momentum_buffer = momentum * momentum_buffer + update;
      update = momentum_buffer;
    }
    param -= lr * update;
  }
};

}  // namespace fusedopt

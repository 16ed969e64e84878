// The ascent of SAM, and of ASAM where adaptive.  Foret et al. 2021, arXiv:2010.01412; Kwon et al. 2021, arXiv:2102.11600.
#pragma once

#include "math.h"

namespace fusedopt {

template <class T>
struct SAM {
  struct Hyper {
    double rho, adaptive;
  };
  static constexpr const char* hyper_names = "rho adaptive";
  static constexpr bool stores[] = {true};  // old_param
  static constexpr int overwrites = 0;      // which it never reads

  T length, plain_share, adaptive_share;

  // grad_coef is one over the norm that the gradients are divided by.
  static FO_HD SAM prepare(const Hyper& hyper, double grad_coef, double, double&) {
    SAM rule;
    rule.length = T(hyper.rho * grad_coef);
    rule.plain_share = T(hyper.adaptive != 0 ? 0 : 1);
    rule.adaptive_share = T(hyper.adaptive != 0 ? 1 : 0);
    return rule;
  }

  FO_HD void operator()(T& param, T grad, T& old_param) const {
    old_param = param;
    const T weight = plain_share + weighted(adaptive_share, param * param);
    param += weighted(length * grad, weight);
  }
};

}  // namespace fusedopt

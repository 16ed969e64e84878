// What is added up: the kernel that takes the 2-norm of all gradients and turns it into what clips them, and the one that adds
// up what a rule has measured.
#include "../rules/all.h"
#include "block.cuh"

namespace fusedopt::cuda {
namespace {

// Squares of float64 values far from 1 overflow or vanish; those of values times one of these do not.
constexpr double huge_scale = 0x1p540, tiny_scale = 0x1p-540;

// Sums of squares in double, where those of narrower values neither overflow nor vanish.
struct Sums {
  double plain = 0, huge = 0, tiny = 0;

  template <bool is_wide>
  FO_DEVICE void add_value(double value) {
    plain += value * value;
    if constexpr (is_wide) {
      huge += (value * tiny_scale) * (value * tiny_scale);
      tiny += (value * huge_scale) * (value * huge_scale);
    }
  }

  template <class Codec>
  FO_DEVICE void add(typename Codec::stored stored) {
    add_value<sizeof(stored) == 8>(double(Codec::decode(stored, NoAux())));
  }
};

// Adds a thread's elements of a chunk, the loads of several before the first of them is looked at.
template <class Codec>
FO_DEVICE void add_chunk(Sums& sums, void* grad, int64_t begin, int count) {
  using Stored = typename Codec::stored;
  constexpr int per_vector = sizeof(Vector) / sizeof(Stored), in_flight = 2;
  constexpr int at_once = in_flight * threads;
  static_assert(chunk_elements / per_vector % at_once == 0);
  if (count == chunk_elements && is_vector(grad)) {
    const Vector* const data = global<Vector>(grad, begin * int64_t(sizeof(Stored))) + threadIdx.x;
    for (int done = 0; done < chunk_elements / per_vector; done += at_once) {
      Vector vectors[in_flight];
#pragma unroll
      for (int i = 0; i < in_flight; ++i) vectors[i] = data[done + i * threads];
#pragma unroll
      for (int i = 0; i < in_flight; ++i) {
        Stored values[per_vector];
        __builtin_memcpy(values, &vectors[i], sizeof(Vector));
#pragma unroll
        for (int k = 0; k < per_vector; ++k) sums.add<Codec>(values[k]);
      }
    }
  } else {
    const Stored* const data = global<Stored>(grad) + begin;
#pragma unroll 4
    for (int i = threadIdx.x; i < count; i += threads) sums.add<Codec>(data[i]);
  }
}

// The same of the gradient's elements times the parameter's, in double whatever they are stored as.
FO_DEVICE void add_weighted_chunk(Sums& sums, const Slot& weight, const Slot& grad, int64_t begin, int count) {
  for (int64_t i = begin + threadIdx.x; i < begin + count; i += threads) {
    double value = 1;
    const auto multiply = [&](const Slot& slot) {
      with_codec<double>(slot.format, [&](auto codec) {
        using Codec = decltype(codec);
        typename Codec::aux aux = {};
        if constexpr (Codec::per_aux > 0) aux = global<typename Codec::aux>(slot.aux)[i / Codec::per_aux];
        value *= double(Codec::decode(global<typename Codec::stored>(slot.stored)[i], aux));
      });
    };
    multiply(grad);
    if (value == 0) continue;  // whatever its weight is
    multiply(weight);
    sums.add_value<true>(value);
  }
}

// What a 2-norm is, whichever of its sums neither overflowed nor vanished.
FO_DEVICE double norm_of(double plain, double huge, double tiny) {
  if (plain > 0x1p1020 && huge > 0) return sqrt(huge) * huge_scale;
  if (plain < 0x1p-960 && tiny > 0) return sqrt(tiny) * tiny_scale;
  return sqrt(plain);
}

__global__ void __launch_bounds__(threads) of_all(const NormArguments args) {
  Sums narrow, wide;
  for (int chunk = blockIdx.x; chunk < args.num_chunks; chunk += gridDim.x) {
    const int entry = args.entry_of[chunk];
    void* const grad = args.grads[entry];
    if (grad == nullptr) continue;
    const int64_t begin = int64_t(args.index_of[chunk]) * chunk_elements;
    const int count = int(min(int64_t(chunk_elements), args.numel[entry] - begin));
    const Format grad_format = Format(args.formats[entry]);
    if (args.weights != nullptr && args.weights[entry] != nullptr) {
      const Format param_format = Format(args.formats[int64_t(param_slot) * args.num_entries + entry]);
      const Slot weight{args.weights[entry], args.weights[args.num_entries + entry], param_format};
      add_weighted_chunk(wide, weight, {grad, nullptr, grad_format}, begin, count);
      continue;
    }
    with_codec<double, true>(grad_format, [&](auto codec) {
      using Codec = decltype(codec);
      add_chunk<Codec>(sizeof(typename Codec::stored) == 8 ? wide : narrow, grad, begin, count);
    });
  }
  // Of narrow values only infinity counts among the huge.
  const double plain = block_sum(narrow.plain + wide.plain);
  const double huge = block_sum(narrow.plain * tiny_scale * tiny_scale + wide.huge);
  const double tiny = block_sum(wide.tiny);
  double* const partials = args.partials;
  if (threadIdx.x == 0) {
    double* const own = partials + args.first_partial + blockIdx.x;
    own[0] = plain;
    own[args.num_partials] = huge;
    own[2 * args.num_partials] = tiny;
  }

  if (!is_last_block(args.ticket) || !args.is_final) return;
  Sums all;
  for (int i = threadIdx.x; i < args.num_partials; i += threads) {
    all.plain += __ldcg(partials + i);  // past the L1 cache, which may hold what was there before
    all.huge += __ldcg(partials + args.num_partials + i);
    all.tiny += __ldcg(partials + 2 * args.num_partials + i);
  }
  const double sums[] = {block_sum(all.plain), block_sum(all.huge), block_sum(all.tiny)};
  if (threadIdx.x != 0) return;
  double coef = args.previous[0] / double(*args.grad_scale);
  const double total = norm_of(sums[0], sums[1], sums[2]) * fabs(coef);
  const double limit = *args.max_norm, clip = limit / (total + 1e-6);
  if (!(limit == HUGE_VAL || clip >= 1)) coef *= clip;
  args.control[0] = coef;
  args.control[1] = total < HUGE_VAL ? 0 : 1;  // nor NaN
  if (args.is_norm_double) {
    *static_cast<double*>(args.norm) = total;
  } else {
    *static_cast<float*>(args.norm) = float(total);
  }
}

// A block an entry, each sum in one fixed order.
__global__ void __launch_bounds__(threads) of_each(const UpdateArguments args) {
  for (int entry = blockIdx.x; entry < args.num_entries; entry += gridDim.x) {
    for (int k = 0; k < args.num_sums; ++k) {
      const double* const partials = args.partial_sums + int64_t(k) * args.num_chunks;
      double sum = 0;
      for (int i = args.first_chunk[entry] + threadIdx.x; i < args.first_chunk[entry + 1]; i += threads) sum += partials[i];
      sum = block_sum(sum);
      if (threadIdx.x == 0) args.sums[int64_t(k) * args.num_entries + entry] = sum;
    }
  }
}

}  // namespace

const NormKernel global_norm = &of_all;
const UpdateKernel add_up = &of_each;

}  // namespace fusedopt::cuda

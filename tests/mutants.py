"""Bugs, planted one at a time in a copy of the project, and the test that must notice each.

    python -m tests.mutants                    all of them
    python -m tests.mutants NAME... --jobs 4   those whose names contain one of these words

A mutant is a file, a text that occurs in it exactly once, another in its place, and the node id of a test. In place of the
file, a mutant may name a folder: the text then occurs exactly once in all sources below it. Such a mutant stays valid when code
moves from file to file. The language does not matter: where the file is compiled, the commands that the build printed for the
sources that include it are run again.
Killed: the test fails by an assertion or an exception that says what is wrong. A mutant that does not compile or import, a
crash, or a test that does not exist is an error of the list. tests/test_docs.py checks that the texts are still there.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
FORMULA = "test_formula.py::test_header_in_double_is_the_reference_in_float64"
CUDA = "test_device.py::test_kernels_are_the_reference_to_rounding[cuda-AdamW(weight_decay=0.125)]"
CUDA_HALVES = "test_device.py::test_kernels_take_every_dtype[cuda-AdamW(weight_decay=0.125)-bfloat16-bfloat16]"
TRITON = "test_device.py::test_kernels_are_the_reference_to_rounding"
ONE_STEP = "test_device.py::test_one_step_is_the_same_on_all_backends_to_rounding"
PAST_CACHES = "test_sam.py::test_beside_a_large_parameter_weights_move_as_beside_a_small_one"
OVER_PROCESSES = "test_dtensor.py::test_over_processes"
SAME_AS_TORCH = "test_torch_contract.py::test_comes_to_the_same_as_torch"
SOURCE_SUFFIXES = (".py", ".pyi", ".h", ".inl", ".cpp", ".cu", ".cuh")


class ListError(Exception):
    """A mutant or its test is not what the list takes it for."""


@dataclass(frozen=True)
class Mutant:
    """One bug and the test for it."""

    name: str
    file: str  # or a folder
    old: str
    new: str
    test: str  # node id, from tests/

    def find(self, folder: Path) -> str:
        """The one file in a copy of the project that has the text, relative to the copy."""
        place = folder / self.file
        # os.walk does not follow links: an in-place build links fusedopt/kernels to kernels.
        below = [Path(parent, name) for parent, _, names in os.walk(place) for name in names]
        files = (
            [path for path in below if path.suffix in SOURCE_SUFFIXES] if place.is_dir() else [place] * place.is_file()
        )
        found = [path for path in files for _ in range(path.read_text().count(self.old))]
        if len(found) != 1:
            raise ListError(f"the code moved on, update the mutant: {self.file} has {self.old!r} {len(found)} times")
        return found[0].relative_to(folder).as_posix()

    def apply(self, folder: Path) -> str:
        """Plants the bug in a copy of the project; returns the file that it edited, relative to the copy."""
        file = self.find(folder)
        path = folder / file
        path.write_text(path.read_text().replace(self.old, self.new))
        return file


# ---- the bugs ----------------------------------------------------------------------------------------------------

MUTANTS = [
    Mutant(*row)
    for row in [
        # -- csrc/rules
        (
            "Adam: first bias correction of the next step",
            "csrc/rules/adam.h",
            "std::pow(hyper.beta1, step)",
            "std::pow(hyper.beta1, step + 1)",
            f"{FORMULA}[Adam(weight_decay=0.125)]",
        ),
        (
            "Adam: second bias correction of the next step",
            "csrc/rules/adam.h",
            "std::pow(hyper.beta2, step)",
            "std::pow(hyper.beta2, step + 1)",
            f"{FORMULA}[Adam(weight_decay=0.125)]",
        ),
        (
            "Adam: beta2 in the place of beta1",
            "csrc/rules/adam.h",
            "rule.beta1 = T(hyper.beta1)",
            "rule.beta1 = T(hyper.beta2)",
            f"{FORMULA}[Adam(weight_decay=0.125)]",
        ),
        (
            "AdamW: decay not scaled by lr",
            "csrc/rules/adam.h",
            "1 - hyper.lr * hyper.weight_decay",
            "1 - hyper.weight_decay",
            f"{FORMULA}[AdamW(weight_decay=0.125)]",
        ),
        (
            "AdamW: decay after the step instead of before",
            "csrc/rules/adam.h",
            "param = decay * param - step_size * (exp_avg / denom)",
            "param = decay * (param - step_size * (exp_avg / denom))",
            f"{FORMULA}[AdamW(weight_decay=0.125)]",
        ),
        (
            "AdamW: decay decoupled and coupled at once",
            "csrc/rules/adam.h",
            "T(is_decoupled ? 0 : hyper.weight_decay)",
            "T(hyper.weight_decay)",
            f"{FORMULA}[AdamW(weight_decay=0.125)]",
        ),
        (
            "Adam: eps inside the root",
            "csrc/rules/adam.h",
            "square_root(second_moment) * inv_bias_correction2_sqrt + eps",
            "square_root(second_moment + eps) * inv_bias_correction2_sqrt",
            f"{FORMULA}[Adam(weight_decay=0.125)]",
        ),
        (
            "Adam: eps scaled by the bias correction",
            "csrc/rules/adam.h",
            "square_root(second_moment) * inv_bias_correction2_sqrt + eps",
            "(square_root(second_moment) + eps) * inv_bias_correction2_sqrt",
            f"{FORMULA}[Adam(weight_decay=0.125)]",
        ),
        (
            "AMSGrad: maximum not stored",
            "csrc/rules/adam.h",
            "max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq);\n      second_moment = max_exp_avg_sq;",
            "second_moment = maximum(max_exp_avg_sq, exp_avg_sq);",
            f"{FORMULA}[Adam(weight_decay=0.125,amsgrad=True)]",
        ),
        (
            "AMSGrad: maximum of the corrected moment",
            "csrc/rules/adam.h",
            "maximum(max_exp_avg_sq, exp_avg_sq);",
            "maximum(max_exp_avg_sq, exp_avg_sq * inv_bias_correction2_sqrt);",
            f"{FORMULA}[Adam(weight_decay=0.125,amsgrad=True)]",
        ),
        (
            "SGD: decay of the wrong sign",
            "csrc/rules/sgd.h",
            "grad_coef * grad + weighted(l2, param)",
            "grad_coef * grad - weighted(l2, param)",
            f"{FORMULA}[SGD(momentum=0.9,weight_decay=0.125)]",
        ),
        (
            "SGD: dampening at the first step",
            "csrc/rules/sgd.h",
            "is_first ? 1 : 1 - hyper.dampening",
            "1 - hyper.dampening",
            f"{FORMULA}[SGD(momentum=0.9,dampening=0.3,weight_decay=0.125)]",
        ),
        (
            "SGD: Nesterov off",
            "csrc/rules/sgd.h",
            "T(hyper.nesterov != 0 ? 1 : 0);\n    rule.buffer_share = T(hyper.nesterov != 0 ? hyper.momentum : 1)",
            "T(0);\n    rule.buffer_share = T(1)",
            f"{FORMULA}[SGD(momentum=0.9,nesterov=True,weight_decay=0.125,maximize=True)]",
        ),
        (
            "Adagrad: lr decays one step early",
            "csrc/rules/adagrad.h",
            "(step - 1) * hyper.lr_decay",
            "step * hyper.lr_decay",
            FORMULA,
        ),
        (
            "Adagrad: eps on the wrong side of the root",
            "csrc/rules/adagrad.h",
            "hyper.eps_inside_sqrt != 0",
            "hyper.eps_inside_sqrt == 0",
            f"{FORMULA}[Adagrad(eps_inside_sqrt=True,eps=0.0001,weight_decay=0.125)]",
        ),
        (
            "RMSprop: mean not subtracted when centered",
            "csrc/rules/rmsprop.h",
            "square_avg - grad_avg * grad_avg",
            "square_avg",
            f"{FORMULA}[RMSprop(centered=True,weight_decay=0.125,eps=0.001)]",
        ),
        (
            "RMSprop: negative variance not bounded",
            "csrc/rules/rmsprop.h",
            "maximum(square_avg - grad_avg * grad_avg, T(0))",
            "square_avg - grad_avg * grad_avg",
            "test_formula.py::test_centered_variance_of_a_constant_gradient_is_not_negative",
        ),
        (
            "RMSprop: momentum of the raw gradient",
            "csrc/rules/rmsprop.h",
            "momentum * momentum_buffer + update",
            "momentum * momentum_buffer + grad",
            f"{FORMULA}[RMSprop(momentum=0.9,weight_decay=0.125,maximize=True)]",
        ),
        (
            "RMSprop: alpha for its complement",
            "csrc/rules/rmsprop.h",
            "T(1 - hyper.alpha)",
            "T(hyper.alpha)",
            f"{FORMULA}[RMSprop(weight_decay=0.125)]",
        ),
        (
            "NAdam: mu_product is the last factor only",
            "csrc/rules/nadam.h",
            "mu_product *= mu;",
            "mu_product = mu;",
            f"{FORMULA}[NAdam(weight_decay=0.125)]",
        ),
        (
            "NAdam: mu_product rounded to float32",
            "csrc/rules/nadam.h",
            "mu_product *= mu;",
            "mu_product = float(mu_product * mu);",
            f"{FORMULA}[NAdam(weight_decay=0.125)]",
        ),
        (
            "NAdam: next momentum of this step",
            "csrc/rules/nadam.h",
            "(step + 1) * hyper.momentum_decay",
            "step * hyper.momentum_decay",
            f"{FORMULA}[NAdam(weight_decay=0.125,momentum_decay=0.05,betas=(0.8, 0.95),maximize=True)]",
        ),
        (
            "Lion: betas exchanged",
            "csrc/rules/lion.h",
            "sign(beta1 * exp_avg + one_minus_beta1 * grad)",
            "sign(beta2 * exp_avg + one_minus_beta2 * grad)",
            f"{FORMULA}[Lion(weight_decay=0.125)]",
        ),
        (
            "Lion: the updated average in the direction",
            "csrc/rules/lion.h",
            "const T update = sign(",
            "exp_avg = beta2 * exp_avg + one_minus_beta2 * grad;\n    const T update = sign(",
            f"{FORMULA}[Lion(weight_decay=0.125)]",
        ),
        (
            "sign of 0 is 1",
            "csrc/rules/math.h",
            "x > T(0) ? T(1)",
            "x >= T(0) ? T(1)",
            "test_formula.py::test_zero_gradients_without_decay_move_nothing",
        ),
        (
            "sign of NaN is 0",
            "csrc/rules/math.h",
            "x < T(0) ? T(-1) : x)",
            "x < T(0) ? T(-1) : T(0))",
            "test_clip.py::test_nonfinite_propagates_as_in_torch[cpu-Lion-in_the_step-nan]",
        ),
        (
            "maximum drops NaN",
            "csrc/rules/math.h",
            "a > b || a != a ? a : b",
            "a > b ? a : b",
            "test_formula.py::test_gradients_beyond_range_leave_what_the_reference_leaves",
        ),
        (
            "zero weight times infinity is NaN",
            "csrc/rules/math.h",
            "weight == T(0) ? T(0) : weight * x",
            "weight * x",
            "test_formula.py::test_masked_parameter_stays_minus_infinity",
        ),
        # -- csrc/storage.h
        (
            "bfloat16 truncated",
            "csrc",
            "(bits + 0x7fff + ((bits >> 16) & 1)) >> 16",
            "bits >> 16",
            "test_parity.py::test_narrow_parameters_are_rounded_once_to_nearest_even",
        ),
        (
            "bfloat16: ties away from even",
            "csrc",
            "(bits + 0x7fff + ((bits >> 16) & 1)) >> 16",
            "(bits + 0x8000) >> 16",
            "test_parity.py::test_narrow_parameters_are_rounded_once_to_nearest_even",
        ),
        (
            "bfloat16: NaN rounded to -0",
            "csrc",
            "value != value ? quiet_nan : nearest_even",
            "nearest_even",
            "test_parity.py::test_nan_of_any_payload_stays_nan_in_narrow_parameters",
        ),
        (
            "float16: ties away from even",
            "csrc",
            "rebased + 0xfff + ((rebased >> 13) & 1)",
            "rebased + 0x1000",
            "test_parity.py::test_narrow_parameters_are_rounded_once_to_nearest_even",
        ),
        (
            "float16: subnormals flushed when stored",
            "csrc",
            "magnitude < 0x38800000 ? subnormal",
            "magnitude < 0x38800000 ? 0u",
            "test_parity.py::test_narrow_parameters_are_rounded_once_to_nearest_even",
        ),
        (
            "float16: subnormals flushed when loaded",
            "csrc",
            "magnitude < 0x400 ? subnormal",
            "magnitude < 0x400 ? 0.0f",
            "test_clip.py::test_norm_neither_overflows_nor_vanishes[cpu-torch.float16-6e-08-in_the_step]",
        ),
        (
            "float16: overflow saturates",
            "csrc",
            "? 0x7e00 : 0x7c00",
            "? 0x7e00 : 0x7bff",
            "test_parity.py::test_narrow_parameters_are_rounded_once_to_nearest_even",
        ),
        # -- csrc/cpu
        (
            "states stored before the next is loaded",
            "csrc",
            "      rule(value, grad[i], values...);\n      ((state[i] = values), ...);\n",
            "      rule(value, grad[i], state[i]...);\n",
            "test_compiled_code.py::test_updates_load_before_they_store[x86_64_v3]",
        ),
        (
            "last seven elements skipped",
            "csrc",
            "for (int64_t i = 0; i < count; ++i) {\n    T value",
            "for (int64_t i = 0; i + 7 < count; ++i) {\n    T value",
            f"{FORMULA}[SGD()]",
        ),
        (
            "first element skipped",
            "csrc",
            "for (int64_t i = 0; i < count; ++i) {\n    T value",
            "for (int64_t i = 1; i < count; ++i) {\n    T value",
            f"{FORMULA}[SGD()]",
        ),
        (
            "norm: last element skipped",
            "csrc",
            "for (int lane = 0; i < count; ++i, ++lane) {",
            "for (int lane = 0; i + 1 < count; ++i, ++lane) {",
            "test_clip.py::test_grad_norm_is_the_norm_before_clipping[cpu-in_the_step-torch.float32]",
        ),
        (
            "norm: squares in float32",
            "csrc",
            "const double x = scale * double(Codec::decode(from[i + lane], NoAux()));",
            "const float x = float(scale * double(Codec::decode(from[i + lane], NoAux())));",
            "test_clip.py::test_norm_neither_overflows_nor_vanishes",
        ),
        (
            "one step count for neighbours",
            "csrc",
            "compute == other.compute && step == other.step &&",
            "compute == other.compute &&",
            f"{SAME_AS_TORCH}[cpu-AdamW-gradients_come_and_go]",
        ),
        (
            "hyperparameters of the first group for all",
            "csrc",
            "rule == other.rule && group == other.group &&",
            "rule == other.rule &&",
            f"{SAME_AS_TORCH}[cpu-AdamW-groups_with_their_own_options]",
        ),
        (
            "mu_product of a neighbour",
            "csrc",
            "&&\n           more == other.more;",
            ";",
            f"{SAME_AS_TORCH}[cpu-NAdam-step_count_set_by_hand]",
        ),
        (
            "scalars of another computing type",
            "csrc",
            "compute == other.compute && step",
            "step",
            "test_torch_contract.py::test_dtypes_mix_in_one_group[cpu-AdamW]",
        ),
        (
            "step counts of parameters without a gradient advance",
            "csrc",
            "if (!entry.is_active) continue;\n    for (int k = 0; k < max_scalars",
            "if (functors.empty()) continue;\n    for (int k = 0; k < max_scalars",
            f"{SAME_AS_TORCH}[cpu-AdamW-gradients_come_and_go]",
        ),
        (
            "step counted twice",
            "csrc",
            "float(entry.scalars[0].read()) + 1;",
            "float(entry.scalars[0].read()) + 2;",
            f"{SAME_AS_TORCH}[cpu-AdamW-lambda_lr]",
        ),
        (
            "mu_product not stored",
            "csrc",
            "k < max_scalars; ++k) entry.scalars[k].write(",
            "k < 1; ++k) entry.scalars[k].write(",
            "test_parity.py::test_ten_steps_equal_torch_optim[NAdam(weight_decay=0.125)-torch.float32]",
        ),
        (
            "norm: partial sums in an order that depends on threads",
            "csrc",
            "table.partial_sums[c] = entry.is_active",
            "table.partial_sums[c] = 0;\n      table.partial_sums[table.batches[i].begin] += entry.is_active",
            "test_torch_contract.py::test_number_of_threads_does_not_change_a_bit_of_a_float64_norm",
        ),
        (
            "norm: gradients of an earlier step",
            "csrc",
            "= entry.is_active ? sum(",
            "= entry.operands[Entry::grad].data ? sum(",
            "test_clip.py::test_norm_is_of_the_gradients_there_are_now",
        ),
        (
            "norm: bfloat16 gradients left out",
            "csrc",
            "= entry.is_active ? sum(",
            "= entry.is_active && entry.operands[Entry::grad].dtype != DType::bfloat16 ? sum(",
            "test_clip.py::test_grad_norm_is_the_norm_before_clipping[cpu-in_the_step-torch.bfloat16]",
        ),
        (
            "norm: huge float64 gradients overflow",
            "csrc",
            "norm > 0x1p-480 && norm < 0x1p510",
            "norm > 0x1p-480",
            "test_clip.py::test_norm_neither_overflows_nor_vanishes",
        ),
        (
            "norm: tiny float64 gradients vanish",
            "csrc",
            "norm > 0x1p-480 && norm < 0x1p510",
            "norm < 0x1p510",
            "test_clip.py::test_norm_neither_overflows_nor_vanishes",
        ),
        (
            "large finite float64 gradients taken for infinite",
            "csrc",
            "0, entry.numel, 0x1p-540)",
            "0, entry.numel, 1.0)",
            "test_clip.py::test_error_names_the_gradient_that_is_not_finite_not_a_large_one",
        ),
        (
            "float16 view with gaps written without them",
            "csrc",
            "  if (operand.strides) {\n    encode_to(",
            "  if (false) {\n    encode_to(",
            "test_torch_contract.py::test_any_layout_steps_as_its_contiguous_clone[cpu-every second element-float16]",
        ),
        (
            "32-bit offset into a strided tensor",
            "csrc",
            "  int64_t offset = 0;",
            "  int32_t offset = 0;",
            "test_torch_contract.py::test_strides_beyond_32_bits",
        ),
        (
            "last chunk of a batch skipped",
            "csrc",
            "batches.back().end = int32_t(i) + 1;",
            "batches.back().end = std::max(int32_t(i), batches.back().begin + 1);",
            "test_parity.py::test_cpu_engine_is_the_reference_to_rounding[SGD()-float32-float32]",
        ),
        (
            "last elements of a tensor of several chunks skipped",
            "csrc",
            "begin < entries[i].numel; begin += chunk_elements",
            "begin == 0 || begin + chunk_elements <= entries[i].numel; begin += chunk_elements",
            "test_parity.py::test_cpu_engine_is_the_reference_to_rounding[SGD()-float32-float32]",
        ),
        # -- csrc/bucket.h and what it includes
        (
            "moved parameter: over a state",
            "csrc",
            "if (!find_written()) return false;",
            "find_written();",
            "test_errors.py::test_parameter_over_what_a_step_needs_is_refused[cpu-the same-state]",
        ),
        (
            "moved parameter: over another's gradient",
            "csrc",
            "return is_own || !written_.overlaps(",
            "return true || !written_.overlaps(",
            "test_errors.py::test_parameter_over_what_a_step_needs_is_refused[cpu-one element on-gradient]",
        ),
        (
            "moved parameter: half a refresh goes on",
            "csrc",
            "if (!is_sound_) return false;",
            "",
            "test_errors.py::test_parameter_over_another_is_refused_after_an_interrupt_too[cpu]",
        ),
        (
            "moved parameter: over one of another bucket",
            "csrc",
            "may_move && follow_params()",
            "follow_params()",
            "test_errors.py::test_parameter_over_one_with_sparse_gradients_is_refused[cpu]",
        ),
        (
            "moved parameter: the old memory is written",
            "csrc",
            "planned.param.data = entry.operands[Entry::param].data = now.data;",
            "planned.param.data = now.data;",
            "test_torch_contract.py::test_parameters_that_move_need_no_new_plan[by the C ABI-cpu-Lion]",
        ),
        (
            "moved parameter: the old memory is read",
            "csrc",
            "if (!entry.reads_elsewhere()) entry.operands[Entry::source].data = now.data;",
            "",
            "test_torch_contract.py::test_parameters_that_move_need_no_new_plan[by the C ABI-cpu-Lion]",
        ),
        (
            "DTensor: every local tensor gets the first gradient",
            "csrc",
            "handed[num_handed++]",
            "handed[0 * num_handed++]",
            f"{OVER_PROCESSES}[sharded_training_is_the_training_of_the_whole_model]",
        ),
        (
            "C++ table: a format of another type than is computed in",
            "csrc",
            "if (operand.data != nullptr && !fits)",
            "if (false && !fits)",
            "test_errors.py::test_cpp_table_takes_the_formats_that_it_has_loops_for_and_no_others[cpu-False]",
        ),
        (
            "C++ table: a format of another dtype",
            "csrc",
            "int(format_facts[index].dtype) != seen.layout->dtype",
            "false",
            "test_errors.py::test_cpp_table_refuses_what_it_has_no_codec_for[cpu]",
        ),
        (
            "extension with other formats loaded",
            "fusedopt/extension.py",
            "if codecs != formats:",
            "if False:",
            "test_environments.py::test_unusable_extension_is_a_reason_and_a_slower_backend",
        ),
        (
            "gradient's address of the first step",
            "csrc",
            "      planned_data = now.data;",
            "      if (planned_data == nullptr) planned_data = now.data;",
            "test_torch_contract.py::test_each_step_uses_the_gradients_it_finds[cpu-AdamW]",
        ),
        (
            "gradient with other strides than last time mis-paired",
            "csrc",
            "!describe(grad, now) || !planned.grad_layout->fits(now) ||",
            "!describe(grad, now) ||",
            "test_torch_contract.py::test_gradient_may_have_other_strides_than_its_parameter[cpu-matrix-transposed-float32]",
        ),
        (
            "`.data` swapped unnoticed",
            "csrc",
            "now.data == data && layout->fits(now)",
            "layout->fits(now)",
            f"{SAME_AS_TORCH}[cpu-AdamW-data_swapped]",
        ),
        (
            "state with a new layout unnoticed",
            "csrc",
            "[](const Snapshot& state) { return state.is_unchanged(); }",
            "[](const Snapshot&) { return true; }",
            "test_torch_contract.py::test_state_whose_layout_changed_in_place_is_followed[by the C ABI-cpu-AdamW]",
        ),
        (
            "state tensor replaced unnoticed",
            "csrc",
            "if (!visit(value)) return false;",
            "",
            f"{SAME_AS_TORCH}[cpu-AdamW-state_replaced]",
        ),
        (
            "state cleared unnoticed",
            "csrc",
            "return same && i == seen_.size();",
            "return same;",
            f"{SAME_AS_TORCH}[cpu-AdamW-state_cleared]",
        ),
        (
            "frozen parameter stepped with its last gradient",
            "csrc",
            "      entry.is_active = is_active;\n      if (!is_active) continue;",
            "      entry.is_active = is_active || entry.is_active;\n      if (!is_active) continue;",
            f"{SAME_AS_TORCH}[cpu-AdamW-frozen_and_unfrozen]",
        ),
        # -- kernels
        (
            "Triton: bias correction of the step before",
            "kernels",
            "    lr, beta1, beta2, eps, weight_decay, is_decoupled, has_bias_correction = hyper\n",
            "    lr, beta1, beta2, eps, weight_decay, is_decoupled, has_bias_correction = hyper\n    step = step + 1\n",
            f"{TRITON}[triton-AdamW(weight_decay=0.125)]",
        ),
        (
            "Triton: maximum of AMSGrad not kept",
            "kernels",
            "        max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)\n",
            "        max_exp_avg_sq = exp_avg_sq\n",
            f"{TRITON}[triton-AdamW(weight_decay=0.125,amsgrad=True)]",
        ),
        (
            "Triton: dampening in the first step too",
            "kernels",
            "one_minus_dampening = tl.where(is_first, 1.0, 1 - dampening)",
            "one_minus_dampening = 1 - dampening",
            f"{TRITON}[triton-SGD(momentum=0.9,dampening=0.3,weight_decay=0.125)]",
        ),
        (
            "Triton: 0.96 as float32",
            "kernels",
            "base = tl.full((), 0.96, tl.float64)",
            "base = tl.full((), 0.96, tl.float32)",
            "test_device.py::test_kernels_take_every_dtype[triton-NAdam(weight_decay=0.125)-float64-float64]",
        ),
        (
            "Triton: last block of a chunk left out",
            "kernels",
            "                    for done in range(0, CHUNK, BLOCK):\n",
            "                    for done in range(0, CHUNK - BLOCK, BLOCK):\n",
            f"{TRITON}[triton-AdamW(weight_decay=0.125)]",
        ),
        (
            "Triton: last element of a tail left out",
            "kernels",
            "tl.store(pointer + offsets, stored, mask=offsets < limit)",
            "tl.store(pointer + offsets, stored, mask=offsets < limit - 1)",
            f"{TRITON}[triton-AdamW(weight_decay=0.125)]",
        ),
        (
            "Triton: a tail written as a whole block",
            "kernels",
            "tl.store(pointer + offsets, stored, mask=offsets < limit)",
            "tl.store(pointer + offsets, stored, mask=offsets < limit + 1)",
            "test_device.py::test_nothing_outside_a_tensor_is_written[triton]",
        ),
        (
            "Triton: programs take the first chunk only",
            "kernels",
            "                        begin += BLOCK\n            chunk += tl.num_programs(0)",
            "                        begin += BLOCK\n            chunk += num_chunks",
            "test_triton.py::test_result_does_not_depend_on_the_grid",
        ),
        (
            "Triton: step count moves in a skipped step",
            "kernels",
            "    if is_skipped:\n",
            "    if is_skipped & (num_entries < 0):\n",
            "test_device.py::test_the_device_decides_to_skip_and_counts[triton]",
        ),
        (
            "Triton: squares of float32 in float32",
            "kernels",
            "values = load(grad, grad, begin, limit, GRAD, tl.float64, BLOCK, IS_WHOLE)",
            "values = load(grad, grad, begin, limit, GRAD, tl.float32, BLOCK, IS_WHOLE)\n"
            "    values = (values * values).to(tl.float64)",
            "test_device.py::test_squares_of_float32_neither_overflow_nor_vanish[triton-1e+20]",
        ),
        (
            "Triton: ticket not given back",
            "kernels",
            "        if _is_last_program(ticket):\n            tl.store(ticket, 0)\n            first = 0",
            "        if _is_last_program(ticket):\n            first = 0",
            f"{TRITON}[triton-AdamW(weight_decay=0.125)]",
        ),
        (
            "GPU: gradient addresses of the first step for ever",
            "fusedopt",
            "if addresses != self._grads_seen or has_copies:",
            "if self._grads_seen is None or has_copies:",
            "test_device.py::test_tables_are_kept_until_an_address_changes[triton]",
        ),
        (
            "GPU: a table among several takes the first gradients",
            "fusedopt",
            "            grads = grads[self._positions]",
            "            grads = grads[: len(self._positions)]",
            "test_device.py::test_no_infinity_is_lost_among_gradients_of_two_dtypes[triton-inf-torch.float64]",
        ),
        (
            "GPU: hyperparameters of the first step for ever",
            "fusedopt",
            "if rows != self._hyper_seen:",
            "if self._hyper_seen is None:",
            "test_device.py::test_tables_are_kept_until_an_address_changes[triton]",
        ),
        (
            "GPU: what was computed in copies is not brought back",
            "fusedopt",
            "                tensor.copy_(copy)\n",
            "                copy.copy_(tensor)\n",
            "test_torch_contract.py::test_any_layout_steps_as_its_contiguous_clone[triton-every second element-float32]",
        ),
        (
            "GPU: norm brought to the host in every step",
            "fusedopt",
            "record.grad_norm = norm\n",
            "record.grad_norm = norm\n                float(norm)\n",
            "test_device.py::test_no_step_waits_for_the_device[triton-in the step-propagate]",
        ),
        # -- csrc/cuda
        (
            "CUDA: last element of a tail left out",
            "csrc",
            "if (i * threads < left) data[i * threads] = get<Stored>(i);",
            "if (i * threads < left - 1) data[i * threads] = get<Stored>(i);",
            CUDA,
        ),
        (
            "CUDA: a tail written one element too far",
            "csrc",
            "if (i * threads < left) data[i * threads] = get<Stored>(i);",
            "if (i * threads < left + 1) data[i * threads] = get<Stored>(i);",
            "test_device.py::test_nothing_outside_a_tensor_is_written[cuda]",
        ),
        (
            "CUDA: second half of 16 bytes is the first again",
            "csrc",
            "words_[i] = lane % 2 == 0 ? of_source[i] : of_source[i + 2];",
            "words_[i] = of_source[i];",
            CUDA_HALVES,
        ),
        (
            "CUDA: halves stored in the order they came last",
            "csrc",
            "of_lane[i] = lane < warp / 2 ? first : second;",
            "of_lane[i] = lane < warp / 2 ? second : first;",
            CUDA_HALVES,
        ),
        (
            "CUDA: halves of a lane kept by that lane",
            "csrc",
            "source = part * (warp / 2) + lane / 2;",
            "source = lane;",
            f"{ONE_STEP}[AdamW(weight_decay=0.125)-bfloat16-bfloat16-1]",
        ),
        (
            "CUDA: sum over half a warp",
            "csrc",
            "for (int distance = warp / 2; distance > 0;",
            "for (int distance = warp / 2; distance > 1;",
            CUDA,
        ),
        (
            "CUDA: sum over all warps but the last",
            "csrc",
            "for (int i = 1; i < threads / warp; ++i)",
            "for (int i = 1; i < threads / warp - 1; ++i)",
            CUDA,
        ),
        (
            "CUDA: no barrier before the warps' sums are read",
            "csrc",
            "  __syncthreads();\n  double sum = of_warp[0];",
            "  double sum = of_warp[0];",
            CUDA,
        ),
        (
            "CUDA: no barrier before the warps' sums are overwritten",
            "csrc",
            "  __syncthreads();  // the sums of an earlier call have been read\n",
            "",
            "test_cuda.py::test_order_of_blocks_and_threads_changes_no_bit[AdamW]",
        ),
        (
            "CUDA: no barrier before the last block is named",
            "csrc",
            "  __syncthreads();\n  return is_last;",
            "  return is_last;",
            CUDA,
        ),
        (
            "CUDA: ticket not given back",
            "csrc",
            "    if (is_last) *ticket = 0;  // for the next launch\n",
            "",
            CUDA,
        ),
        (
            "CUDA: last but one block taken for the last",
            "csrc",
            "int32_t(gridDim.x) - 1;",
            "int32_t(gridDim.x) - 2;",
            CUDA,
        ),
        (
            "CUDA: scalars read before they are there",
            "csrc",
            "        entry.read(column);\n",
            "        entry.read(column);\n        __syncthreads();\n#define __syncthreads()  // the next one left out\n",
            CUDA,
        ),
        (
            "CUDA: scalars overwritten while they are used",
            "csrc",
            "        __syncthreads();  // all threads are done with the last one\n",
            "",
            "test_cuda.py::test_groups_and_step_counts_of_their_own",
        ),
        (
            "CUDA: scalars of a neighbour with another step count",
            "csrc",
            "group == other.group && step == other.step && second == other.second",
            "group == other.group",
            "test_cuda.py::test_groups_and_step_counts_of_their_own",
        ),
        (
            "CUDA: entry of the chunk before",
            "csrc",
            "    if (index != last) {\n",
            "    if (index != last && last < 0) {\n",
            CUDA,
        ),
        (
            "CUDA: scalars of a neighbour in another group",
            "csrc",
            "group == other.group && step == other.step",
            "step == other.step",
            "test_cuda.py::test_groups_and_step_counts_of_their_own",
        ),
        (
            "CUDA: blocks take one chunk only",
            "csrc",
            "chunk >= 0; chunk -= gridDim.x)",
            "chunk >= 0; chunk = -1)",
            "test_cuda.py::test_groups_and_step_counts_of_their_own",
        ),
        (
            "CUDA: first chunk left out",
            "csrc",
            "chunk >= 0; chunk -= gridDim.x)",
            "chunk > 0; chunk -= gridDim.x)",
            CUDA,
        ),
        (
            "CUDA: gradient's format taken from the parameter",
            "csrc",
            "return Format(args.formats[int64_t(row) * args.num_entries + entry]);",
            "return Format(args.formats[int64_t(row == grad_slot ? param_slot : row) * args.num_entries + entry]);",
            "test_device.py::test_kernels_take_every_dtype[cuda-AdamW(weight_decay=0.125)-bfloat16-float32]",
        ),
        (
            "CUDA: states decoded in the format of the first",
            "csrc",
            "states[state].decode(stretch, part, state_slot(state), state_values[state])",
            "states[state].decode(stretch, part, state_slot(0), state_values[state])",
            "test_device.py::test_neighbours_have_states_in_formats_of_their_own[cuda]",
        ),
        (
            "Triton: states of other formats in one table",
            "fusedopt",
            "return entry.variant, tables.grad_format(entry).name, *stored",
            "return entry.variant, tables.grad_format(entry).name, *stored[:2]",
            "test_device.py::test_neighbours_have_states_in_formats_of_their_own[triton]",
        ),
        (
            "CUDA: half of a warp's halves kept for the second part",
            "csrc",
            "first_[0] = words_[0], first_[1] = words_[1];",
            "first_[0] = words_[0], first_[1] = words_[0];",
            CUDA_HALVES,
        ),
        (
            "CUDA: half of a narrower gradient in double",
            "csrc",
            "values[i] = T(Codec::decode(get<Stored>(i), aux));",
            "values[i] = T(Codec::decode(get<Stored>(i), aux)) / (sizeof(T) / 4);",
            "test_cuda.py::test_float64_parameters_take_narrower_gradients[torch.float32]",
        ),
        (
            "CUDA: alignment of the gradient not looked at",
            "csrc",
            "for (const Slot& slot : slots) is &=",
            "for (const Slot& slot : slots) is &= &slot == slots ||",
            "test_device.py::test_misaligned_tensors_take_the_other_path[cuda-grad-1]",
        ),
        (
            "CUDA: alignment of the states not looked at",
            "csrc",
            "is_vector(slot.stored) && is_vector(slot.aux)",
            "(&slot >= slots + first_state_slot || is_vector(slot.stored)) && is_vector(slot.aux)",
            "test_device.py::test_misaligned_tensors_take_the_other_path[cuda-exp_avg_sq-1]",
        ),
        (
            "CUDA: skipped step counts",
            "csrc",
            "if (*args.found_inf != 0 || (args.skips_nonfinite",
            "if (*args.found_inf != 0 && (args.skips_nonfinite",
            "test_device.py::test_the_device_decides_to_skip_and_counts[cuda]",
        ),
        (
            "CUDA: step counts advanced several times",
            "csrc",
            "first += at_once * threads)",
            "first += threads)",
            "test_cuda.py::test_many_entries_advance_once",
        ),
        (
            "GPU: copies of tensors without elements",
            "fusedopt",
            "if entry.grad is None or param.numel() == 0:",
            "if entry.grad is None:",
            "test_device.py::test_parameter_without_elements_steps_whatever_its_strides[cuda]",
        ),
        (
            "CUDA: step counts of entries without gradient advanced",
            "csrc",
            "entry < args.num_entries && args.grads[entry] != nullptr",
            "entry < args.num_entries",
            "test_cuda.py::test_many_entries_advance_once",
        ),
        (
            "CUDA: norm of the first of two vectors",
            "csrc",
            "for (int done = 0; done < chunk_elements / per_vector; done += at_once)",
            "for (int done = 0; done < at_once; done += at_once)",
            CUDA,
        ),
        (
            "CUDA: squares of float32 in float32",
            "csrc",
            "plain += value * value;",
            "plain += float(value) * float(value);",
            "test_device.py::test_squares_of_float32_neither_overflow_nor_vanish[cuda-1e+20]",
        ),
        (
            "CUDA: infinity of a float32 lost among float64",
            "csrc",
            "narrow.plain * tiny_scale * tiny_scale + wide.huge",
            "wide.huge",
            "test_device.py::test_no_infinity_is_lost_among_gradients_of_two_dtypes[cuda-inf-torch.float32]",
        ),
        (
            "CUDA: norm of the whole step from one launch",
            "csrc",
            "args.first_partial + blockIdx.x",
            "blockIdx.x",
            "test_device.py::test_no_infinity_is_lost_among_gradients_of_two_dtypes[cuda-inf-torch.float32]",
        ),
        (
            "CUDA: second scalar left alone",
            "csrc",
            "  if (args.num_scalars > 1) {\n    Of::advance_second_scalars(args);",
            "  if (args.num_scalars > 2) {\n    Of::advance_second_scalars(args);",
            "test_cuda.py::test_many_entries_advance_once",
        ),
        (
            "CUDA: failed launch not looked at",
            "fusedopt",
            "        if problem is not None:",
            "        if problem is not None and name == 'num_blocks':",
            "test_cuda.py::test_failed_cuda_call_is_named_and_changes_nothing[0-cudaLaunchKernel]",
        ),
        # -- fusedopt/dtensor.py, and what plan.py does with it
        (
            "DTensor: norm of this process's part taken for the whole",
            "fusedopt",
            "return (mesh.device_type, tuple(map(mesh.get_group, dims))) if dims else None",
            "return None",
            f"{OVER_PROCESSES}[every_element_counts_once_in_the_norm]",
        ),
        (
            "DTensor: replicas counted in the norm",
            "fusedopt",
            "if not placement.is_replicate() and mesh.size(i) > 1]",
            "if mesh.size(i) > 1]",
            f"{OVER_PROCESSES}[every_element_counts_once_in_the_norm]",
        ),
        (
            "DTensor: a step skipped on a device counted in every bucket",
            "fusedopt",
            '        on_device.pop("skipped", None)  # one counts\n',
            "",
            f"{OVER_PROCESSES}[all_processes_skip_what_one_of_them_saw]",
        ),
        (
            "DTensor: writing to a clipped gradient not noticed",
            "fusedopt",
            "    return whole, part\n",
            "    return 0, part\n",
            f"{OVER_PROCESSES}[a_clip_is_for_the_gradients_it_has_seen]",
        ),
        (
            "DTensor: writing to a part of a clipped gradient not noticed",
            "fusedopt",
            "    return whole, part\n",
            "    return whole, 0\n",
            f"{OVER_PROCESSES}[a_clip_is_for_the_gradients_it_has_seen]",
        ),
        (
            "DTensor: a process skips alone",
            "fusedopt",
            "found = dtensor.gathered(found.reshape(1), group).max()",
            "pass",
            f"{OVER_PROCESSES}[all_processes_skip_what_one_of_them_was_told]",
        ),
        (
            "DTensor: one part moves before the next can fail",
            "fusedopt",
            "writes.append(bucket.prepare(plan.groups.scalars, grad_coefs, **on_device))",
            "bucket.prepare(plan.groups.scalars, grad_coefs, **on_device)()",
            f"{OVER_PROCESSES}[what_can_fail_does_so_before_any_part_has_moved]",
        ),
        (
            "DTensor: a process outside the mesh gathers",
            "fusedopt",
            " or tensor.device_mesh.get_coordinate() is None",
            "",
            f"{OVER_PROCESSES}[a_process_outside_the_mesh_has_nothing_to_do]",
        ),
        (
            "DTensor: a gradient on its way is not waited for",
            "fusedopt",
            'part.wait() if hasattr(part, "wait") else part',
            "part",
            f"{OVER_PROCESSES}[gradients_may_be_on_their_way_or_of_another_dtype]",
        ),
        (
            "DTensor: autograd not told that SAM restores",
            "fusedopt",
            "[param for param, _ in fitting if dtensor.is_dtensor(param)]",
            "[]",
            f"{OVER_PROCESSES}[sam_comes_back]",
        ),
        (
            "DTensor: first gradient looked for at the local tensor",
            "fusedopt",
            "table.add_idle(entry.owner)",
            "table.add_idle(entry.param.tensor)",
            f"{OVER_PROCESSES}[a_first_gradient_that_comes_late_is_noticed]",
        ),
        (
            "DTensor: gradients of another placement accepted",
            "fusedopt",
            "return one is two or (one.mesh == two.mesh and tuple(one.placements) == tuple(two.placements))",
            "return True",
            f"{OVER_PROCESSES}[what_does_not_fit_is_refused_by_name]",
        ),
        (
            "DTensor: norm below the limit scales up",
            "fusedopt",
            "control[0] * clip_coefficient(norm, max_norm)",
            "control[0] * (max_norm / (norm + 1e-6))",
            f"{OVER_PROCESSES}[norms_that_float32_cannot_square]",
        ),
        (
            "DTensor: what another process saw does not skip",
            "fusedopt",
            "(~norm.isfinite()).double()",
            "control[1]",
            f"{OVER_PROCESSES}[all_processes_skip_what_one_of_them_saw]",
        ),
        (
            "DTensor: gradient of the local tensor stays after the step",
            "fusedopt",
            "                entry.handed_grad = None\n",
            "                pass\n",
            f"{OVER_PROCESSES}[a_step_plans_only_once_and_leaves_no_trace]",
        ),
        (
            "DTensor: autograd not told",
            "fusedopt",
            "if plan.distributed:  # autograd counts",
            "if False:  # autograd counts",
            f"{OVER_PROCESSES}[a_step_plans_only_once_and_leaves_no_trace]",
        ),
        (
            "DTensor: another local tensor not noticed",
            "fusedopt",
            "if any(tensor._local_tensor is not local for tensor, local in self._locals):",
            "if False:",
            f"{OVER_PROCESSES}[parts_that_are_replaced_are_followed]",
        ),
        (
            "DTensor: sums over a part taken for those over the whole",
            "fusedopt",
            "if self.rule.num_sums and entry.norm_group is not None:",
            "if False:",
            f"{OVER_PROCESSES}[what_does_not_fit_is_refused_by_name]",
        ),
        # -- fusedopt/plan.py, checks.py, states.py
        (
            "group added later not planned",
            "fusedopt",
            "len(param_groups) == len(self.groups.options)\n"
            "            and (self._watch is None or self._watch.unchanged(param_groups, state))\n"
            "            and self.groups.read(self.owner, param_groups)",
            "self.groups.read(self.owner, param_groups[: len(self.groups.options)])",
            f"{SAME_AS_TORCH}[cpu-AdamW-group_added_in_the_middle]",
        ),
        (
            "hyperparameters validated at construction only",
            "fusedopt",
            "read[index], seen[index] = read_options(self._rule, group), _seen(group)",
            "read[index] = read[index] or read_options(self._rule, group)",
            "test_errors.py::test_option_set_out_of_range_later_is_refused_by_the_step",
        ),
        (
            "learning rate of a schedule not validated",
            "fusedopt",
            '    check_range("lr", lr, given=lr)\n',
            "",
            "test_errors.py::test_option_set_out_of_range_later_is_refused_by_the_step",
        ),
        (
            "options that change together with the learning rate not read",
            "fusedopt",
            "return (names, values) if _is_as_seen(group, (names, values)) else None",
            "return names, values",
            f"{SAME_AS_TORCH}[cpu-AdamW-options_edited_between_steps]",
        ),
        (
            "learning rate of a schedule not taken over",
            "fusedopt",
            "(*options.scalars[:index], lr, *options.scalars[index + 1 :])",
            "options.scalars",
            f"{SAME_AS_TORCH}[cpu-AdamW-lambda_lr]",
        ),
        (
            "refusal of one group loses the change of another",
            "fusedopt",
            "read, seen = [*self.options], [*self._seen]",
            "read, seen = self.options, self._seen",
            "test_errors.py::test_option_switched_beside_a_refused_one_still_takes_effect",
        ),
        (
            "option that adds a state switched unnoticed",
            "fusedopt",
            "        return is_same_kernel\n",
            "        return True\n",
            "test_torch_contract.py::test_option_that_adds_a_state_may_be_switched_on_and_off",
        ),
        (
            "maximize ignored",
            "fusedopt",
            "-1.0 if options.maximize else 1.0",
            "1.0",
            f"{FORMULA}[Adam(weight_decay=0.125,betas=(0.8, 0.95),maximize=True)]",
        ),
        (
            "clip coefficient applied twice",
            "fusedopt",
            "sign * coef for sign",
            "sign * coef * coef for sign",
            "test_clip.py::test_clipped_steps_equal_torchs[cpu-SGD-in_the_step-1.0]",
        ),
        (
            "gradient over a parameter not noticed by a warm plan",
            "csrc",
            "now.data != planned_data && written_.overlaps(",
            "false && written_.overlaps(",
            "test_errors.py::test_gradient_over_what_the_step_writes_is_refused[cpu-AdamW-parameter-own]",
        ),
        (
            "step count of NaN not noticed by a warm plan",
            "csrc",
            " || !counts_up(planned_[k])",
            "",
            "test_errors.py::test_count_that_counts_nothing_is_refused[cpu-step-nan]",
        ),
        (
            "conjugated gradient read as it lies by a warm plan",
            "csrc",
            ' || py::handle(tensor).attr("is_conj")().cast<bool>()',
            "",
            "test_parity.py::test_lazily_conjugated_tensors_are_refused[third step]",
        ),
        (
            "complex tensor taken for its real pairs",
            "csrc",
            " || now.is_complex != is_complex",
            "",
            "test_parity.py::test_complex_and_real_tensors_of_one_memory_layout_are_told_apart",
        ),
        (
            "complex strides not doubled",
            "csrc",
            "real.push_back(2 * strides[i]);",
            "real.push_back(strides[i]);",
            "test_parity.py::test_complex_parameter_steps_as_its_real_pairs"
            "[AdamW(weight_decay=0.125)-cpu-torch.complex64-strided]",
        ),
        (
            "states over each other not noticed",
            "fusedopt",
            "slots: list[Slot] = [entry.param, *entry.written]",
            "slots: list[Slot] = [entry.param]",
            "test_errors.py::test_state_over_other_memory_is_refused[cpu-another's state]",
        ),
        (
            "number in a string taken for a number",
            "fusedopt",
            "not isinstance(value, (str, bytes)) and",
            "",
            "test_clip.py::test_limit_that_is_no_number_is_refused[cpu-1.0]",
        ),
        (
            "two parameters with one saved state accepted",
            "fusedopt",
            "if param_of.setdefault(entry.saved_id, param) is not param:",
            "if False:",
            "test_checkpoints.py::test_checkpoint_that_does_not_fit_is_refused_whole[cpu-AdamW-one_id_for_two]",
        ),
        (
            "overlapping parameters not noticed",
            "fusedopt",
            "        checks.overlap(planned)\n",
            "",
            "test_errors.py::test_step_refuses_by_name_and_changes_nothing"
            "[cpu-AdamW-overlapping_parameters-first step-None]",
        ),
        (
            "overlap looked for among active parameters only",
            "fusedopt",
            "checks.overlap(planned)",
            "checks.overlap([entry for entry in planned if entry.grad is not None])",
            "test_errors.py::test_overlap_of_parameters_that_take_turns_is_noticed",
        ),
        (
            "fresh state left behind by a refused step",
            "fusedopt",
            "known.pop(name, None)",
            "pass",
            "test_errors.py::test_step_that_does_not_happen_makes_no_optional_state",
        ),
        (
            "used state discarded",
            "fusedopt",
            "for entry, step, missing in self.fresh if not is_used(entry, step)]",
            "for entry, step, missing in self.fresh]",
            "test_errors.py::test_state_that_an_update_has_used_is_kept",
        ),
        (
            "gradient with other strides paired by address",
            "fusedopt",
            "is_dense(tensor) and have_same_strides(tensor, param)",
            "is_dense(tensor)",
            "test_torch_contract.py::test_gradient_may_have_other_strides_than_its_parameter[cpu-matrix-transposed-float32]",
        ),
        (
            "expanded gradient paired by address",
            "fusedopt",
            "is_dense(tensor) and have_same_strides(tensor, param)",
            "is_dense(param) and (have_same_strides(tensor, param) or not is_dense(tensor))",
            "test_torch_contract.py::test_gradient_may_have_other_strides_than_its_parameter[cpu-matrix-expanded row-float32]",
        ),
        (
            "elements between those of a view written",
            "fusedopt",
            "is_dense(tensor) and have_same_strides(tensor, param)",
            "have_same_strides(tensor, param)",
            "test_torch_contract.py::test_any_layout_steps_as_its_contiguous_clone[cpu-every second element-float32]",
        ),
        (
            "states in the parameter's 16 bits",
            "fusedopt",
            "return plain_format(compute_dtype(param))",
            "return plain_format(param.dtype)",
            "test_parity.py::test_cpu_engine_is_the_reference_to_rounding[AdamW(weight_decay=0.125)-bfloat16-bfloat16]",
        ),
        (
            "gradient of another shape accepted",
            "fusedopt",
            "grad.shape != param.shape",
            "grad.numel() != param.numel()",
            "test_errors.py::test_step_refuses_by_name_and_changes_nothing"
            "[cpu-SGD-gradient_of_another_shape-first step-None]",
        ),
        (
            "state of another shape accepted",
            "fusedopt",
            "if value.shape != shape:",
            "if value.numel() > param.numel():",
            "test_errors.py::test_step_refuses_by_name_and_changes_nothing"
            "[reference-AdamW-state_of_another_shape-third step-None]",
        ),
        (
            "state whose elements share addresses accepted",
            "fusedopt",
            "value.numel() > 0 and overlaps_itself(local)",
            "False",
            "test_errors.py::test_step_refuses_by_name_and_changes_nothing[cpu-AdamW-expanded_state-third step-None]",
        ),
        (
            "states in 16 bits go into a checkpoint as they are",
            "fusedopt",
            "self.state = defaultdict(dict, {**held, **decoded})",
            "pass",
            "test_formats.py::test_checkpoint_of_states_in_16_bits_holds_float32[cpu-fusedopt]",
        ),
        (
            "state_dict decodes what hooks have made of it",
            "fusedopt",
            "            result = super().state_dict()\n        finally:",
            "            result = super().state_dict()\n            result['state'][0]\n        finally:",
            "test_torch_contract.py::test_state_dict_hook_may_leave_out_anything[state]",
        ),
        (
            "state that is stored as another format starts anew",
            "fusedopt",
            "        if others:\n",
            "        if False:\n",
            "test_formats.py::test_state_that_is_not_stored_as_its_format_says_is_refused[reference]",
        ),
        (
            "state without its auxiliary values starts anew",
            "fusedopt",
            "if missing and len(missing) < len(all_names):",
            "if False:",
            "test_formats.py::test_state_that_is_not_stored_as_its_format_says_is_refused[reference]",
        ),
        (
            "format that rounds at random is taken for the dtype it stores",
            "fusedopt",
            "self.dtype.is_floating_point and not self.takes_random",
            "self.dtype.is_floating_point",
            "test_formats.py::test_format_that_rounds_at_random_is_not_taken_for_the_dtype_it_stores[reference]",
        ),
        (
            "SAM: weights put back before the norm is known",
            "fusedopt",
            "        is_updated = _step_planned(plan, record, whole, grad_scale, found_inf, before)\n",
            "        before and before(plan)\n"
            "        is_updated = _step_planned(plan, record, whole, grad_scale, found_inf, None)\n",
            "test_sam.py::test_second_gradient_that_is_refused_leaves_the_weights_at_the_ascent[cpu-a gradient less]",
        ),
        (
            "a refused plan loses step counts that are in no state",
            "fusedopt",
            "            before.is_void = True\n",
            "            before.is_void = True\n            request.plans.kept.pop(request.purpose)\n",
            "test_device.py::test_first_step_that_the_device_skips_does_not_count",
        ),
        (
            "auxiliary values of another length accepted",
            "fusedopt",
            "found != (format.aux_dtype, (num_aux,), entry.param.tensor.device, True)",
            "(found[0], *found[2:]) != (format.aux_dtype, entry.param.tensor.device, True)",
            "test_formats.py::test_state_that_is_not_stored_as_its_format_says_is_refused[reference]",
        ),
        (
            "format without a codec reaches the table",
            "fusedopt",
            "if slot.format.name not in known:",
            "if False:",
            "test_errors.py::test_format_that_a_backend_cannot_use_is_refused[cpu-state_dtype2-param_dtype0-False]",
        ),
        (
            "format of another type than the update computes in reaches the table",
            "fusedopt",
            "if is_written and slot.format.compute_dtype != compute_dtype(entry.param.tensor):",
            "if False:",
            "test_errors.py::test_format_that_a_backend_cannot_use_is_refused[cpu-state_dtype1-param_dtype0-False]",
        ),
        (
            "blocks of a strided tensor accepted",
            "fusedopt",
            "if is_by_place and (entry.is_strided or entry.is_sparse):",
            "if is_by_place and entry.is_sparse:",
            "test_formats.py::test_block_format_refuses_what_would_cut_its_blocks[reference-strided]",
        ),
        (
            "blocks under a sparse gradient accepted",
            "fusedopt",
            "if is_by_place and (entry.is_strided or entry.is_sparse):",
            "if is_by_place and entry.is_strided:",
            "test_formats.py::test_block_format_refuses_what_would_cut_its_blocks[reference-sparse]",
        ),
        (
            "lazily negated gradient read as it lies",
            "fusedopt",
            "(tensor.is_neg(), ",
            "(False, ",
            "test_errors.py::test_lazily_negated_gradient_is_refused[cpu-first step]",
        ),
        (
            "parameter listed twice updated twice",
            "fusedopt",
            "                seen.add(id(param))\n",
            "",
            "test_torch_contract.py::test_parameter_listed_twice_counts_once[cpu-AdamW]",
        ),
        (
            "buffer of a rule without a step count starts again after a load",
            "fusedopt",
            "0.0 if is_new else 1.0",
            "0.0",
            "test_checkpoints.py::test_own_resume_is_bit_exact[cpu-SGD(momentum=0.9,weight_decay=0.125)-torch.float32]",
        ),
        (
            "buffer of a rule without a step count goes on after a first step that the device skipped",
            "fusedopt",
            "if known is not None and not is_new:  # the device",
            "if False:  # the device",
            "test_device.py::test_first_step_that_the_device_skips_does_not_count[triton]",
        ),
        (
            "initial accumulator ignored",
            "fusedopt",
            "initial = 0.0 if kept.initial is None else float(group[kept.initial])",
            "initial = 0.0",
            FORMULA,
        ),
        (
            "common norm overflows",
            "fusedopt",
            "scale = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)",
            "scale = torch.ones_like(largest)",
            "test_clip.py::test_norm_neither_overflows_nor_vanishes[cpu-torch.float64-1e+200-by_function_over_two]",
        ),
        (
            "tensor lr read once",
            "fusedopt",
            "if not _is_as_seen(group, self._seen[index])]",
            'if not self.options[index] or not isinstance(group["lr"], torch.Tensor)]',
            f"{SAME_AS_TORCH}[cpu-AdamW-cosine_of_a_tensor_lr]",
        ),
        (
            "empty tensors taken for one memory",
            "fusedopt",
            "for tensor in slot.tensors if tensor.numel()]",
            "for tensor in slot.tensors]",
            f"{SAME_AS_TORCH}[cpu-AdamW-lambda_lr]",
        ),
        (
            "group that is no dict read as one",
            "fusedopt",
            "if not isinstance(group, dict):",
            "if False:",
            "test_errors.py::test_group_that_is_none_is_refused_by_its_index",
        ),
        (
            "params that are no list read as one",
            "fusedopt",
            'if not isinstance(group["params"], list):',
            "if False:",
            "test_errors.py::test_group_that_is_none_is_refused_by_its_index",
        ),
        (
            "complex tensors told another limit of dimensions",
            "fusedopt",
            "at most {most} are supported",
            "at most {MAX_DIMS} are supported",
            "test_errors.py::test_bad_input_gets_the_answer_of_its_row"
            "[cpu-a complex parameter of 64 dimensions: with its pairs there are 65]",
        ),
        # -- fusedopt/optimizer.py, fusedopt/optimizers
        (
            "closure runs without gradients",
            "fusedopt/optimizer.py",
            "with torch.enable_grad():",
            "with torch.no_grad():",
            "test_torch_contract.py::test_closure_runs_once_first_and_with_gradients_enabled[cpu-AdamW]",
        ),
        (
            "step hooks not called",
            "fusedopt",
            "    def _request_for(",
            "    step.hooked = True\n\n    def _request_for(",
            "test_torch_contract.py::test_step_hooks_run_before_and_after[cpu-AdamW]",
        ),
        (
            "state_dict hooks not called",
            "fusedopt",
            "        result = super().state_dict()\n",
            "        hooks = self._optimizer_state_dict_pre_hooks, self._optimizer_state_dict_post_hooks\n"
            "        self._optimizer_state_dict_pre_hooks = self._optimizer_state_dict_post_hooks = {}\n"
            "        result = super().state_dict()\n"
            "        self._optimizer_state_dict_pre_hooks, self._optimizer_state_dict_post_hooks = hooks\n",
            "test_torch_contract.py::test_state_dict_hooks_run[cpu-AdamW]",
        ),
        (
            "hooks before a load not called",
            "fusedopt",
            "self._optimizer_load_state_dict_pre_hooks.values()",
            "()",
            "test_checkpoints.py::test_load_hooks_run_around_the_load[cpu-AdamW]",
        ),
        (
            "hooks after a load not called",
            "fusedopt",
            "self._optimizer_load_state_dict_post_hooks.values()",
            "()",
            "test_checkpoints.py::test_load_hooks_run_around_the_load[cpu-AdamW]",
        ),
        (
            "options of an added group not checked",
            "fusedopt",
            "                self._check_options(group)\n",
            "                pass\n",
            "test_errors.py::test_option_out_of_range_is_refused_at_construction",
        ),
        (
            "two threads in one step",
            "fusedopt",
            "request.plans.in_step.setdefault(self._process, self._thread) != self._thread",
            "request.plans.in_step.setdefault(self._process, self._thread) is None",
            "test_torch_contract.py::test_step_during_a_step_of_another_thread_is_refused[cpu-AdamW]",
        ),
        (
            "copy loses how many steps were skipped",
            "fusedopt",
            'for name in ("_record", "_step_supports_amp_scaling") if',
            'for name in ("_step_supports_amp_scaling",) if',
            "test_torch_contract.py::test_copy_goes_on_alone_with_the_same_bits[cpu-AdamW-pickled]",
        ),
        (
            "copy loses its backend",
            "fusedopt",
            'return self.defaults.get("backend")',
            "return None",
            "test_torch_contract.py::test_copy_goes_on_alone_with_the_same_bits[cpu-SGD-pickled]",
        ),
        (
            "deferred clip kept by zero_grad",
            "fusedopt",
            "super().zero_grad(set_to_none)\n        self._record.pending = None",
            "super().zero_grad(set_to_none)",
            "test_clip.py::test_zero_grad_forgets_a_pending_clip[cpu-SGD-True]",
        ),
        (
            "deferred clip kept by load_state_dict",
            "fusedopt",
            "param_groups})\n        self._record.pending = None",
            "param_groups})",
            "test_checkpoints.py::test_pending_clip_does_not_survive_a_load[cpu-SGD]",
        ),
        (
            "loaded states are those of the given dict",
            "fusedopt",
            "result |= holding(rule, own_states[name], param, shape, value)",
            "result[name] = value",
            "test_checkpoints.py::test_loaded_dict_is_neither_changed_nor_kept[cpu-AdamW-torch.float32]",
        ),
        (
            "loaded options are those of the given dict",
            "fusedopt",
            "deepcopy(saved_groups)]",
            "map(dict, saved_groups)]",
            "test_checkpoints.py::test_loaded_dict_is_neither_changed_nor_kept[cpu-AdamW-torch.float32]",
        ),
        (
            "loaded states cast to 16 bits",
            "fusedopt",
            "result |= holding(rule, own_states[name], param, shape, value)",
            "made = holding(rule, own_states[name], param, shape, value)\n"
            "            result |= {key: tensor.to(param.dtype) for key, tensor in made.items()}",
            "test_checkpoints.py::test_states_of_narrow_parameters_stay_float32[cpu-AdamW-ours]",
        ),
        (
            "loaded step count lost",
            "fusedopt",
            "result[name] = torch.tensor(float(value), dtype=dtype",
            'result[name] = torch.tensor(0.0 if name == "step" else float(value), dtype=dtype',
            "test_checkpoints.py::test_own_resume_is_bit_exact[cpu-AdamW(weight_decay=0.125)-torch.float32]",
        ),
        (
            "loaded mu_product rounded to float32",
            "fusedopt/checkpoint.py",
            'dtype = torch.float32 if name == "step" else compute_dtype(param)',
            "dtype = torch.float32",
            "test_checkpoints.py::test_own_resume_is_bit_exact[cpu-NAdam(weight_decay=0.125)-torch.float64]",
        ),
        (
            "checkpoint's states dealt out regardless of groups",
            "fusedopt",
            "yield _Loaded(param, next(remaining),",
            "yield _Loaded(param, i,",
            "test_checkpoints.py::test_run_goes_on_in_the_other_library"
            "[cpu-AdamW(weight_decay=0.125)-torch to ours-torch.float32]",
        ),
        (
            "checkpoint's state of another shape accepted",
            "fusedopt",
            "if value.shape != shape:",
            "if value.numel() != param.numel():",
            "test_checkpoints.py::test_checkpoint_that_does_not_fit_is_refused_whole[cpu-AdamW-transposed]",
        ),
        (
            "checkpoint without step counts accepted",
            "fusedopt",
            "else [*rule.counts_kept, *stored]:",
            "else stored:",
            "test_checkpoints.py::test_checkpoint_that_does_not_fit_is_refused_whole[cpu-AdamW-missing_step]",
        ),
        (
            "refused group stays",
            "fusedopt",
            "            self.param_groups.pop()\n",
            "",
            "test_errors.py::test_unsupported_parameter_dtype_is_refused_at_construction[cpu-AdamW-torch.float8_e5m2]",
        ),
        (
            "options that a checkpoint lacks are lost",
            "fusedopt/optimizer.py",
            "group.setdefault(name, value)",
            "pass",
            "test_checkpoints.py::test_options_that_an_old_checkpoint_lacks_are_the_constructors[cpu-AdamW]",
        ),
        (
            "AMP: scale ignored",
            "fusedopt",
            "pending.coef / float(scale), pending.is_finite",
            "pending.coef, pending.is_finite",
            "test_torch_contract.py::test_scaled_gradients_step_as_unscaled_ones[cpu-SGD-None-at the step-step unscales]",
        ),
        (
            "AMP: found_inf ignored",
            "fusedopt",
            "if bool(found):",
            "if False:",
            "test_torch_contract.py::test_found_inf_changes_nothing[cpu-AdamW-third step-True-False]",
        ),
        (
            "AMP: the scaler does not know that step unscales",
            "fusedopt",
            "self._step_supports_amp_scaling = True\n",
            "pass\n",
            "test_torch_contract.py::test_float16_parameters_work_with_the_scaler[cpu-AdamW]",
        ),
        (
            "AMP: first step that found_inf skips leaves states",
            "fusedopt",
            "if plan.states is not None and plan.states.fresh and plan.discard_unused_states():",
            "if False:",
            "test_torch_contract.py::test_found_inf_changes_nothing[cpu-AdamW-first step-True-False]",
        ),
        (
            "AMP: any element of found_inf counts",
            "fusedopt",
            'return value if is_elsewhere(value) else number(name, value, takes_bool=name == "found_inf")',
            'return float(torch.as_tensor(value).any()) if name == "found_inf" else number(name, value)',
            "test_errors.py::test_bad_input_gets_the_answer_of_its_row[cpu-`found_inf` of two elements]",
        ),
        (
            "AMP: found_inf ignored after unscale_",
            "fusedopt",
            "if bool(found):",
            "if bool(found) and scale != 1:",
            "test_torch_contract.py::test_found_inf_changes_nothing[cpu-AdamW-third step-True-True]",
        ),
        (
            "gradients kept after the step",
            "fusedopt",
            "                    self._release()\n",
            "                    pass\n",
            "test_torch_contract.py::test_no_gradient_is_kept_after_a_step[cpu-AdamW]",
        ),
        (
            "AdamW becomes Adam by a checkpoint",
            "fusedopt",
            'group["decoupled_weight_decay"] = True',
            'group.setdefault("decoupled_weight_decay", True)',
            "test_checkpoints.py::test_adamw_that_loads_adams_checkpoint_stays_decoupled",
        ),
        # -- fusedopt/step.py, record.py, clip.py
        (
            "clip coefficient without 1e-6",
            "fusedopt",
            "    coef = max_norm / (norm + 1e-6)",
            "    coef = max_norm / norm if norm else 1.0",
            "test_clip.py::test_coefficient_is_torchs_where_the_norm_is_tiny[cpu-in_the_step]",
        ),
        (
            "clip coefficient above 1",
            "fusedopt",
            "return 1.0 if coef >= 1 else coef",
            "return coef",
            "test_clip.py::test_clipped_steps_equal_torchs[cpu-SGD-in_the_step-1000000.0]",
        ),
        (
            "clip coefficient of a NaN norm is 1",
            "fusedopt",
            "return 1.0 if coef >= 1 else coef",
            "return coef if coef < 1 else 1.0",
            "test_clip.py::test_nonfinite_propagates_as_in_torch[cpu-SGD-in_the_step-nan]",
        ),
        (
            "infinite limit over an infinite norm is NaN",
            "fusedopt",
            "    if max_norm == math.inf:\n        return 1.0\n",
            "",
            "test_clip.py::test_infinite_norm_under_an_infinite_limit_is_not_nan",
        ),
        (
            "AMP: norm of the scaled gradients",
            "fusedopt",
            "norm = measured(plan) * abs(coef)",
            "norm = measured(plan)",
            "test_torch_contract.py::test_scaled_gradients_step_as_unscaled_ones[cpu-SGD-0.5-at the step-step unscales]",
        ),
        (
            "deferred clip kept after its step",
            "fusedopt",
            "    update(plan, coef)\n    record.pending = None\n",
            "    update(plan, coef)\n",
            "test_clip.py::test_pending_clip_applies_to_one_step[cpu-SGD]",
        ),
        (
            "deferred clip not applied",
            "fusedopt",
            "coef, is_finite = pending.coef / float(scale)",
            "coef, is_finite = 1 / float(scale)",
            "test_clip.py::test_clipped_steps_equal_torchs[cpu-SGD-by_method-1.0]",
        ),
        (
            "limit that has changed not validated",
            "fusedopt",
            "if (limit, nonfinite) != record.checked or type(limit)",
            "if type(limit)",
            "test_clip.py::test_step_refuses_what_was_put_into_defaults[cpu-max_grad_norm--1.0-max_grad_norm must be > 0]",
        ),
        (
            "refused limit taken when the step is tried again",
            "fusedopt",
            "        limit, nonfinite = record.checked = check_max",
            "        record.checked = limit, nonfinite\n        limit, nonfinite = check_max",
            "test_clip.py::test_step_refuses_what_was_put_into_defaults[cpu-max_grad_norm--1.0-max_grad_norm must be > 0]",
        ),
        (
            "second clip drops the first",
            "fusedopt",
            "Control(control.coef * coef, math",
            "Control(coef, math",
            "test_clip.py::test_clipping_twice_composes_as_in_torch[cpu-SGD]",
        ),
        (
            "deferred clip of gradients that were written to",
            "fusedopt",
            "return self.knows(grad) and _version_of(grad) == self.grads[id(grad)][1]",
            "return self.knows(grad)",
            "test_clip.py::test_step_refuses_a_deferred_clip_for_other_gradients[cpu-SGD-noise]",
        ),
        (
            "copy shares a deferred clip",
            "fusedopt",
            '"pending": None}',
            '"pending": self.pending and Pending(self.pending.control, {})}',
            "test_clip.py::test_copy_of_an_optimizer_has_no_deferred_clip",
        ),
        (
            "skipped step is taken",
            "fusedopt",
            '    if not is_finite and nonfinite == "skip":\n        record.count_skip()\n        return False\n',
            '    if not is_finite and nonfinite == "skip":\n        record.count_skip()\n        coef = 0.0\n',
            "test_clip.py::test_skip_leaves_everything_as_it_was[cpu-AdamW-in_the_step-inf-third step]",
        ),
        (
            "skipped step not counted",
            "fusedopt",
            "    if bool(found):\n        record.count_skip()\n",
            "    if bool(found):\n",
            "test_torch_contract.py::test_found_inf_changes_nothing[cpu-AdamW-first step-True-False]",
        ),
        (
            "NaN accepted as a limit",
            "fusedopt",
            "if not value >= 0:",
            "if value < 0:",
            "test_clip.py::test_bad_limit_is_refused_everywhere[cpu-nan]",
        ),
        (
            "parameter in two optimizers clipped by both",
            "fusedopt",
            "if owner != i:",
            "if False:",
            "test_clip.py::test_bad_argument_of_clip_grad_norm_is_refused[cpu-shared parameter]",
        ),
        # -- fusedopt/rules.py
        (
            "beta of 1 accepted",
            "fusedopt",
            "low <= value < high or",
            "low <= value <= high or",
            "test_errors.py::test_option_that_the_row_refuses",
        ),
        (
            "Nesterov with dampening accepted",
            "fusedopt",
            'group["momentum"] > 0 and group["dampening"] == 0',
            'group["momentum"] > 0',
            "test_errors.py::test_option_that_the_row_refuses",
        ),
        (
            "Lion's betas cross into C++ in another order",
            "fusedopt",
            'hyper=("lr", "beta1", "beta2", "weight_decay"),',
            'hyper=("lr", "beta2", "beta1", "weight_decay"),',
            "test_formula.py::test_table_and_header_agree_on_scalars_and_states[lion]",
        ),
        # -- fusedopt/reference.py
        (
            "reference: SGD's buffer starts at 0",
            "fusedopt",
            "grad if step == 1 else momentum",
            "momentum",
            f"{FORMULA}[SGD(momentum=0.9,dampening=0.3,weight_decay=0.125)]",
        ),
        (
            "reference: lr decays one step early",
            "fusedopt",
            "(step - 1) * lr_decay",
            "step * lr_decay",
            FORMULA,
        ),
        (
            "reference: NAdam's next momentum of this step",
            "fusedopt",
            "(step + 1) * momentum_decay",
            "step * momentum_decay",
            f"{FORMULA}[NAdam(weight_decay=0.125)]",
        ),
        (
            "reference: Lion averages with beta1",
            "fusedopt",
            'beta2 * state["exp_avg"] + (1 - beta2) * grad\n',
            'beta1 * state["exp_avg"] + (1 - beta1) * grad\n',
            f"{FORMULA}[Lion(weight_decay=0.125)]",
        ),
        (
            "reference: norm overflows",
            "fusedopt",
            'if not 0 < largest < float("inf"):',
            'largest = largest / largest\n    if not 0 < largest < float("inf"):',
            "test_clip.py::test_reference_norm_neither_overflows_nor_vanishes",
        ),
        (
            "reference: clip coefficient above 1",
            "fusedopt",
            "(max_norm / (norm + 1e-6)).clamp(max=1.0)",
            "max_norm / (norm + 1e-6)",
            "test_clip.py::test_coefficient_is_the_references",
        ),
        # -- fusedopt/backends
        (
            "version counters not advanced",
            "fusedopt",
            "threads, increment, written)\n\n\nclass Rows",
            "threads, increment, [])\n\n\nclass Rows",
            "test_torch_contract.py::test_autograd_notices_that_a_saved_parameter_changed[cpu-AdamW]",
        ),
        (
            "version counters of parameters without a gradient advanced",
            "csrc",
            "if (num_active_ == planned_.size()) return params;",
            "return params;",
            "test_torch_contract.py::test_autograd_notices_that_a_saved_parameter_changed[cpu-AdamW]",
        ),
        (
            "reference backend: gradient modified",
            "fusedopt",
            "grad_coef * as_real(entry.grad).to(dtype)",
            "as_real(entry.grad).mul_(grad_coef).to(dtype)",
            "test_parity.py::test_reference_backend_keeps_the_same_bound"
            "[Lion(weight_decay=0.125,betas=(0.95, 0.98),maximize=True)-float32-float32]",
        ),
        (
            "reference backend: error after half of the update",
            "fusedopt",
            "        written = [(entry.step, step)]\n",
            "        as_real(entry.param.tensor).copy_(new_param)\n        written = [(entry.step, step)]\n",
            "test_errors.py::test_update_that_fails_leaves_no_trace[reference-AdamW]",
        ),
        (
            "reference backend: mu_product rounded to float32",
            "fusedopt",
            "torch.tensor(values[slot.role], dtype=torch.float64)",
            "torch.tensor(values[slot.role], dtype=torch.float32)",
            "test_parity.py::test_reference_backend_keeps_the_same_bound[NAdam(weight_decay=0.125)-float64-float64]",
        ),
        (
            "environment overrules the backend asked for",
            "fusedopt",
            'name = name if name is not None else os.environ.get("FUSEDOPT_BACKEND") or "auto"',
            'name = os.environ.get("FUSEDOPT_BACKEND") or name or "auto"',
            "test_errors.py::test_backend_asked_for_overrules_the_environment",
        ),
        # -- fusedopt/schedules.py
        (
            "schedule: the first lr is 0",
            "fusedopt",
            "        step, peak = steps_done + 1, max(",
            "        step, peak = steps_done, max(",
            "test_schedules.py::test_every_lr_is_the_formula_of_its_step",
        ),
        (
            "schedule: climbs again after the end",
            "fusedopt",
            "if step >= self.total_steps:",
            "if step == self.total_steps:",
            "test_schedules.py::test_every_lr_is_the_formula_of_its_step",
        ),
        (
            "schedule: a lambda, which no checkpoint keeps",
            "fusedopt",
            'LambdaLR(optimizer, _InverseSqrt(integer("warmup_steps", warmup_steps, 1)))',
            'LambdaLR(optimizer, lambda done, f=_InverseSqrt(integer("warmup_steps", warmup_steps, 1)): f(done))',
            "test_schedules.py::test_checkpoint_holds_the_numbers_of_the_schedule",
        ),
        (
            "schedule: step decays one step early",
            "fusedopt",
            "self.gamma ** (steps_done //",
            "self.gamma ** ((steps_done + 1) //",
            "test_schedules.py::test_every_lr_is_the_formula_of_its_step",
        ),
        (
            "one cycle: the peak is missed by a bit",
            "fusedopt",
            "math.nextafter(warmup_steps / total_steps, 1)",
            "warmup_steps / total_steps",
            "test_schedules.py::test_one_cycle_reaches_its_peak_to_the_bit",
        ),
        (
            "one cycle: rises again after the end",
            "fusedopt",
            "if self.last_epoch < self.total_steps - 1:",
            "if self.last_epoch < self.total_steps:",
            "test_schedules.py::test_one_cycle_is_two_half_cosines",
        ),
        (
            "one cycle: switches momentum on",
            "fusedopt",
            "(low, high) if value > 0 else",
            "(low, high) if value >= 0 else",
            "test_schedules.py::test_one_cycle_moves_only_the_groups_that_have_momentum",
        ),
        (
            "one cycle: moves beta1 of Lion",
            "fusedopt",
            " or isinstance(optimizer, Lion)",
            "",
            "test_schedules.py::test_one_cycle_leaves_momentum_alone",
        ),
        # -- fusedopt/param_groups.py, recipes.py
        (
            "groups: vectors decay",
            "fusedopt",
            "param.dim() >= 2",
            "param.dim() >= 1",
            "test_recipes.py::test_matrices_decay_and_norms_biases_and_vectors_do_not",
        ),
        (
            "groups: the last owner of a tied tensor decides",
            "fusedopt",
            "found.get(param, (name, True))",
            "found.get(param, (name, True))[0], True",
            "test_recipes.py::test_tied_tensor_is_there_once_and_does_not_decay_if_an_owner_excludes_it",
        ),
        (
            "groups: a name of no parameter is ignored",
            "fusedopt",
            "    if unused:",
            "    if False:",
            "test_recipes.py::test_names_given_do_not_decay",
        ),
        (
            "recipe: torch's class silently does not clip",
            "fusedopt",
            'if "max_grad_norm" not in of_optimizer and values["max_grad_norm"] is not None:',
            "if False:",
            "test_recipes.py::test_namesake_in_torch_has_the_same_settings_but_does_not_clip",
        ),
        (
            "recipe: another class gets AdamW's betas",
            "fusedopt",
            "if cls.__name__ != own_cls.__name__:",
            "if False:",
            "test_recipes.py::test_another_class_has_its_own_defaults_and_needs_an_lr",
        ),
        (
            "recipe: an unknown name is ignored",
            "fusedopt/recipes.py",
            "    if unknown:",
            "    if False:",
            "test_recipes.py::test_unknown_name_is_refused_with_the_known_ones",
        ),
        # -- docs
        (
            "bad input without its row",
            "docs/bad-input.md",
            "| clip to NaN |",
            "| clip to a NaN |",
            "test_errors.py::test_every_bad_input_has_one_row_and_every_row_a_case",
        ),
        (
            "bad input with another answer than its row says",
            "docs/bad-input.md",
            "do not clip), got nan``",
            "do not clip), got NaN``",
            "test_errors.py::test_bad_input_gets_the_answer_of_its_row[cpu-clip to NaN]",
        ),
        (
            "RAdam: adapts a step too early",
            "csrc/rules/radam.h",
            "rho > 5;",
            "rho > 4;",
            "test_formula.py::test_header_in_double_is_the_reference_in_float64[RAdam(weight_decay=0.125)]",
        ),
        (
            "RAdam: divides by the root when it must not",
            "csrc/rules/radam.h",
            "weighted(root_share, square_root(exp_avg_sq))",
            "square_root(exp_avg_sq)",
            "test_formula.py::test_header_in_double_is_the_reference_in_float64[RAdam(weight_decay=0.125)]",
        ),
        (
            "Adan: gradient before not kept",
            "csrc/rules/adan.h",
            "    previous_grad = grad;\n",
            "",
            "test_formula.py::test_header_in_double_is_the_reference_in_float64[Adan(weight_decay=0.125)]",
        ),
        (
            "Adan: weight of the difference",
            "csrc/rules/adan.h",
            "grad + beta2 * diff;",
            "grad + one_minus_beta2 * diff;",
            "test_formula.py::test_header_in_double_is_the_reference_in_float64[Adan(weight_decay=0.125)]",
        ),
        (
            "Adan: a gradient before the first",
            "csrc/rules/adan.h",
            "T(step > 1 ? 1 : 0)",
            "T(1)",
            "test_formula.py::test_header_in_double_is_the_reference_in_float64[Adan(weight_decay=0.125)]",
        ),
        (
            "LAMB: norm of the parameter",
            "csrc/rules/lamb.h",
            "{double(param) * double(param), ",
            "{double(param), ",
            "test_formula.py::test_header_in_double_is_the_reference_in_float64[LAMB(weight_decay=0.125)]",
        ),
        (
            "LAMB: ratio off by a hundred thousandth",
            "csrc/rules/lamb.h",
            "step_size = T(lr * (std::sqrt",
            "step_size = T(1.00001 * lr * (std::sqrt",
            "test_fuzz.py::test_random_steps_are_the_reference_to_rounding[LAMB]",
        ),
        (
            "StableAdamW: mean over one element more",
            "csrc/rules/stableadamw.h",
            "sums.squared_ratio / count",
            "sums.squared_ratio / (count + 1)",
            "test_fuzz.py::test_random_steps_are_the_reference_to_rounding[StableAdamW]",
        ),
        (
            "LAMB: a parameter of zeros stays",
            "csrc/rules/lamb.h",
            "!is_length(sums.squared_param) ||",
            "(sums.squared_param != 0 && !is_length(sums.squared_param)) ||",
            "test_fuzz.py::test_random_steps_are_the_reference_to_rounding[LAMB]",
        ),
        (
            "LAMB: adapts only what decays",
            "csrc/rules/lamb.h",
            "hyper.always_adapt != 0 || hyper.weight_decay != 0",
            "hyper.weight_decay != 0",
            "test_formula.py::test_header_in_double_is_the_reference_in_float64[LAMB(weight_decay=0.0)]",
        ),
        (
            "LAMB: a masked tensor becomes NaN",
            "csrc/rules/lamb.h",
            "squared > 0 && squared < HUGE_VAL",
            "squared > 0",
            "test_formula.py::test_masked_parameter_stays_minus_infinity[LAMB(weight_decay=0.125)]",
        ),
        (
            "StableAdamW: never clips",
            "csrc/rules/stableadamw.h",
            "rms > 1 ? lr / rms : lr",
            "lr",
            "test_formula.py::test_header_in_double_is_the_reference_in_float64[StableAdamW(weight_decay=0.125)]",
        ),
        (
            "StableAdamW: clips upwards too",
            "csrc/rules/stableadamw.h",
            "rms > 1 ? lr / rms : lr",
            "lr / rms",
            "test_formula.py::test_rules_that_torch_has_not_are_as_published[StableAdamW]",
        ),
        (
            "StableAdamW: a sum in place of the mean",
            "csrc/rules/stableadamw.h",
            "sums.squared_ratio / count",
            "sums.squared_ratio",
            "test_formula.py::test_header_in_double_is_the_reference_in_float64[StableAdamW(weight_decay=0.125)]",
        ),
        (
            "sums: last elements left out",
            "csrc",
            "  for (int lane = 0; i < count; ++i, ++lane) add(i, lane);\n",
            "",
            "test_formula.py::test_header_in_double_is_the_reference_in_float64[LAMB(weight_decay=0.125)]",
        ),
        (
            "sums: a neighbour's scalars",
            "csrc",
            "if (!(key == last) || has_sums(entry)) {",
            "if (!(key == last)) {",
            "test_formula.py::test_rules_that_sum_over_tensors_keep_tensors_apart[LAMB-cpu]",
        ),
        (
            "sums: elements of another tensor",
            "csrc",
            "double(entry.numel), functors",
            "double(table.entries[0].numel), functors",
            "test_formula.py::test_rules_that_sum_over_tensors_keep_tensors_apart[StableAdamW-cpu]",
        ),
        (
            "sums: first chunk alone",
            "csrc",
            "+= partial_sums[c * max_sums + k];",
            "+= table.chunks[c].begin ? 0 : partial_sums[c * max_sums + k];",
            "test_parity.py::test_cpu_engine_is_the_reference_to_rounding[LAMB(weight_decay=0.125)-float32-float32]",
        ),
        (
            "CUDA: sums of a neighbour",
            "csrc",
            "num_sums > 0 ? column.entry : 0",
            "0",
            "test_formula.py::test_rules_that_sum_over_tensors_keep_tensors_apart[LAMB-cuda]",
        ),
        (
            "CUDA: sum of the first chunk alone",
            "csrc",
            "i < args.first_chunk[entry + 1]",
            "i < min(args.first_chunk[entry] + 1, args.first_chunk[entry + 1])",
            "test_device.py::test_kernels_are_the_reference_to_rounding[cuda-LAMB(weight_decay=0.125)]",
        ),
        (
            "Triton: sum goes on into the next tensor",
            "kernels",
            "mask=chunks < end, other=0",
            "mask=chunks <= end, other=0",
            "test_formula.py::test_rules_that_sum_over_tensors_keep_tensors_apart[LAMB-triton]",
        ),
        (
            "Triton: powers in float32",
            "kernels",
            "tl.exp2(exponent * tl.log2(tl.where(base > 0, base, 1.0)))",
            "tl.exp2((exponent * tl.log2(tl.where(base > 0, base, 1.0))).to(tl.float32)).to(tl.float64)",
            f"{ONE_STEP}[AdamW(weight_decay=0.125)-float32-float32-1]",
        ),
        (
            "Triton: RAdam's power off by nine units in the last place",
            "kernels",
            "power2, rho_inf = power(beta2, step), 2",
            "power2, rho_inf = power(beta2, step) * (1 + 1e-15), 2",
            f"{ONE_STEP}[RAdam(weight_decay=0.125)-float64-float64-10]",
        ),
        (
            "Triton: NAdam's next momentum of the same step",
            "kernels",
            "power(base, (step + 1) * momentum_decay)",
            "power(base, step * momentum_decay)",
            f"{ONE_STEP}[NAdam(weight_decay=0.125)-float64-float64-1]",
        ),
        (
            "Triton: StableAdamW clips upwards too",
            "kernels",
            "tl.where(rms > 1, lr / rms, lr)",
            "lr / rms",
            "test_device.py::test_kernels_are_the_reference_to_rounding[triton-StableAdamW(weight_decay=0.125)]",
        ),
        (
            "SAM: scale of ASAM",
            "csrc/rules/sam.h",
            "param * param)",
            "param)",
            "test_sam.py::test_the_ascent_is_rho_long_along_the_gradient[cpu-ASAM-torch.float64]",
        ),
        (
            "SAM: norm of ASAM without the parameters",
            "csrc",
            "is_weighted[entry.group] ? weighted_sum_of_squares : sum_of_squares",
            "sum_of_squares",
            "test_sam.py::test_the_ascent_is_rho_long_along_the_gradient[cpu-ASAM-torch.float32]",
        ),
        (
            "SAM: old weights not read",
            "csrc",
            "values[i] = operand.data ? operand.at(begin) : nullptr;",
            "values[i] = operand.data ? entry.operands[i == Entry::source ? Entry::param : i].at(begin) : nullptr;",
            "test_sam.py::test_weights_come_back_to_the_bit[cpu-torch.float32]",
        ),
        (
            "SAM: old weights not read, by tiles",
            "csrc",
            "i == Entry::param ? values[Entry::source] : fetch(operand,",
            "i == Entry::param ? values[Entry::source] : fetch(i ? operand : entry.operands[Entry::param],",
            "test_sam.py::test_weights_come_back_to_the_bit[cpu-torch.bfloat16]",
        ),
        (
            "stores past the caches: not what comes before the first whole vector",
            "csrc",
            "  std::memcpy(to, from, size_t(i));\n",
            "",
            f"{PAST_CACHES}[torch.float32-AdamW]",
        ),
        (
            "stores past the caches: not what comes after the last",
            "csrc",
            "std::memcpy(to + i, from + i, size_t(bytes - i));",
            "",
            f"{PAST_CACHES}[torch.float32-AdamW]",
        ),
        (
            "stores past the caches: values that are not encoded",
            "csrc",
            "stream(stored.bytes, operand.at(begin),",
            "stream(static_cast<const char*>(values), operand.at(begin),",
            f"{PAST_CACHES}[torch.bfloat16-AdamW]",
        ),
        (
            "stores past the caches: not the old weights",
            "csrc",
            "if (is_overwritten(i)) {",
            "if (is_overwritten(i) && i == Entry::param) {",
            f"{PAST_CACHES}[torch.float32-AdamW]",
        ),
        (
            "SAM: sums over the weights of the ascent",
            "csrc",
            "measure(rule, values[Entry::source],",
            "measure(rule, values[Entry::param],",
            "test_sam.py::test_what_is_summed_is_of_the_weights_before_the_ascent[cpu-LAMB-torch.float32]",
        ),
        (
            "stores past the caches: never",
            "csrc",
            "_mm_stream_si128(",
            "_mm_storeu_si128(",
            "test_compiled_code.py::test_large_tables_are_written_past_the_caches",
        ),
        (
            "sparse: rows without elements unchecked",
            "fusedopt",
            " and grad._values().numel() > 0",
            "",
            "test_sparse.py::test_row_beyond_a_table_without_columns_is_refused[cpu]",
        ),
        (
            "SAM: CUDA reads the weights of the ascent",
            "csrc",
            "param.load(stretch, part, read_slot(source_slot));",
            "param.load(stretch, part, read_slot(param_slot));",
            "test_sam.py::test_weights_come_back_to_the_bit[cuda-torch.float32]",
        ),
        (
            "SAM: CUDA weights every chunk by the first",
            "csrc",
            "global<typename Codec::stored>(slot.stored)[i], aux",
            "global<typename Codec::stored>(slot.stored)[i - begin], aux",
            "test_sam.py::test_the_ascent_is_rho_long_along_the_gradient[cuda-ASAM-torch.float32]",
        ),
        (
            "SAM: Triton reads the weights of the ascent",
            "kernels",
            "begin, limit, SOURCE, FORMATS,",
            "begin, limit, PARAM, FORMATS,",
            "test_sam.py::test_weights_come_back_to_the_bit[triton-torch.float32]",
        ),
        (
            "SAM: constant beside the norm",
            "fusedopt",
            "return 1 / (norm + 1e-12)",
            "return 1 / (norm + 1e-3)",
            "test_sam.py::test_the_ascent_is_rho_long_along_the_gradient[cpu-SAM-torch.float32]",
        ),
        (
            "SAM: rho of a group ignored",
            "fusedopt",
            'group.get("rho", self.rho)',
            "self.rho",
            "test_sam.py::test_steps_are_those_of_a_plain_loop_around_torch[cpu-SAM-AdamW]",
        ),
        (
            "SAM: sign of maximize",
            "fusedopt",
            '("params", "param_names", "maximize", "capturable")',
            '("params", "param_names", "capturable")',
            "test_sam.py::test_steps_are_those_of_a_plain_loop_around_torch[cpu-SAM-AdamW]",
        ),
        (
            "SAM: weights left at the ascent by an error",
            "fusedopt",
            "        except BaseException:\n            self.restore()\n",
            "        except BaseException:\n",
            "test_sam.py::test_a_second_closure_that_fails_leaves_the_weights_where_they_were[cpu]",
        ),
        (
            "SAM: weights put back before the step is planned",
            "fusedopt",
            '        request, whole = self._request("step"), self.defaults\n',
            '        request, whole = self._request("step"), self.defaults\n'
            "        if not self._can_read_sources():\n            self.restore()\n",
            "test_sam.py::test_refused_second_step_may_be_tried_again_or_given_up[cpu-a gradient less]",
        ),
        (
            "SAM: a plan of other old weights is kept",
            "fusedopt",
            "                or plan.sources is not request.sources\n",
            "",
            "test_sam.py::test_step_after_a_first_ascent_reads_the_weights_from_before[cpu]",
        ),
        (
            "SAM: device skips and leaves the weights at the ascent",
            "fusedopt",
            'self.nonfinite != "skip" and getattr(self, "found_inf", None) is None',
            "True",
            "test_sam.py::test_grad_scaler[cuda-False-None]",
        ),
        (
            "SAM: parameter without a second gradient stays at the ascent",
            "fusedopt",
            "return {*map(id, active)} == {*map(id, ascent.ascended)}",
            "return True",
            "test_sam.py::test_parameters_with_only_one_of_the_two_gradients[cpu]",
        ),
        (
            "SAM: rho of a group lost by a load",
            "fusedopt/sam.py",
            "                group.setdefault(name, value)\n",
            "                pass\n",
            "test_sam.py::test_checkpoints_are_those_of_the_base",
        ),
        (
            "SAM: the reference keeps the weights of the ascent",
            "fusedopt",
            "entry.source.decoded(dtype)",
            "entry.param.decoded(dtype)",
            "test_sam.py::test_weights_come_back_to_the_bit[reference-torch.float32]",
        ),
        # -- sparse gradients
        (
            "sparse: rows are sorted by their lowest digit",
            "csrc",
            "shift += bits",
            "shift += 64",
            "test_sparse.py::test_large_row_numbers[cpu]",
        ),
        (
            "sparse: numbers of rows cut to 32 bits",
            "csrc",
            "if (std::max(count, num_rows) <= int64_t(UINT32_MAX)) {",
            "if (true) {",
            "test_sparse.py::test_more_rows_than_32_bits_number",
        ),
        (
            "sparse: rows beyond the table are not named",
            "fusedopt",
            "        except IndexError:  # a row beyond the parameter's\n            return False\n",
            "        except KeyError:\n            return False\n",
            "test_sparse.py::test_refused_by_name[cpu-row beyond the table]",
        ),
        (
            "sparse: the last of a row's values is lost",
            "csrc",
            "source < end; ++source",
            "source < end - 1; ++source",
            "test_sparse.py::test_exact_classes_equal_torch[cpu-SGD-dtype0]",
        ),
        (
            "sparse: the norm is that of the last piece",
            "csrc",
            "total += sum(gradient(",
            "total = sum(gradient(",
            "test_sparse.py::test_clip_counts_them_with_the_rest[cpu-constructor]",
        ),
        (
            "sparse: every piece has its row's first values",
            "csrc",
            "rows.source[source] * rows.elements + at.column",
            "rows.source[source] * rows.elements",
            "test_sparse.py::test_rows_of_any_width[cpu-dtype0-257]",
        ),
        (
            "sparse: every piece is its row's first",
            "csrc",
            "entry.rows->touched[at.row] * entry.rows->elements + at.column",
            "entry.rows->touched[at.row] * entry.rows->elements",
            "test_sparse.py::test_rows_of_any_width[cpu-dtype0-257]",
        ),
        (
            "sparse: values are read with the parameter's strides",
            "csrc",
            "    entry.operands[Entry::grad].strides = nullptr;\n",
            "",
            "test_sparse.py::test_tables_of_odd_layout[cpu-transposed]",
        ),
        (
            "sparse: dimensions are not multiplied up to rows",
            "fusedopt",
            "keys = keys * size + index",
            "keys = keys + index",
            "test_sparse.py::test_any_number_of_sparse_dimensions[cpu-2]",
        ),
        (
            "sparse: values in the parameter change on the way",
            "fusedopt",
            "part.values = part.values.clone()",
            "pass",
            "test_sparse.py::test_gradient_whose_values_lie_in_the_parameter[cpu]",
        ),
        (
            "sparse: negative rows are taken",
            "fusedopt",
            "return min(low) >= 0 and all(",
            "return all(",
            "test_sparse.py::test_refused_by_name[cpu-negative row]",
        ),
        (
            "sparse: a moved table is not noticed",
            "fusedopt",
            "_seen(entry) != seen[0] or ",
            "",
            "test_sparse.py::test_moved_table_is_noticed[cpu]",
        ),
        (
            "sparse: an interrupt comes between rows and states",
            "fusedopt",
            "        with uninterrupted():\n            write()\n",
            "        if uninterrupted:\n            write()\n",
            "test_sparse.py::test_interrupt_waits_for_the_rows_to_be_copied_back[reference]",
        ),
        (
            "sparse: an interrupt comes between sparse and dense parameters",
            "fusedopt",
            "with uninterrupted() if len(plan.buckets) > 1 or plan.distributed or plan.mirrors else",
            "with uninterrupted() if not plan.buckets else",
            "test_sparse.py::test_interrupt_divides_no_step[cpu-1]",
        ),
        (
            "sparse: a change of the argument is not noticed",
            "fusedopt",
            "                or plan.is_lazy != request.is_lazy\n",
            "",
            "test_sparse.py::test_sparse_may_be_changed_between_steps[cpu]",
        ),
        (
            "sparse: an option that makes it inexact is not noticed",
            "fusedopt",
            "(before.variant, before.is_sparse_exact) == (now.variant, now.is_sparse_exact)",
            "before.variant == now.variant",
            "test_sparse.py::test_plan_is_kept[cpu-Adagrad]",
        ),
        (
            "sparse: exact with momentum",
            "fusedopt",
            'still_without=("momentum", "weight_decay"),',
            'still_without=("weight_decay",),',
            "test_sparse.py::test_sparse_may_be_changed_between_steps[cpu]",
        ),
        (
            "sparse: a plan for a number of values",
            "fusedopt",
            "grad.dtype, grad.shape, grad.device",
            "grad.dtype, grad.shape, grad._nnz()",
            "test_sparse.py::test_plan_is_kept[cpu-SGD]",
        ),
        (
            "sparse: autograd is not told",
            "fusedopt",
            "written, increment = [part.entry.param.tensor for part in self._touched]",
            "written, increment = []",
            "test_sparse.py::test_autograd_notices_the_update[cpu]",
        ),
        (
            "sparse: copies forget the argument",
            "fusedopt",
            'return self.defaults.get("sparse")',
            "return self.__dict__.get('_sparse')",
            "test_sparse.py::test_sparse_is_an_attribute_that_copies_keep[cpu]",
        ),
        (
            "sparse: the gradient is kept",
            "fusedopt",
            "        self._rows = None\n        self._is_used",
            "        self._is_used",
            "test_sparse.py::test_gradients_are_not_kept[cpu]",
        ),
        (
            "sparse: a tensor that says it is coalesced is believed",
            "fusedopt",
            "check_invariants=False).coalesce()",
            "check_invariants=False)._coalesced_(True)",
            "test_sparse.py::test_what_claims_to_have_no_duplicates_is_not_believed[reference]",
        ),
        (
            "row-wise: the sum of the squares, not their mean",
            "fusedopt",
            " / max(1, grad[:1].numel())",
            "",
            "test_rowwise.py::test_is_the_formula_row_by_row[cpu-dtype0-{}]",
        ),
        (
            "row-wise: a checkpoint of another shape is taken",
            "fusedopt",
            "if value.shape != shape:",
            "if value.shape[:1] != shape[:1]:",
            "test_rowwise.py::test_checkpoints[cpu]",
        ),
        (
            "row-wise: a switch of the option is not noticed",
            "fusedopt",
            "options |= {state.per_row for state in self.states if self.is_rowwise(group, state)}",
            "options |= set()",
            "test_rowwise.py::test_refused_by_name[cpu]",
        ),
        (
            "package: the sdist lacks the headers of the CUDA part",
            "MANIFEST.in",
            "graft csrc",
            "recursive-include csrc *.h *.inl *.cpp *.cu",
            "test_build.py::test_sdist_holds_what_git_tracks",
        ),
        (
            "package: the sdist lacks the tests' helpers",
            "MANIFEST.in",
            "graft tests\n",
            "",
            "test_build.py::test_sdist_holds_what_git_tracks",
        ),
        (
            "package: the sdist holds what was made in the tree",
            "MANIFEST.in",
            " *-quick.json",
            "",
            "test_build.py::test_sdist_holds_what_git_tracks",
        ),
        (
            "package: the wheel lacks the Triton kernels",
            "pyproject.toml",
            ', "fusedopt.kernels"]',
            "]",
            "test_build.py::test_wheel_made_from_the_sdist_has_every_part",
        ),
        (
            "build: in place, the CUDA part stays in the build folder",
            "setup.py",
            "for name in self.files():\n            built, copy",
            "for name in self.files()[:1]:\n            built, copy",
            "test_build.py::test_source_tree_built_in_place_has_every_part",
        ),
        (
            "build: in place, Triton's kernels are not found",
            "setup.py",
            'kernels.symlink_to(Path("..", "kernels"))',
            "pass",
            "test_build.py::test_source_tree_built_in_place_has_every_part",
        ),
        (
            "build: an earlier CUDA part stays in the build folder",
            "setup.py",
            "for name in self.files():  # those",
            "for name in self.files()[:1]:  # those",
            "test_build.py::test_nothing_of_an_earlier_build_survives_one_that_leaves_it_out[build]",
        ),
        (
            "build: an earlier CUDA part stays in the source tree",
            "setup.py",
            "copy.unlink(missing_ok=True)  #",
            "pass  #",
            "test_build.py::test_nothing_of_an_earlier_build_survives_one_that_leaves_it_out[editable_wheel]",
        ),
        (
            "build: a strict editable install lacks the CUDA part",
            "setup.py",
            "name) for name in self.files()]\n        return",
            "name) for name in self.files()[:1]]\n        return",
            "test_build.py::test_nothing_of_an_earlier_build_survives_one_that_leaves_it_out[strict]",
        ),
        (
            "build: the terminal is not told",
            "setup.py",
            "file.write(message)",
            "file.write('')",
            "test_build.py::test_pip_says_what_it_leaves_out[nvcc]",
        ),
        (
            "build: a missing extension is told to pip alone",
            "setup.py",
            "tell(FALLBACK)",
            "print(FALLBACK, file=sys.stderr)",
            "test_build.py::test_pip_says_what_it_leaves_out[c++]",
        ),
        (
            "build: the wheel's name does not say what is missing",
            "setup.py",
            'missing = ["cpp"]',
            'missing = [] and ["cpp"]',
            "test_build.py::test_pip_says_what_it_leaves_out[c++]",
        ),
        (
            "build: without a compiler for C++ there is no CUDA part",
            "setup.py",
            "            tell(FALLBACK)\n",
            "            tell(FALLBACK)\n            return\n",
            "test_build.py::test_nothing_of_an_earlier_build_survives_one_that_leaves_it_out[build]",
        ),
        (
            "build: what was left out on purpose is reported",
            "setup.py",
            'outcome = "not built: FUSEDOPT_BUILD_CUDA=0 was set"',
            'outcome = problem = "not built: FUSEDOPT_BUILD_CUDA=0 was set"',
            "test_build.py::test_left_out_on_purpose_is_not_reported",
        ),
        (
            "build: nvcc's last line is taken for the reason",
            "setup.py",
            "[*errors, *lines[-1:]",
            "[*lines[-1:]",
            "test_build.py::test_first_error_of_nvcc_is_the_reason",
        ),
        (
            "build: nvcc is looked for on PATH only",
            "setup.py",
            'search += [f"{home}/bin" for home in TOOLKITS]',
            "pass",
            "test_build.py::test_nvcc_is_found_where_toolkits_are_installed[False]",
        ),
        (
            "build: another toolkit than the one that was named",
            "setup.py",
            "if not homes:",
            "if True:",
            "test_build.py::test_nvcc_is_found_where_toolkits_are_installed[True]",
        ),
        (
            "doctor: a source tree is not told from an installed package",
            "fusedopt",
            '(tree / "setup.py").exists()',
            "False",
            "test_build.py::test_printed_commands_build_what_is_missing[True]",
        ),
        (
            "doctor: an installed package stays what it was",
            "fusedopt",
            " --force-reinstall --no-deps --no-cache-dir .`",
            " --no-deps --editable .`",
            "test_build.py::test_printed_commands_build_what_is_missing[False]",
        ),
        (
            "doctor: why the CUDA part was not built is not read",
            "fusedopt",
            'return " ".join(RECORD.read_text().split())',
            'return ""',
            "test_build.py::test_reason_for_a_missing_cuda_part_is_what_the_build_wrote_down",
        ),
        (
            "doctor: nvcc is recommended for AMD's GPUs",
            "fusedopt",
            "torch.version.hip is not None",
            "False",
            "test_build.py::test_no_command_is_printed_where_none_helps",
        ),
        (
            "doctor: a lost CUDA part is said to be built",
            "fusedopt",
            'if record.startswith("built "):',
            "if False:",
            "test_build.py::test_reason_for_a_missing_cuda_part_is_what_the_build_wrote_down",
        ),
        (
            "doctor: hidden GPUs are looked for in the driver",
            "fusedopt",
            "visible is not None and (",
            "False and (",
            "test_build.py::test_what_helps_where_cuda_sees_no_gpu",
        ),
        (
            "doctor: CUDA's version is misread",
            "fusedopt",
            "version.value % 1000 // 10",
            "version.value % 100",
            "test_build.py::test_what_helps_where_cuda_sees_no_gpu",
        ),
        (
            "doctor: builds for one of several GPUs",
            "fusedopt",
            "for other in range(torch.cuda.device_count())",
            "for other in [index]",
            "test_build.py::test_command_for_another_gpu_names_it",
        ),
        (
            "checkpoint: entries of wrappers are dropped",
            "fusedopt",
            "result[name] = _copied(value, param.device)",
            "pass",
            "test_checkpoints.py::test_entries_that_no_rule_keeps_step_save_and_load[cpu-AdamW]",
        ),
        (
            "checkpoint: an entry of a wrapper is shared with the given dict",
            "fusedopt",
            "return value.detach().to(device, copy=True)",
            "return value",
            "test_checkpoints.py::test_entries_that_no_rule_keeps_step_save_and_load[cpu-AdamW]",
        ),
        (
            "checkpoint: names are not looked at",
            "fusedopt",
            "saved_ids = [id_of[name] for name in _names(target.param_groups)]",
            "pass",
            "test_checkpoints.py::test_states_go_by_name_where_the_order_is_another[cpu-AdamW]",
        ),
        (
            "checkpoint: the saved names replace those of the parameters",
            "fusedopt",
            'saved["param_names"] = group["param_names"]',
            "pass",
            "test_checkpoints.py::test_states_go_by_name_where_the_order_is_another[cpu-AdamW]",
        ),
        (
            "checkpoint: renamed parameters are refused",
            "fusedopt",
            "None not in ours and len",
            "None not in ours or len",
            "test_checkpoints.py::test_parameters_that_have_other_names_throughout_go_by_position[cpu]",
        ),
        (
            "checkpoint: names that contradict the order accepted",
            "fusedopt",
            "if theirs.get(name, position) != position:",
            "if False:",
            "test_checkpoints.py::test_names_that_contradict_the_order_are_refused[cpu]",
        ),
        (
            "checkpoint: states keyed by strings accepted",
            "fusedopt",
            "if strangers:",
            "if False:",
            "test_checkpoints.py::test_checkpoint_that_does_not_fit_is_refused_whole[cpu-AdamW-keyed_by_strings]",
        ),
        (
            "checkpoint: states of another rule accepted",
            "fusedopt",
            "if name in Rule.all_state_names():",
            "if False:",
            "test_checkpoints.py::test_checkpoint_that_does_not_fit_is_refused_whole[cpu-AdamW-of_another_rule]",
        ),
        (
            "checkpoint: states of bitsandbytes accepted",
            "fusedopt",
            "if names <= saved.keys():",
            "if False:",
            "test_checkpoints.py::test_checkpoint_that_does_not_fit_is_refused_whole[cpu-AdamW-of_bitsandbytes]",
        ),
        (
            "checkpoint: the step count of a group is left there",
            "fusedopt",
            'step = group.pop("step")',
            'step = group["step"]',
            "test_checkpoints.py::test_step_count_of_the_group_counts_for_its_parameters[cpu-AdamW]",
        ),
        (
            "checkpoint: the step count of a group is ignored",
            "fusedopt",
            'if without and group.get("step") is not None:',
            "if False:",
            "test_checkpoints.py::test_step_count_of_the_group_counts_for_its_parameters[cpu-AdamW]",
        ),
        (
            "checkpoint: a foreign switch is taken silently",
            "fusedopt/checkpoint.py",
            "if unknown:",
            "if False:",
            "test_checkpoints.py::test_switch_that_only_the_checkpoint_has_is_warned_of[cpu-AdamW]",
        ),
        (
            "checkpoint: a tag of the user's own is warned of",
            "fusedopt",
            "*target.rule.own_options, *group}",
            "*target.rule.own_options}",
            "test_checkpoints.py::test_switch_that_only_the_checkpoint_has_is_warned_of[cpu-AdamW]",
        ),
        (
            "checkpoint: does not say that it was clipped",
            "fusedopt",
            "if self.max_grad_norm is not None:\n            result",
            "if False:\n            result",
            "test_checkpoints.py::test_checkpoint_of_a_clipped_training_warns_who_does_not_clip[cpu-ours-AdamW]",
        ),
        (
            "checkpoint: the clip of Apex's groups goes unnoticed",
            "fusedopt",
            '*state_dict["param_groups"]]',
            "*[]]",
            "test_checkpoints.py::test_checkpoint_of_a_clipped_training_warns_who_does_not_clip[cpu-Apex's-AdamW]",
        ),
        (
            "options: not in defaults",
            "fusedopt",
            "super().__init__(params, {**defaults, **changed, **whole})",
            "super().__init__(params, {**defaults, **changed})\n        self.defaults.update(dict(whole, max_grad_norm=None))",
            "test_drop_in.py::test_rebuilt_optimizer_clips_and_skips_as_the_first[cpu-AdamW-rebuilt_from_defaults]",
        ),
        (
            "options: what is set later is not in defaults",
            "fusedopt",
            'self.defaults["max_grad_norm"] = check_max_grad_norm(value)',
            "check_max_grad_norm(value)",
            "test_drop_in.py::test_rebuilt_optimizer_clips_and_skips_as_the_first[cpu-AdamW-rebuilt_from_defaults]",
        ),
        (
            "options: become keys of the groups",
            "fusedopt",
            "for name in self._whole_options.keys() - given if isinstance(param_group, dict) else ():",
            "for name in ():",
            "test_drop_in.py::test_sam_is_rebuilt_from_its_class_and_defaults[cpu]",
        ),
        (
            "options: not shown",
            "fusedopt",
            "for name in self._whole_options if name in self.defaults\n",
            "for name in ()\n",
            "test_drop_in.py::test_options_of_the_whole_optimizer_are_in_defaults_and_repr_and_in_no_group[cpu-AdamW]",
        ),
        (
            "options: taken silently in a group",
            "fusedopt",
            "if name not in whole or group[name] != whole[name]:",
            "if False:",
            "test_drop_in.py::test_option_of_the_whole_optimizer_is_refused_in_a_group[cpu-AdamW-max_grad_norm]",
        ),
        (
            "options: lost where only the groups are passed on",
            "fusedopt",
            "self.defaults.update(copied)",
            "pass",
            "test_drop_in.py::test_rebuilt_optimizer_clips_and_skips_as_the_first[cpu-AdamW-rebuilt_from_groups]",
        ),
        (
            "options: taken over by a class of another rule",
            "fusedopt",
            "if groups.rule is not self.rule:",
            "if False:",
            "test_drop_in.py::test_optimizer_of_other_groups_takes_nothing_over[cpu]",
        ),
        (
            "options: max_grad_norm=0 taken for a limit",
            "fusedopt",
            "if value == 0:",
            "if False:",
            "test_clip.py::test_clipped_steps_equal_torchs[cpu-AdamW-in_the_step-0.0]",
        ),
        (
            "betas: tuples and lists only",
            "fusedopt",
            "return isinstance(value, Sequence) or",
            "return isinstance(value, (tuple, list)) or",
            "test_drop_in.py::test_betas_may_be_any_sequence[cpu-AdamW-configuration]",
        ),
        (
            "betas: no arrays",
            "fusedopt",
            'or getattr(value, "ndim", 0) == 1',
            "",
            "test_drop_in.py::test_betas_may_be_any_sequence[cpu-AdamW-NumPy]",
        ),
        (
            "betas: words taken for a sequence",
            "fusedopt",
            "if isinstance(value, (str, bytes, Mapping)):",
            "if isinstance(value, Mapping):",
            "test_drop_in.py::test_betas_may_be_any_sequence[cpu-AdamW-list]",
        ),
        (
            "betas: kept in the type they came in",
            "fusedopt",
            'group["betas"] = tuple(map',
            "tuple(map",
            "test_drop_in.py::test_betas_may_be_any_sequence[cpu-AdamW-NumPy]",
        ),
        (
            "count in another form: not written back",
            "fusedopt",
            "mirror.kept.detach().copy_(mirror.counted)",
            "pass",
            "test_drop_in.py::test_step_count_in_another_form_is_used_in_place[cpu-AdamW-int64]",
        ),
        (
            "count in another form: read once",
            "fusedopt",
            "mirror.counted.copy_(mirror.kept.detach().reshape(()))",
            "pass",
            "test_drop_in.py::test_step_count_in_another_form_is_used_in_place[cpu-AdamW-shared]",
        ),
        (
            "count in another form: replaced by a private one",
            "fusedopt",
            "        elif value.device == device:\n            entry.mirrors",
            "        elif False:\n            entry.mirrors",
            "test_drop_in.py::test_step_count_in_another_form_is_used_in_place[cpu-AdamW-one element]",
        ),
        (
            "count in another form: may be two parameters'",
            "fusedopt",
            "for mirror in entry.mirrors]",
            "for mirror in ()]",
            "test_drop_in.py::test_one_count_of_two_parameters_is_refused[cpu]",
        ),
        (
            "Adagrad: share_memory shares nothing",
            "fusedopt",
            'self.state[param]["sum"].share_memory_()',
            'self.state[param]["sum"]',
            "test_drop_in.py::test_adagrad_shares_its_sums_before_the_first_step[cpu]",
        ),
        (
            "Adagrad: share_memory starts from 0",
            "fusedopt",
            "state.update(states.first(self.rule, group, kept, param))",
            "shape = self.rule.state_shape(group, kept, param.shape)\n"
            "                state.update(states.holding(self.rule, kept, param, shape, 0.0))",
            "test_drop_in.py::test_adagrad_shares_its_sums_before_the_first_step[cpu]",
        ),
        (
            "SAM: a wrapper ascends by itself",
            "fusedopt",
            "                self._ascent.ascended = active if coef is not None else []",
            "                self._ascent = Ascent(ascended=active)",
            "test_drop_in.py::test_wrapper_with_a_class_derived_from_sam[cpu-AdamW-True]",
        ),
        (
            "SAM: no class may be derived from one of its instances'",
            "fusedopt",
            'elif not hasattr(cls, "_base"):',
            "else:",
            "test_drop_in.py::test_wrapper_with_a_class_derived_from_sam[cpu-AdamW-True]",
        ),
        (
            "SAM: a scaler that skips leaves the weights away",
            "fusedopt",
            "return self._ascent.ascended is not None or ",
            "return False or ",
            "test_sam.py::test_grad_scaler[cpu-False-None]",
        ),
        (
            "SAM: a copy of a derived class loses it",
            "fusedopt",
            "if type(self) is not _around(self._base):",
            "if False:",
            "test_drop_in.py::test_copy_of_an_optimizer_of_a_derived_class_keeps_the_class[cpu]",
        ),
        (
            "SAM: rho is lost when it is rebuilt",
            "fusedopt",
            'self.defaults = {"rho": rho,',
            'self.defaults = {"rho": 0.05,',
            "test_drop_in.py::test_sam_is_rebuilt_from_its_class_and_defaults[cpu]",
        ),
        (
            "AMP: a copy forgets who unscales",
            "fusedopt",
            'for name in ("_record", "_step_supports_amp_scaling") if',
            'for name in ("_record",) if',
            "test_drop_in.py::test_copy_of_an_optimizer_of_a_derived_class_keeps_the_class[cpu]",
        ),
        (
            "AMP: every step unscales",
            "fusedopt",
            'if self.defaults.get("fused"):',
            "if True:",
            "test_torch_contract.py::test_is_an_optimizer_with_an_ordinary_step[cpu-AdamW]",
        ),
        (
            "AMP: shards of FSDP1 are unscaled one by one",
            "fusedopt",
            "_refuse_fsdp1(plan, INFINITIES_OF_SHARD)",
            "pass",
            "test_dtensor.py::test_over_processes[shards_of_fsdp1_skip_together_or_the_step_refuses_to_unscale]",
        ),
        (
            "stall: nobody looks",
            "fusedopt",
            "            stalls.look(plan, record)\n",
            "            pass\n",
            "test_drop_in.py::test_parameter_whose_updates_round_to_nothing_is_named_once[cpu-AdamW-torch.bfloat16-0.0001]",
        ),
        (
            "stall: warned of again",
            "fusedopt",
            "self.next_look, self.samples = math.inf, {}  # one warning is enough",
            "pass",
            "test_drop_in.py::test_parameter_whose_updates_round_to_nothing_is_named_once[cpu-AdamW-torch.bfloat16-0.0001]",
        ),
        (
            "stall: an lr of 0 counts",
            "fusedopt",
            "or not (is_elsewhere(lr) or lr != 0)",
            "or False",
            "test_drop_in.py::test_no_stall_is_seen_where_there_is_none[cpu-lr of 0]",
        ),
        (
            "stall: a gradient of 0 counts",
            "fusedopt",
            "(grads != 0) & grads.isfinite()",
            "grads.isfinite()",
            "test_drop_in.py::test_no_stall_is_seen_where_there_is_none[cpu-zero gradient]",
        ),
        (
            "stall: one look is all",
            "fusedopt",
            "self.next_look * FACTOR",
            "math.inf",
            "test_drop_in.py::test_stall_that_begins_later_is_seen_later[cpu]",
        ),
        (
            "stall: float16 is not watched",
            "fusedopt",
            "in (torch.bfloat16, torch.float16)",
            "in (torch.bfloat16,)",
            "test_drop_in.py::test_parameter_whose_updates_round_to_nothing_is_named_once[cpu-AdamW-torch.float16-1e-05]",
        ),
        (
            "stall: a few elements speak for all",
            "fusedopt",
            "SAMPLES = 1024",
            "SAMPLES = 2",
            "test_drop_in.py::test_no_stall_is_seen_where_there_is_none[cpu-one element moves]",
        ),
        (
            "stall: SAM's steps are not looked at",
            "fusedopt",
            "step(request, self._record, self._stalls, whole,",
            "step(request, self._record, type(self._stalls)(), whole,",
            "test_drop_in.py::test_stall_is_seen_under_sam[cpu-False]",
        ),
        (
            "stall: a skipped step is looked at",
            "fusedopt",
            "if is_updated and stalls.num_steps >=",
            "if stalls.num_steps >=",
            "test_drop_in.py::test_stall_is_seen_under_sam[cpu-True]",
        ),
        (
            "import: the compiler is imported too",
            "fusedopt",
            "    from torch._compile import _disable_dynamo as not_compiled",
            "    not_compiled = torch.compiler.disable",
            "test_drop_in.py::test_import_is_quick_and_imports_no_compiler[cpu]",
        ),
        (
            "stall: a parameter that swings is taken for still",
            "fusedopt",
            "stalls.num_steps >= stalls.next_look - 1:",
            "stalls.num_steps >= stalls.next_look:",
            "test_drop_in.py::test_parameter_that_swings_is_no_stall[cpu-3]",
        ),
        (
            "stall: the sample is one column",
            "fusedopt",
            "while stride > 1 and math.gcd(stride, shape[-1]) > 1:",
            "while False:",
            "test_drop_in.py::test_sample_is_small_and_of_every_column[cpu]",
        ),
        (
            "stall: a warning that is an error comes after the update",
            "fusedopt",
            "                self.answers.append(_compared(plan, entries, known, sample))",
            "                self.answers.append(_compared(plan, entries, known, sample))\n                self.report()",
            "test_drop_in.py::test_stall_that_is_an_error_leaves_the_step_undone[cpu]",
        ),
        (
            "stall: a replaced parameter is compared",
            "fusedopt",
            "self.shapes == shapes",
            "True",
            "test_drop_in.py::test_parameter_that_is_given_another_form_is_no_stall[cpu]",
        ),
        (
            "options: a key that repeats the own value is refused",
            "fusedopt",
            "if name not in whole or group[name] != whole[name]:",
            "if True:",
            "test_drop_in.py::test_groups_filled_from_defaults_are_taken[cpu]",
        ),
        (
            "options: a key that repeats the own value stays",
            "fusedopt",
            "        del group[name]\n",
            "        pass\n",
            "test_drop_in.py::test_groups_filled_from_defaults_are_taken[cpu]",
        ),
        (
            "options: a refused group keeps them",
            "fusedopt",
            "        finally:  # torch gives",
            "        except StopIteration:  # torch gives",
            "test_drop_in.py::test_refused_group_is_left_as_it_was_given[cpu]",
        ),
        (
            "nesterov read by every rule",
            "fusedopt",
            'if "nesterov" in rule.hyper and group["nesterov"] and not (group',
            'if group.get("nesterov") and not (group',
            "test_drop_in.py::test_another_rules_switch_in_a_group_is_a_key_as_any_other[cpu-AdamW]",
        ),
        (
            "checkpoint: groups in another order keep the options of the place",
            "fusedopt",
            "return [saved_groups[theirs.index(names)] for names in ours]",
            "return saved_groups",
            "test_checkpoints.py::test_states_go_by_name_where_the_order_is_another[cpu-AdamW]",
        ),
        (
            "checkpoint: a parameter of another group accepted",
            "fusedopt",
            "            if moved:\n",
            "            if False:\n",
            "test_checkpoints.py::test_parameter_that_changed_its_group_is_refused[cpu]",
        ),
        (
            "checkpoint: another library's negative gradient accepted",
            "fusedopt",
            '            and "previous_grad" not in saved_state[saved_id]',
            "            and True",
            "test_checkpoints.py::test_negative_gradient_of_another_librarys_adan_is_not_taken_for_ours[cpu]",
        ),
        (
            "checkpoint: an entry of a frozen parameter is taken for a broken state",
            "fusedopt",
            "in [] if is_frozen else [*rule.counts_kept, *stored]:",
            "in [*rule.counts_kept, *stored]:",
            "test_checkpoints.py::test_entries_of_the_users_own_are_no_parameters_and_no_other_rules[cpu-AdamW]",
        ),
        (
            "checkpoint: missing max_exp_avg_sq accepted",
            "fusedopt",
            "if kept and (rule.keeps_step or kept.option is None)]",
            "if kept and kept.option is None]",
            "test_checkpoints.py::test_checkpoint_that_does_not_fit_is_refused_whole[cpu-AdamW-missing_optional_state]",
        ),
        (
            "FSDP1: clipped by the norm of one shard",
            "fusedopt",
            "        _refuse_fsdp1(plan, NORM_OF_SHARD)\n    is_weighted = plan.groups.is_weighted\n    norms",
            "        pass\n    is_weighted = plan.groups.is_weighted\n    norms",
            "test_dtensor.py::test_over_processes[shards_of_fsdp1_skip_together_or_the_step_refuses_to_unscale]",
        ),
        (
            "recipe: cannot be copied",
            "fusedopt",
            "    def __getnewargs__(self)",
            "    def _getnewargs(self)",
            "test_recipes.py::test_recipe_can_be_copied",
        ),
        (
            "show: a formula without the functions that it calls",
            "fusedopt",
            "wanted += [other for other in known",
            "[other for other in known",
            "test_show.py::test_formulas_are_what_the_files_hold[lamb]",
        ),
        (
            "show: the end of the longest formula is lost",
            "fusedopt",
            'itertools.zip_longest(*columns, fillvalue="")',
            "zip(*columns)",
            "test_show.py::test_wide_terminal_shows_the_formulas_side_by_side",
        ),
        (
            "show: wheels without the headers",
            "pyproject.toml",
            '"fusedopt.headers", ',
            "",
            "test_build.py::test_wheel_made_from_the_sdist_has_every_part",
        ),
        (
            "options: not written into signatures",
            "fusedopt",
            "        describe(cls)\n",
            "",
            "test_options.py::test_signature_is_written_out",
        ),
        (
            "options: their types are no hints",
            "fusedopt",
            "            constructor.__annotations__.update(get_type_hints(kind))\n",
            "",
            "test_options.py::test_signature_ends_with_the_options_of_the_list[Lion]",
        ),
        (
            "options: in a docstring before the arguments of the class",
            "fusedopt",
            "docstring[: section.end()], *entries",
            "*entries, docstring[: section.end()]",
            "test_options.py::test_help_explains_every_option_once[Lion]",
        ),
        (
            "options: unknown ones are dropped",
            "fusedopt",
            "        if name not in known:\n            takers",
            "        if False:\n            takers",
            "test_options.py::test_unknown_keyword_is_pythons_own_error[max_norm-Lion]",
        ),
        (
            "options: a class without sparse gradients takes sparse",
            "fusedopt",
            "SparseOptions if takes_sparse else OptimizerOptions",
            "SparseOptions",
            "test_options.py::test_unknown_keyword_is_pythons_own_error[sparse-Lion]",
        ),
    ]
]


# ---- copies of the project ---------------------------------------------------------------------------------------

# These take only names and sizes from what they include, and need not be compiled again for a change in it.
INDIFFERENT = {"csrc/bindings.cpp": ("csrc/rules/", "csrc/storage.h")}
# A failure by one of these says that the mutant is not a program, not that a test noticed it.
NOT_A_PROGRAM = (
    "SyntaxError",
    "IndentationError",
    "NameError",
    "UnboundLocalError",
    "ImportError",
    "ModuleNotFoundError",
)


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "pytest", "hypothesis"])


def run(folder: Path, *command: str) -> str:
    """What a command prints; it must succeed."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "MAX_JOBS": "1", "FUSEDOPT_BUILD_CUDA": "0"}
    result = subprocess.run(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if result.returncode != 0:
        raise ListError(f"{shlex.join(command)}\n{result.stdout[-3000:]}")
    return result.stdout


def project_files(others: bool = True) -> list[str]:
    """The files that git tracks, and the others that it would add."""
    options = ["--cached", *(["--others", "--exclude-standard"] if others else [])]
    listed = subprocess.run(["git", "ls-files", "-z", *options], cwd=ROOT, capture_output=True, check=True, text=True)
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def make_copy(folder: Path) -> None:
    """The project's files as they are now, in a checkout of their own: there are tests that ask git."""
    for name in project_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    # In a hook, git's variables name the repository that the hook belongs to.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    for command in (["init", "--quiet"], ["add", "--all"]):
        subprocess.run(["git", *command], cwd=folder, env=environment, check=True)


def build(folder: Path) -> list[list[str]]:
    """Builds the extension; returns the commands of compilers and linkers that it printed, with relative paths."""
    output = run(folder, sys.executable, "setup.py", "build_ext", "--inplace")
    commands = [shlex.split(line.replace(f"{folder}/", "")) for line in output.splitlines() if " -o " in line]
    isa = run(folder, sys.executable, "-c", "import fusedopt; print(fusedopt._C.isa())").strip()
    made = [command for command in commands if (folder / command[command.index("-o") + 1]).is_file()]  # and no probe
    return [command for command in made if not is_of_another_isa(folder, command, isa)]


def sources(command: list[str]) -> list[str]:
    return [word for word in command if word.endswith((".cpp", ".cu"))]


def is_of_another_isa(folder: Path, command: list[str], isa: str) -> bool:
    """Whether it compiles loops that this machine does not use."""
    return any('#include "kernels.inl"' in (folder / s).read_text() and Path(s).stem != isa for s in sources(command))


def includes(folder: Path, source: str, file: str) -> bool:
    """Whether a source is, or includes, a file, directly or not."""
    if source == file:
        return True
    names = re.findall(r'^#include "([^"]+)"', (folder / source).read_text(), re.M)
    paths = (os.path.normpath(Path(source).parent / name) for name in names)
    return any(includes(folder, path, file) for path in paths if (folder / path).is_file())


def rebuild(folder: Path, commands: list[list[str]], file: str) -> None:
    """Compiles what depends on one file, and links."""
    changed = set()
    for command in commands:
        target = command[command.index("-o") + 1]
        needs = any(
            includes(folder, s, file) and not file.startswith(INDIFFERENT.get(s, ("/",))) for s in sources(command)
        )
        if needs or changed & set(command):
            run(folder, *command)
            changed.add(target)
            if target.endswith(".so") and not target.startswith("fusedopt/"):
                shutil.copy2(folder / target, folder / "fusedopt" / Path(target).name)
    if not changed:
        raise ListError(f"nothing is compiled from {file}")


def pytest_in(folder: Path, arguments: list[str], output: Path) -> None:
    """In a process of its own, forked where torch is imported already: that takes longer than most tests."""
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    os.environ.update(PYTHONPATH=str(folder), COLUMNS="1000")  # no line of the summary is cut
    sys.path[:] = [str(folder), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
    import pytest

    sys.exit(pytest.main(arguments))


def failed_test(folder: Path, tests: Iterable[str]) -> tuple[str, str] | None:
    """Runs tests up to the first that fails: its node id and why, or None if all pass."""
    options = ["-x", "-q", "-rf", "--tb=short", "-p", "no:cacheprovider"]
    output = folder / "output"
    process = FORKS.Process(target=pytest_in, args=(folder, options + [f"tests/{test}" for test in tests], output))
    process.start()
    process.join(600)
    if process.is_alive():
        process.kill()
        raise ListError("no end after 600 s")
    text = output.read_text(errors="replace")
    if process.exitcode == 0 and re.search(r"^\d+ passed", text, re.M):  # and not skipped
        return None
    found = re.search(r"^FAILED tests/(.+?)(?: - (.*))?$", text, re.M)
    if process.exitcode != 1 or found is None or (found[2] or "").startswith(NOT_A_PROGRAM):
        raise ListError(f"pytest ended with {process.exitcode}\n{text[-3000:]}")
    return found[1], found[2] or ""


def try_out(mutant: Mutant, built: Path, commands: list[list[str]]) -> tuple[str, str, float, float]:
    """(outcome, the test that failed or what went wrong, seconds of building, seconds of testing)"""
    began = time.perf_counter()
    compiled = began
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "copy")
        shutil.copytree(built, folder, symlinks=True)
        try:
            file = mutant.apply(folder)
            if file.startswith("csrc/") and not file.startswith("csrc/cuda/"):  # these the tests compile
                rebuild(folder, commands, file)
            compiled = time.perf_counter()
            failed = failed_test(folder, [mutant.test])
            outcome = ("SURVIVED", mutant.test) if failed is None else ("killed", failed[0])
        except ListError as error:
            outcome = "ERROR", str(error)
    return *outcome, compiled - began, time.perf_counter() - compiled


# ---- the command -------------------------------------------------------------------------------------------------


def main() -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    parser = argparse.ArgumentParser(prog="mutants", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="only mutants whose name contains one of these words")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="mutants at a time (default: %(default)s)"
    )
    arguments = parser.parse_args()
    chosen = [
        m for m in MUTANTS if not arguments.names or any(name.lower() in m.name.lower() for name in arguments.names)
    ]
    if not chosen:
        sys.exit("no mutant has such a name")

    console = Console(highlight=False)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as parent:
        built = Path(parent, "copy")
        make_copy(built)
        try:
            commands = build(built)
            failed = failed_test(built, sorted({mutant.test for mutant in chosen}))
        except ListError as error:
            sys.exit(f"without a mutant: {error}")
        if failed:
            sys.exit(f"without a mutant, {failed[0]} fails: {failed[1]}")
        console.print(f"all tests pass without a mutant ({time.perf_counter() - began:.0f} s)")

        results = []
        with ThreadPoolExecutor(arguments.jobs) as pool:
            for mutant, result in zip(chosen, pool.map(lambda m: try_out(m, built, commands), chosen), strict=True):
                console.print(f"{result[0]:8}  {mutant.name}", markup=False)
                results.append((mutant, result))

    table = Table("mutant", "file", "outcome", Column("by", no_wrap=True), "build s", "test s")
    for mutant, (outcome, by, build_seconds, test_seconds) in results:
        cells = mutant.name, mutant.file, outcome, by.split("\n")[0], f"{build_seconds:.1f}", f"{test_seconds:.1f}"
        table.add_row(*map(escape, cells), style="" if outcome == "killed" else "bold red")
    console.print(table)
    for mutant, (outcome, by, *_) in results:
        if outcome == "ERROR":
            console.print(f"\n{mutant.name}: {by}", markup=False)
    killed = sum(outcome == "killed" for _, (outcome, *_) in results)
    console.print(f"{killed} of {len(results)} mutants killed in {time.perf_counter() - began:.0f} s")
    sys.exit(killed != len(results))


if __name__ == "__main__":
    main()

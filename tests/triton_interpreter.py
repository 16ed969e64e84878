"""Triton's interpreter, which runs the kernels on tensors in host memory, made fit for tests: imported before any kernel.

Two things of the interpreter are put right, neither of them ours: it converts between float32 and bfloat16 wrongly (a carry
out of the mantissa is lost, ties go away from even, subnormals change), and it searches all of triton.language at every call
of a device function.
"""

import functools
import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

convert_float = interpreter._convert_float
patch_lang = interpreter._patch_lang


def convert_float_as_hardware(values, from_dtype, to_dtype, rounding):
    if from_dtype == tl.float32 and to_dtype == tl.bfloat16:
        floats = torch.from_numpy(np.ascontiguousarray(values).view(np.float32))
        return floats.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16).reshape(values.shape)
    if from_dtype == tl.bfloat16 and to_dtype == tl.float32:
        return (np.ascontiguousarray(values).view(np.uint16).astype(np.uint32) << 16).reshape(values.shape)
    return convert_float(values, from_dtype, to_dtype, rounding)


class Scope:
    """triton.language stays patched from the first kernel on: no compiled kernel runs in this process."""

    def restore(self):
        pass


@functools.cache
def patch_once(globals_id, function):
    patch_lang(function)
    return Scope()


np.seterr(all="ignore")  # a GPU does not warn of an overflow either
interpreter._convert_float = convert_float_as_hardware
interpreter._patch_lang = lambda function: patch_once(id(function.__globals__), function)


def move_powers(monkeypatch, direction):
    """Moves every power by one unit in the last place, down (-1) or up (1), until the end of the test."""
    create_exp2 = interpreter.InterpreterBuilder.create_exp2

    def moved(self, exponent):
        power = create_exp2(self, exponent)
        assert power.data.dtype == np.float64, "the rules take powers in float64"
        power.data = np.nextafter(power.data, direction * np.inf)
        return power

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_exp2", moved)

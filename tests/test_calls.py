"""How much Python a steady step takes: how many calls of fusedopt's functions, and how often control moves to another file.

A reader of `step` follows the same path as the interpreter. Few calls and few changes of file mean that each file does its part
of the step in one piece.

Both numbers are counted with `sys.setprofile`, from the first call into the package to the return from it:

- Calls: "call" events of functions whose file belongs to the package. Resuming a generator counts, and so does a comprehension
  where this Python makes a frame for it (list comprehensions have none from Python 3.12 on).
- Changes of file: how often control, after a call or a return, is in another file of the package than before. Entering the
  package is the first change. Frames of other code, such as torch's wrappers of `step` and contextlib, are left out: while they
  run, control counts as being in the file that called them.

Example: `step` in a.py calls two functions of b.py. These are 3 calls and 5 changes: into a.py, to b.py, back, to b.py, back.
"""

import os
import sys

import pytest
from helpers import make_params, only_on, set_grads

import fusedopt

PACKAGE = os.path.dirname(fusedopt.__file__) + os.sep
MAX_CALLS, MAX_CHANGES = 28, 12


class Trace:
    """The calls of functions in a folder, and the changes of file among them, while something runs."""

    def __init__(self, folder: str):
        self.num_calls = self.num_changes = 0
        self.lines = []  # for each call: the number of changes so far, the file, and the function
        self._folder, self._stack, self._file = folder, [], None

    def run(self, function) -> None:
        before = sys.getprofile()
        sys.setprofile(self._event)
        try:
            function()
        finally:
            sys.setprofile(before)

    def _event(self, frame, event, _) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(self._folder):
            return
        if event == "call":
            self._stack.append(code.co_filename)
        else:
            self._stack.pop()
        if self._stack and self._stack[-1] != self._file:
            self._file = self._stack[-1]
            self.num_changes += 1
        if event == "call":
            self.num_calls += 1
            name = "  " * len(self._stack) + getattr(code, "co_qualname", code.co_name)
            self.lines.append(f"{self.num_changes:3} {code.co_filename.removeprefix(self._folder):20}{name}")


@only_on("cpu", why="other backends launch kernels, each in its own way")
@pytest.mark.parametrize("max_grad_norm", [1.0, None], ids=["clipped", "not clipped"])
def test_steady_step_takes_few_calls_and_changes_of_file(on_backend, max_grad_norm):
    params = make_params([(100,)] * 10)
    optimizer = fusedopt.AdamW(params, lr=1e-3, max_grad_norm=max_grad_norm)
    set_grads(params, 0)
    for _ in range(3):
        optimizer.step()
    trace = Trace(PACKAGE)
    trace.run(optimizer.step)
    if not (0 < trace.num_calls <= MAX_CALLS and trace.num_changes <= MAX_CHANGES):
        pytest.fail(
            f"{trace.num_calls} calls (at most {MAX_CALLS}), {trace.num_changes} changes of file (at most {MAX_CHANGES}); "
            "each call, after the number of changes so far:\n" + "\n".join(trace.lines),
            pytrace=False,
        )


def test_trace_counts_as_its_description_says():
    functions = {}
    exec(compile("def part(): pass", "/package/b.py", "exec"), functions)
    exec(compile("def step(): part(); part()", "/package/a.py", "exec"), functions)
    trace = Trace("/package/")
    trace.run(functions["step"])
    assert (trace.num_calls, trace.num_changes) == (3, 5)

"""Options of every class: their one list is what signatures, help(), type hints, defaults and errors show."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import pydoc
import re
import shutil
import typing
from pathlib import Path

import pytest
import torch
from helpers import SPECS, every_class, in_a_new_process, make_params
from typing_extensions import Unpack

import fusedopt
from fusedopt.options import OptimizerOptions, SparseOptions, options_of

ROOT = Path(__file__).parent.parent
KEYWORD_ONLY, VAR_KEYWORD = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD
OF_EVERY_CLASS = (
    "max_grad_norm: 'float | None' = None, nonfinite: 'Nonfinite' = 'propagate', backend: 'Backend | None' = None"
)
SIGNATURES = {
    "AdamW": "params: 'Params', lr: 'float | Tensor' = 0.001, betas: 'Betas' = (0.9, 0.999), eps: 'float' = 1e-08, "
    "weight_decay: 'float' = 0.01, amsgrad: 'bool' = False, *, maximize: 'bool' = False, foreach: 'bool | None' = None, "
    "capturable: 'bool' = False, differentiable: 'bool' = False, fused: 'bool | None' = None, "
    "decoupled_weight_decay: 'bool' = True, bias_correction: 'bool' = True, "
    f"{OF_EVERY_CLASS}, sparse: 'Sparse | None' = None",
    "Lion": "params: 'Params', lr: 'float | Tensor' = 0.0001, betas: 'Betas' = (0.9, 0.99), weight_decay: 'float' = 0.0, *, "
    "maximize: 'bool' = False, foreach: 'bool | None' = None, capturable: 'bool' = False, "
    f"differentiable: 'bool' = False, fused: 'bool | None' = None, {OF_EVERY_CLASS}",
}


def options_taken(spec):
    return options_of(SparseOptions if spec.rule.takes_sparse else OptimizerOptions)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_written_out(name):
    cls = getattr(fusedopt, name)
    assert str(inspect.signature(cls)) == f"({SIGNATURES[name]})"
    assert str(inspect.signature(cls.__init__)) == f"(self, {SIGNATURES[name]})"
    assert str(inspect.signature(cls(make_params()).__init__)) == f"({SIGNATURES[name]})"
    assert f"{name}({SIGNATURES[name]})" in re.sub(r"\s+", " ", pydoc.plain(pydoc.render_doc(cls))).replace("( ", "(")


@every_class
def test_signature_ends_with_the_options_of_the_list(spec):
    constructor = spec.cls.__init__
    parameters = inspect.signature(spec.cls).parameters
    hints = typing.get_type_hints(constructor)
    for name, parameter in [*parameters.items()][-len(options_taken(spec)) :]:
        assert parameter.kind is KEYWORD_ONLY
        assert parameter.default == options_taken(spec)[name].default
        assert (
            eval(parameter.annotation, vars(fusedopt.types))
            == hints[name]
            == typing.get_type_hints(SparseOptions)[name]
        )
    assert [*parameters][-len(options_taken(spec)) :] == [*options_taken(spec)]
    # And all that comes before is what the constructor itself has.
    code = constructor.__code__
    own = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    assert [*parameters] == [*own, *options_taken(spec)] and hints.keys() <= parameters.keys()


@every_class
def test_help_explains_every_option_once(spec):
    arguments = re.search(r"^ *Args:.*?(\n\s*\n|\Z)", inspect.getdoc(spec.cls), re.M | re.S).group()
    words = " ".join(arguments.split())
    for name, option in options_taken(spec).items():
        assert len(re.findall(rf"^ +{name}: ", arguments, re.M)) == 1
        assert words.count(f"{name}: {option.meaning}") == 1
    assert max(map(len, spec.cls.__doc__.splitlines())) <= 128
    assert "sparse" in options_taken(spec) or not re.search(r"^ +sparse: ", arguments, re.M)


@every_class
@pytest.mark.parametrize("name", ["max_norm", "sparse", "options"])
def test_unknown_keyword_is_pythons_own_error(spec, name):
    if name in options_taken(spec):
        return
    message = rf"^{spec.name}\.__init__\(\) got an unexpected keyword argument '{name}'$"
    with pytest.raises(TypeError, match=message):
        spec.make(make_params(), **{name: None})
    with pytest.raises(TypeError, match=message):
        fusedopt.SAM(make_params(), spec.cls, **{name: None})
    derived = type("Derived", (spec.cls,), {})
    with pytest.raises(TypeError, match=message):
        derived(make_params(), **{name: None})


def test_keyword_that_a_recipes_class_does_not_take_is_refused_with_those_it_takes():
    with pytest.raises(TypeError, match=r"has no setting 'sparse'; it has .*backend.*max_grad_norm.*nonfinite"):
        fusedopt.recipes.rnn(torch.nn.LSTM(2, 2), 10, optimizer=fusedopt.RMSprop, lr=1e-3, sparse="lazy")


class WithKeywords(fusedopt.AdamW):
    """As AdamW.

    Args:
        warmup: ignored.
    """

    def __init__(self, params, warmup=0, **options):
        super().__init__(params, **options)


class WithOptions(fusedopt.Adan):
    """As Adan.

    Args:
        params: as for Adan."""

    def __init__(self, params, slow: bool = False, **options: Unpack[OptimizerOptions]):
        super().__init__(params, **options)


def test_class_of_a_user_keeps_its_signature_and_docstring():
    assert str(inspect.signature(WithKeywords)) == "(params, warmup=0, **options)"
    assert inspect.getdoc(WithKeywords) == "As AdamW.\n\nArgs:\n    warmup: ignored."
    assert WithKeywords(make_params(), lr=0.5, max_grad_norm=1.0).max_grad_norm == 1.0
    assert inspect.signature(type("Derived", (fusedopt.Lion,), {})) == inspect.signature(fusedopt.Lion)


def test_class_of_a_user_that_takes_the_options_shows_them():
    assert str(inspect.signature(WithOptions)) == f"(params, slow: 'bool' = False, *, {OF_EVERY_CLASS})"
    assert inspect.getdoc(WithOptions).endswith('``"auto"``.')
    with pytest.raises(TypeError, match=r"^WithOptions\.__init__\(\) got an unexpected keyword argument 'foo'$"):
        WithOptions(make_params(), foo=1.0)


@every_class
def test_wrappers_class_takes_the_options(spec):
    """As accelerators derive them: from a wrapper and the class, with what the wrapper's own class holds."""

    class Wrapper:
        def __init__(self, params, **options):
            super().__init__(params, **options)

    for bases, namespace in [((Wrapper, spec.cls), {}), ((spec.cls,), dict(spec.cls.__dict__))]:
        derived = type(spec.name, bases, namespace)
        optimizer = derived(make_params(), max_grad_norm=0.5, nonfinite="skip")
        assert (optimizer.max_grad_norm, optimizer.nonfinite) == (0.5, "skip")
    assert derived.__doc__ == spec.cls.__doc__ and inspect.signature(derived) == inspect.signature(spec.cls)


@every_class
def test_options_survive_copies_and_are_rebuilt_from_defaults(spec):
    given = {"max_grad_norm": 0.5, "nonfinite": "skip", "backend": "reference", "sparse": "lazy"}
    given = {name: value for name, value in given.items() if name in options_taken(spec)}
    for make in (spec.make, functools.partial(fusedopt.SAM, base=spec.cls)):
        if "sparse" in given and make is not spec.make:
            given["sparse"] = None
        optimizer = make(make_params(), **given)
        for twin in (
            copy.deepcopy(optimizer),
            pickle.loads(pickle.dumps(optimizer)),
            type(optimizer)(make_params(), **optimizer.defaults),
        ):
            assert {name: getattr(twin, name) for name in given} == given


def test_one_more_option_is_one_insertion(tmp_path):
    """In a copy of the package. Its use is all that would be missing."""
    shutil.copytree(ROOT / "fusedopt", tmp_path / "fusedopt", ignore=shutil.ignore_patterns("kernels", "__pycache__"))
    path = tmp_path / "fusedopt/options.py"
    anchor = "\n\n\nclass SparseOptions("
    assert path.read_text().count(anchor) == 1
    insertion = '\n    colour: Annotated["str", Option("red", "the colour of the step.")]'
    path.write_text(path.read_text().replace(anchor, insertion + anchor))
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import inspect, fusedopt, torch
assert fusedopt.__file__.startswith({str(tmp_path)!r})
params = [torch.nn.Parameter(torch.ones(2))]
for name in {[spec.name for spec in SPECS]}:
    cls = getattr(fusedopt, name)
    parameter = inspect.signature(cls).parameters["colour"]
    assert (parameter.default, parameter.annotation) == ("red", "str")
    assert cls.__doc__.count("colour: the colour of the step.") == 1
    assert cls(params).defaults["colour"] == "red"
    assert cls(params, colour="blue").defaults["colour"] == "blue"
    assert "All groups" in repr(cls(params)) and "    colour: red" in repr(cls(params))
    assert fusedopt.SAM(params, cls, colour="blue").defaults["colour"] == "blue"
    assert "colour" not in cls(params).param_groups[0]
    try:
        cls([{{"params": params, "colour": "blue"}}])
    except ValueError as error:
        assert "'colour' applies to the whole optimizer" in str(error), error
    else:
        raise AssertionError
    print(name)
recipe = fusedopt.recipes.rnn(torch.nn.LSTM(2, 2), 10, colour="blue")
assert recipe.optimizer.defaults["colour"] == "blue"
"""
    printed = in_a_new_process(code, FUSEDOPT_BACKEND="reference")
    assert printed.split() == [spec.name for spec in SPECS]

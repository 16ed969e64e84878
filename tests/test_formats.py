"""Storage formats: the reference codecs, states in any of them on every backend, and what checkpoints hold then."""

import contextlib
import copy

import pytest
import torch
from helpers import assert_same_bits, every_class, make_params, nothing_changes, only_on, randn, set_grads, train

import fusedopt
from fusedopt import reference, states
from fusedopt.formats import FORMATS, Format, plain_format, random_bits

pytestmark = pytest.mark.usefixtures("on_backend")
SHAPES = ((13, 7), (1021,), (), (5, 3, 3))


@pytest.fixture
def stored_as(monkeypatch):
    """Chooses the format of all states of parameters that compute in float32."""

    def choose(format: Format) -> None:
        before = states.format_of
        monkeypatch.setattr(
            states,
            "format_of",
            lambda rule, kept, param: format if param.dtype != torch.float64 else before(rule, kept, param),
        )

    return choose


@contextlib.contextmanager
def known(format: Format):
    """The table has one row more, which the reference backend can use."""
    FORMATS[format.name] = format
    try:
        yield
    finally:
        del FORMATS[format.name]


# ---- the reference codecs ----------------------------------------------------------------------------------------


def halves_encode(values, random):
    """float32 in two halves; the high one rounded half up."""
    bits = values.view(torch.int32).long()
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16), (bits - (high << 16)).to(torch.int16)


def halves_decode(stored, aux):
    return ((stored.long() << 16) + aux.long()).to(torch.int32).view(torch.float32)


# Of each shape that a codec can have, beside the plain ones; no engine but the reference has these.
SPLIT = Format("split", torch.int16, halves_decode, halves_encode, aux_dtype=torch.int16, per_aux=1)


@only_on("cpu", "no backend takes part")
@pytest.mark.parametrize("format", [*FORMATS.values()], ids=lambda format: format.name)
def test_what_a_codec_decodes_it_encodes_again(format):
    values = format.decode(*format.encode(randn((1021,)).to(format.compute_dtype), None))
    assert values.dtype == format.compute_dtype
    assert_same_bits([format.decode(*format.encode(values, None))], [values])


@only_on("cpu", "no backend takes part")
def test_random_bits_depend_on_seed_step_and_element_alone():
    """The numbers are those of csrc/storage.h; a change of them is a change of every run that draws them."""
    assert random_bits(3, 5, 4).tolist() == [433443157, 2540452265, 4015970547, 3456330678]
    many = random_bits(1, 1, 100_000)
    assert many.min() >= 0 and many.max() < 2**32 and many.unique().numel() > 99_990
    assert abs(float(many.double().mean()) / 2**31 - 1) < 0.01
    for other in (random_bits(2, 1, 100_000), random_bits(1, 2, 100_000)):
        assert (many == other).sum() < 10
        correlation = torch.corrcoef(torch.stack([many.double(), other.double()]))[0, 1]
        assert abs(float(correlation)) < 0.02


# ---- states in other formats -------------------------------------------------------------------------------------


SIZES = (1, 31, 32, 33, 255, 257, 4096 + 5, 2 * 32768 + 37, 0)


@pytest.mark.parametrize("name", [row.name for row in FORMATS.values() if row.compute_dtype == torch.float32])
def test_every_format_stores_a_state_as_its_reference_codec_does(name, on_backend, stored_as, threads):
    """One step of Lion after another, each from what the codec says must be there. A new row of the table is tested here."""
    format = FORMATS[name]
    stored_as(format)
    params = make_params([(size,) for size in SIZES])
    optimizer = fusedopt.Lion(params, lr=0.01)
    kept = optimizer.rule.states[0]
    differences, num_codes = 0, 0
    for step in range(3):
        set_grads(params, step)
        expected = []
        for seed, param in enumerate(params):
            held = [optimizer.state[param][part] for part in states.names_in(kept, format)] if step else None
            moment = format.decode(*(held if format.per_aux else [*held, None])) if step else torch.zeros(param.shape)
            state = {"exp_avg": moment}
            options = dict(lr=0.01, betas=(0.9, 0.99), weight_decay=0.0)
            new = reference.lion(param.detach().clone(), param.grad, state, step + 1, **options)
            random = random_bits(seed, step + 1, param.numel()) if format.takes_random else None
            expected.append((new, *format.encode(state["exp_avg"], random)))
        threads(1 + step % 2)
        optimizer.step()
        for param, (new, codes, aux) in zip(params, expected, strict=True):
            torch.testing.assert_close(param.detach(), new, rtol=1e-6, atol=1e-7)
            found, *found_aux = (optimizer.state[param][part] for part in states.names_in(kept, format))
            assert found.dtype == format.dtype
            if format.per_aux:
                torch.testing.assert_close(found_aux[0], aux, rtol=1e-6, atol=0)
            unit = 1 if not format.is_plain else 2 * torch.finfo(format.dtype).eps
            torch.testing.assert_close(found.double(), codes.double(), rtol=0 if unit == 1 else unit, atol=unit)
            differences += int((found != codes).sum())
            num_codes += param.numel()
    # A last bit of float32 may tip the rounding of a code.
    assert differences <= (0.02 if format.dtype == torch.float32 else 0.001) * num_codes + 1


@every_class
@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float16])
def test_states_in_16_bits_are_the_references(spec, state_dtype, on_backend, stored_as):
    """Every backend rounds what it has computed in float32, once in each step."""
    stored_as(plain_format(state_dtype))
    params, peer_params = make_params(SHAPES), make_params(SHAPES)
    optimizer, peer = spec.make(params), spec.make(peer_params, backend="reference")
    for step in range(3):
        train(optimizer, params, 1, step)
        train(peer, peer_params, 1, step)
        for param, other in zip(params, peer_params, strict=True):
            torch.testing.assert_close(param, other, rtol=1e-2, atol=1e-3)
            for kept in spec.rule.states:
                found, expected = (each.state[of].get(kept.name) for each, of in ((optimizer, param), (peer, other)))
                assert (found is None) == (expected is None)
                if found is not None:
                    assert found.dtype == expected.dtype == state_dtype
                    # A last bit of float32 may tip the rounding, and the next step goes on from there.
                    unit = torch.finfo(state_dtype).eps
                    torch.testing.assert_close(found.float(), expected.float(), rtol=2 * unit, atol=2 * unit)


@only_on("reference", "the others have no such codec")
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.complex64])
def test_split_states_are_those_of_float32(stored_as, param_dtype):
    """A format with an auxiliary value for each element: it loses nothing, so that results stay the same."""
    params, plain_params = make_params(SHAPES, param_dtype), make_params(SHAPES, param_dtype)
    plain = fusedopt.AdamW(plain_params)
    train(plain, plain_params, 3)
    stored_as(SPLIT)
    with known(SPLIT):
        optimizer = fusedopt.AdamW(params)
        train(optimizer, params, 3)
        assert_same_bits(params, plain_params)
        saved, expected = optimizer.state_dict(), plain.state_dict()
        assert sorted(optimizer.state[params[0]]) == [
            "exp_avg.split", "exp_avg.split.aux", "exp_avg_sq.split", "exp_avg_sq.split.aux", "step",
        ]  # fmt: skip
        for index, state in expected["state"].items():
            assert saved["state"][index].keys() == state.keys()
            assert_same_bits(list(saved["state"][index].values()), list(state.values()))
        again_params = [torch.nn.Parameter(param.detach().clone()) for param in params]
        again = fusedopt.AdamW(again_params)
        again.load_state_dict(copy.deepcopy(saved))
        for each, of in ((optimizer, params), (again, again_params)):
            train(each, of, 2, 3)
        assert_same_bits(params, again_params)


@only_on("reference", "the others have no such codec")
def test_state_that_is_not_stored_as_its_format_says_is_refused(stored_as):
    """Moments that started anew, with a step count that goes on, would be silently wrong."""
    params = make_params(SHAPES)
    optimizer = fusedopt.AdamW(params)
    message = r"\['params'\]\[1\].*state 'exp_avg.split.aux' "
    with known(SPLIT):
        stored_as(SPLIT)
        train(optimizer, params, 1)
        set_grads(params, 1)
        aux = optimizer.state[params[1]].pop("exp_avg.split.aux")
        with nothing_changes(optimizer), pytest.raises(ValueError, match=message + "is missing"):
            optimizer.step()
        optimizer.state[params[1]]["exp_avg.split.aux"] = torch.zeros(3, dtype=torch.int16)
        with (
            nothing_changes(optimizer),
            pytest.raises(ValueError, match=message + "does not hold 1021 values of int16"),
        ):
            optimizer.step()
        optimizer.state[params[1]]["exp_avg.split.aux"] = aux
        optimizer.step()
        stored_as(plain_format(torch.float32))
        set_grads(params, 2)
        message = r"\['params'\]\[0\].*state 'exp_avg' is stored as 'exp_avg.split', not as 'exp_avg'"
        with nothing_changes(optimizer), pytest.raises(ValueError, match=message):
            optimizer.step()


def bfloat16_at_random(values, random):
    """Rounded up with a probability that is the part left over."""
    if random is None:
        return values.bfloat16(), None
    bits = values.view(torch.int32).long() + (random & 0xFFFF)
    return (bits >> 16 << 16).to(torch.int32).view(torch.float32).bfloat16(), None


RANDOM16 = Format(
    "bfloat16_random", torch.bfloat16, lambda stored, aux: stored.float(), bfloat16_at_random, takes_random=True
)


@only_on("reference", "the others have no such codec")
def test_format_that_rounds_at_random_is_not_taken_for_the_dtype_it_stores(stored_as):
    """Parameters and gradients of that dtype stay what they are, and the mean of what is stored is the value."""
    with known(RANDOM16):
        assert plain_format(torch.bfloat16).name == "bfloat16"
        stored_as(RANDOM16)
        param = torch.nn.Parameter(torch.zeros(100_000))
        optimizer = fusedopt.Lion([param], betas=(0.9, 0.0))  # the state is the gradient
        param.grad = torch.full_like(param, 1.001)
        optimizer.step()
        stored = optimizer.state[param]["exp_avg.bfloat16_random"]
        assert stored.dtype == torch.bfloat16 and sorted(stored.unique().tolist()) == [1.0, 1.0078125]
        assert abs(float(stored.double().mean()) - 1.001) < 5e-5


@pytest.mark.parametrize("load", [torch.optim.AdamW, fusedopt.AdamW], ids=["torch", "fusedopt"])
def test_checkpoint_of_states_in_16_bits_holds_float32(load, on_backend, stored_as):
    """Else torch.optim would take it for granted that moments have the parameter's dtype, or codes for moments."""
    stored_as(plain_format(torch.bfloat16))
    params = make_params(SHAPES)
    optimizer = fusedopt.AdamW(params)
    train(optimizer, params, 2)
    saved = optimizer.state_dict()
    for index, param in enumerate(params):
        for name in ("exp_avg", "exp_avg_sq"):
            value, held = saved["state"][index][name], optimizer.state[param][name]
            assert value.dtype == torch.float32 and held.dtype == torch.bfloat16
            assert_same_bits([value], [held.float()])
    again_params = [torch.nn.Parameter(param.detach().clone()) for param in params]
    again = load(again_params)
    again.load_state_dict(copy.deepcopy(saved))
    train(again, again_params, 1, 2)
    train(optimizer, params, 1, 2)
    for param, other in zip(params, again_params, strict=True):
        torch.testing.assert_close(param, other)


BLOCKS = Format(
    "blocks",
    torch.int8,
    decode=lambda stored, aux: stored.float(),
    encode=lambda values, random: (values.to(torch.int8), torch.ones(-(values.numel() // -32))),
    aux_dtype=torch.float32,
    per_aux=32,
)


def strided(param):
    param.data = torch.zeros(20, 13)[::2, :7]
    param.grad = torch.ones(10, 7)


def sparse(param):
    param.grad = torch.sparse_coo_tensor([[1, 3]], torch.ones(2, 7), param.shape)


def of_another_order(param):
    param.grad = torch.ones(7, 13).t()


@pytest.mark.parametrize("change", [strided, sparse, of_another_order])
@only_on("reference", "the others have no such codec")
def test_block_format_refuses_what_would_cut_its_blocks(change, stored_as):
    stored_as(BLOCKS)
    params = make_params(SHAPES)
    with known(BLOCKS):
        optimizer = fusedopt.AdamW(params, sparse="lazy")
        set_grads(params, 0)
        change(params[0])
        message = (
            r"\['params'\]\[0\].*state 'exp_avg' is stored as blocks, which needs dense tensors in one memory order"
        )
        with nothing_changes(optimizer), pytest.raises(TypeError, match=message):
            optimizer.step()

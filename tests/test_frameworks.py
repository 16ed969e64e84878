"""Lightning, Fabric and Accelerate as their users drive them, on a CPU: mixed precision, clipping, skipped steps, wrappers.

What torch.optim does there is what is expected of these classes too.
"""

import logging
import warnings

import pytest
import torch
from helpers import assert_close, assert_same_bits, randn

import fusedopt

pytestmark = pytest.mark.xdist_group("frameworks")  # importing them takes seconds

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning
    from accelerate import Accelerator
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.precision import MixedPrecision as FabricMixedPrecision
    from lightning.pytorch.plugins.precision import MixedPrecision

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
logging.getLogger("lightning.fabric").setLevel(logging.ERROR)

SCALE = 1024.0


def scaler():
    return torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=10_000)


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))


def inputs(step):
    """Of another size each time, so that the gradients are; the third overflows under a scaler."""
    return randn((8, 8), seed=step) * 10.0**step


# ---- Lightning -------------------------------------------------------------------------------------------------


class Module(lightning.LightningModule):
    def __init__(self, make_optimizer):
        super().__init__()
        self.net, self.make_optimizer, self.norms = make_model(), make_optimizer, []

    def training_step(self, batch, index):
        return self.net(batch).square().mean()

    def on_before_optimizer_step(self, optimizer):
        grads = [param.grad for param in self.net.parameters()]
        self.norms.append(float(torch.nn.utils.get_total_norm(grads)))

    def configure_optimizers(self):
        return self.make_optimizer(self.net.parameters())


def fit(make_optimizer, precision, clip=1.0):
    options = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler())]} if precision == "16-mixed" else {}
    options = options or {"precision": precision}
    module = Module(make_optimizer)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", gradient_clip_val=clip, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, torch.utils.data.DataLoader([inputs(step) for step in range(3)], batch_size=None))
    return [param.detach() for param in module.net.parameters()], module.norms


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_lightning_clips_in_every_precision(precision):
    ours, norms = fit(lambda params: fusedopt.AdamW(params, lr=0.01), precision)
    theirs, their_norms = fit(lambda params: torch.optim.AdamW(params, lr=0.01), precision)
    assert norms == pytest.approx(their_norms, rel=1e-6) and max(norms) > 1
    assert_close(ours, theirs, 1e-5)


def test_lightning_refuses_its_clip_only_for_an_optimizer_that_unscales():
    """As for torch's fused ones, whose message it is."""
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(lambda params: fusedopt.AdamW(params, lr=0.01, fused=True), "16-mixed")
    in_step, _ = fit(lambda params: fusedopt.AdamW(params, lr=0.01, fused=True, max_grad_norm=1.0), "16-mixed", None)
    by_lightning, _ = fit(lambda params: fusedopt.AdamW(params, lr=0.01), "16-mixed")
    assert_close(in_step, by_lightning, 1e-5)


def test_sam_trains_in_lightning():
    """Its trainer passes a closure, which SAM calls twice."""
    ours, _ = fit(lambda params: fusedopt.SAM(params, fusedopt.SGD, rho=0.1, lr=0.01), "32-true", clip=None)
    model = make_model()
    optimizer = fusedopt.SAM(model.parameters(), fusedopt.SGD, rho=0.1, lr=0.01)
    for step in range(3):

        def closure(step=step):
            loss = model(inputs(step)).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
    assert_same_bits(ours, [param.detach() for param in model.parameters()])


# ---- Fabric ----------------------------------------------------------------------------------------------------


def train_with_fabric(make_optimizer):
    fabric = Fabric(accelerator="cpu", plugins=[FabricMixedPrecision("16-mixed", "cpu", scaler())])
    model = make_model()
    wrapped, optimizer = fabric.setup(model, make_optimizer(model.parameters()))
    for step in range(3):
        optimizer.zero_grad()
        fabric.backward(wrapped(inputs(step)).square().mean())
        fabric.clip_gradients(wrapped, optimizer, max_norm=1.0)
        optimizer.step()
    return [param.detach() for param in model.parameters()]


def test_fabric_clips_under_a_scaler():
    ours = train_with_fabric(lambda params: fusedopt.AdamW(params, lr=0.01))
    theirs = train_with_fabric(lambda params: torch.optim.AdamW(params, lr=0.01))
    assert_close(ours, theirs, 1e-5)


@pytest.mark.parametrize("by_hand", [False, True])
def test_sam_works_wrapped_by_fabric(by_hand):
    """Fabric's wrapper derives a class from the optimizer's, and has attributes of its own."""
    results = []
    for is_wrapped in (False, True):
        model = make_model()
        optimizer = fusedopt.SAM(model.parameters(), fusedopt.SGD, rho=0.1, lr=0.1)
        if is_wrapped:
            _, optimizer = Fabric(accelerator="cpu").setup(model, optimizer)
            assert isinstance(optimizer, fusedopt.SAM) and optimizer.rho == 0.1
        for step in range(3):

            def closure(model=model, optimizer=optimizer, step=step):
                optimizer.zero_grad()
                loss = model(inputs(step)).square().mean()
                loss.backward()
                return loss

            if by_hand:
                closure()
                optimizer.first_step()
                closure()
                optimizer.second_step()
            else:
                assert optimizer.step(closure).item() > 0
        results.append([param.detach() for param in model.parameters()])
    assert_same_bits(*results)


def test_clip_by_call_works_wrapped_by_fabric():
    results = []
    for is_wrapped in (False, True):
        model = make_model()
        optimizer = fusedopt.Lion(model.parameters(), lr=0.01)
        if is_wrapped:
            _, optimizer = Fabric(accelerator="cpu").setup(model, optimizer)
        for step in range(3):
            optimizer.zero_grad()
            model(inputs(step)).square().mean().backward()
            optimizer.clip_grad_norm_(0.5)
            optimizer.step()
        optimizer.max_grad_norm = 0.25
        optimizer.step()
        results.append([*(param.detach() for param in model.parameters()), optimizer.grad_norm])
    assert_same_bits(*results)


# ---- Accelerate ------------------------------------------------------------------------------------------------


def train_with_accelerate(make_optimizer):
    """Under a scaler, put in by hand, as Accelerate makes none on a CPU: (skipped, lr) after each step, and the weights."""
    accelerator = Accelerator(cpu=True)
    accelerator.native_amp, accelerator.scaler = True, scaler()
    model = make_model()
    optimizer = make_optimizer(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    seen = []
    for step in range(4):
        loss = model(inputs(0)).square().mean() * (float("inf") if step == 1 else 1.0)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seen.append((optimizer.step_was_skipped, schedule.get_last_lr()[0]))
    return seen, [param.detach() for param in model.parameters()]


@pytest.mark.parametrize("name", ["AdamW", "SGD", "RMSprop"])
def test_accelerate_sees_skipped_steps_and_its_schedule_waits(name):
    seen, ours = train_with_accelerate(lambda params: getattr(fusedopt, name)(params, lr=0.01))
    expected, theirs = train_with_accelerate(lambda params: getattr(torch.optim, name)(params, lr=0.01))
    assert seen == expected == [(False, 0.005), (True, 0.005), (False, 0.0025), (False, 0.00125)]
    assert_close(ours, theirs, 1e-5)


def test_accelerate_rebuilds_nothing_and_its_state_dict_loads():
    """`prepare` moves an optimizer's state by saving and loading it: options of the whole optimizer stay."""
    model = make_model()
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.01, max_grad_norm=0.5, nonfinite="skip")
    _, prepared = Accelerator(cpu=True).prepare(model, optimizer)
    assert prepared.optimizer.max_grad_norm == 0.5 and prepared.optimizer.nonfinite == "skip"
    prepared.load_state_dict(prepared.state_dict())

"""FP32 master weights: small steps add up, and tiny gradients survive with a loss scale."""

import pytest
import torch
from handtuned.amp import GradScaler, MasterWeights
from handtuned.amp.master_weights import master_step_reference
from handtuned.optim import AdamW

LOW = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


class Product(torch.nn.Module):
    """y = w·x with one parameter, as in the study documents' example."""

    def __init__(self, w, dtype=torch.float32):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(w, dtype=dtype))

    def forward(self, x):
        return self.w * x


def gradient(w, x, y, scale, dtype=torch.float16):
    """g = (w·x − y)·x of L = (w·x − y)²/2, computed in `dtype` with a loss scale, then unscaled in FP32."""
    model = Product(w, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    masters, scaler = MasterWeights(model, optimizer), GradScaler(init_scale=scale)
    x, y = (torch.tensor(v, dtype=dtype) for v in (x, y))
    residual = model(x) - y
    # The scale enters with the residual's gradient: the loss itself, r²/2, would be zero in FP16.
    residual.backward(scaler.scale(residual.detach()))
    masters.collect_gradients()
    scaler.unscale_(optimizer)
    return masters.masters["w"].grad.item()


def test_tiny_gradient_of_the_study_documents():
    """Document 000, with w = 1e-7, x = 1, y = 1.03e-7: FP16 has one number for w and y, so no scale rescues it."""
    assert torch.tensor(1e-7).half() == torch.tensor(1.03e-7).half()
    for scale in (1.0, 65536.0):
        assert gradient(1e-7, 1.0, 1.03e-7, scale) == 0.0


def test_tiny_gradient_corrected():
    """The same true gradient, −3e-9, from numbers that FP16 can tell apart: lost without a scale, saved with one.

    w = 0.1, x = 3e-5, y = 1.03e-4: (3e-6 − 1.03e-4) · 3e-5 = −3e-9, below 2⁻²⁵ = 3e-8.
    """
    w, x, y = 0.1, 3e-5, 1.03e-4
    exact = (w * x - y) * x
    assert exact == pytest.approx(-3e-9)
    assert gradient(w, x, y, scale=1.0) == 0.0
    # x and w·x are subnormal in FP16 (spacing 6e-8), which costs up to 3e-8 / 3e-5 = 0.1 % each.
    assert gradient(w, x, y, scale=65536.0) == pytest.approx(exact, rel=4e-3)
    assert gradient(w, x, y, scale=1.0, dtype=torch.bfloat16) == pytest.approx(exact, rel=4 * 2**-7)


@LOW
def test_small_steps_add_up(dtype):
    """1000 steps of 1e-4 from 1: in 16 bits every one of them rounds away."""
    alone, held = Product(1.0, dtype), Product(1.0, dtype)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-4) for m in (alone, held)]
    masters = MasterWeights(held, optimizers[1])
    for _ in range(1000):
        optimizers[1].zero_grad()
        for model in (alone, held):
            model.w.grad = torch.full_like(model.w, -1.0)
        masters.collect_gradients()
        for optimizer in optimizers:
            optimizer.step()
        masters.write_back()
    assert alone.w.item() == 1.0
    assert held.w.item() == torch.tensor(1.1).to(dtype).item()
    assert held.w.dtype == dtype


@LOW
@pytest.mark.parametrize("optimizer_class", [AdamW, torch.optim.AdamW], ids=["ours", "torch"])
def test_equals_fp32_training_on_rounded_weights(each_backend, dtype, optimizer_class):
    """The same gradients give the masters what plain FP32 training gives; the model is their rounding."""
    torch.manual_seed(0)
    start = torch.nn.Linear(9, 7).to(dtype)
    held, plain = torch.nn.Linear(9, 7).to(dtype), torch.nn.Linear(9, 7)
    for model in (held, plain):
        model.load_state_dict(start.state_dict())
    optimizer = optimizer_class(held.parameters(), lr=1e-2)
    masters, reference = MasterWeights(held, optimizer), optimizer_class(plain.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        for p, q in zip(held.parameters(), plain.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.float()
        masters.collect_gradients()
        optimizer.step(**masters.step_arguments())
        if not masters.step_arguments():
            masters.write_back()
        reference.step()
    for (name, p), q in zip(held.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(masters.masters[name], q)
        if each_backend == "torch" or dtype == torch.float16:  # the interpreter truncates to bf16
            assert torch.equal(p, q.to(dtype))


def test_equals_the_reference():
    """Document 000's loop and the class: the same FP16 weights after five scaled steps."""
    torch.manual_seed(0)
    held, plain = torch.nn.Linear(9, 7).half(), torch.nn.Linear(9, 7).half()
    plain.load_state_dict(held.state_dict())
    optimizer, scaler = torch.optim.AdamW(held.parameters(), lr=1e-2), GradScaler(init_scale=64.0)
    masters = MasterWeights(held, optimizer)
    copies = [p.detach().float() for p in plain.parameters()]
    reference = torch.optim.AdamW(copies, lr=1e-2)
    for _ in range(5):
        x = torch.randn(4, 9).half()
        master_step_reference(plain(x).float().square().mean(), list(plain.parameters()), copies, reference, 64.0)
        optimizer.zero_grad()
        scaler.scale(held(x).float().square().mean()).backward()
        masters.collect_gradients()
        scaler.step(optimizer)
        scaler.update()
        masters.write_back()
    assert all(torch.equal(p, q) for p, q in zip(held.parameters(), plain.parameters(), strict=True))


def test_micro_batches_accumulate_in_fp32():
    """2048 + 1 + 1 is 2048 in FP16, where the spacing is 2."""
    model = Product(1.0, torch.float16)
    masters = MasterWeights(model, torch.optim.SGD(model.parameters(), lr=1.0))
    for value in (2048.0, 1.0, 1.0):
        model.w.grad = torch.tensor(value, dtype=torch.float16)
        masters.collect_gradients()
        assert model.w.grad is None
    assert masters.masters["w"].grad.item() == 2050.0
    masters.collect_gradients()
    assert masters.masters["w"].grad.item() == 2050.0


def test_fp32_parameters_stay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3).half(), torch.nn.LayerNorm(3))
    optimizer = AdamW([{"params": model[0].parameters(), "lr": 0.1}, {"params": model[1].parameters(), "lr": 0.2}])
    masters = MasterWeights(model, optimizer)
    assert masters.masters.keys() == {"0.weight", "0.bias"}
    assert [p.dtype for group in optimizer.param_groups for p in group["params"]] == [torch.float32] * 4
    assert optimizer.param_groups[1]["params"][0] is model[1].weight
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


def test_moments_come_along():
    model = Product(1.0, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    model.w.grad = torch.ones_like(model.w)
    optimizer.step()
    masters = MasterWeights(model, optimizer)
    state = optimizer.state[masters.masters["w"]]
    assert len(optimizer.state) == 1
    assert state["exp_avg"].dtype == torch.float32 and state["exp_avg"].item() == pytest.approx(0.1, rel=2**-8)


def test_state_dict_keeps_the_bits_that_the_model_has_not():
    model = Product(1.0, torch.bfloat16)
    masters = MasterWeights(model, torch.optim.SGD(model.parameters(), lr=1.0))
    masters.masters["w"].data.add_(1e-3)
    saved = {name: tensor.clone() for name, tensor in masters.state_dict().items()}
    other = Product(0.0, torch.bfloat16)
    restored = MasterWeights(other, torch.optim.SGD(other.parameters(), lr=1.0))
    restored.load_state_dict(saved)
    assert restored.masters["w"].item() == pytest.approx(1.001) and other.w.item() == 1.0
    with pytest.raises(ValueError, match="typo"):
        restored.load_state_dict({"typo": saved["w"]})


def test_foreign_parameters_are_refused():
    with pytest.raises(ValueError, match="optimizer"):
        MasterWeights(Product(1.0), torch.optim.SGD(Product(1.0, torch.float16).parameters(), lr=1.0))


def test_a_model_in_fp32_needs_no_masters():
    model = torch.nn.Linear(3, 2)
    masters = MasterWeights(model, torch.optim.SGD(model.parameters(), lr=0.1))
    masters.write_back()
    masters.load_state_dict(masters.state_dict())

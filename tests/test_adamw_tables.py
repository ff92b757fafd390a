"""AdamW keeps its tables of addresses from step to step, and sees whatever would make them wrong."""

import copy
from functools import partial

import pytest
import torch
from handtuned.kernels import adamw
from handtuned.optim import AdamW


class Run:
    """Two steps of an optimizer over three parameters, and more; every run draws the same random numbers."""

    def __init__(self, device, fused=None, seed=0):
        self.generator, self.device = torch.Generator().manual_seed(seed), device
        self.copies, self.held = None, []
        self.params = [self.draw(*shape).requires_grad_() for shape in ((8, 8), (70,), (8, 8))]
        self.optimizer = AdamW(self.params, lr=0.1, fused=fused)
        for p in self.params:
            p.grad = self.draw(*p.shape)
        self.steps(2)

    def draw(self, *shape, dtype=torch.float32):
        return torch.randn(shape, generator=self.generator).to(self.device, dtype)

    def steps(self, count=1):
        for _ in range(count):
            self.optimizer.step(copies=self.copies)

    def state(self, i):
        return self.optimizer.state[self.params[i]]

    def tensors(self):
        """What a step may write, or wrote before."""
        states = [value for p in self.params for value in self.optimizer.state[p].values()]
        return [*self.params, *states, *self.held, *(t for t in (self.copies or {}).values() if t is not None)]


@pytest.fixture
def made(monkeypatch):
    """The calls that made tables."""
    calls, tables = [], adamw._tables
    monkeypatch.setattr(adamw, "_tables", lambda *args: calls.append(args) or tables(*args))
    return calls


def grads_elsewhere(run):
    run.held = [p.grad for p in run.params]  # so that the new ones have other addresses
    for p in run.params:
        p.grad = run.draw(*p.shape)


def grad_of_another_dtype_where_it_lies(run):
    grad = run.params[0].grad
    grad.view(torch.float16).copy_(run.draw(8, 16))
    grad.data = grad.view(torch.float16).view(-1)[:64].view(8, 8)


def grad_transposed_where_it_lies(run):
    run.params[0].grad.data = run.params[0].grad.data.t()


def a_parameter_without_gradient(run):
    run.optimizer.zero_grad(set_to_none=True)
    for p in run.params[1:]:
        p.grad = run.draw(*p.shape)


def a_loaded_state(run):
    run.optimizer.load_state_dict(Run(run.device, seed=1).optimizer.state_dict())


def another_group(run):
    run.params.append(run.draw(9).requires_grad_())
    run.params[-1].grad = run.draw(9)
    run.optimizer.add_param_group({"params": run.params[-1:], "lr": 0.2})


def another_rate(run):
    run.optimizer.param_groups[0].update(lr=0.3, betas=(0.5, 0.6), eps=0.1, weight_decay=0.2, maximize=True)


def another_order(run):
    run.optimizer.param_groups[0]["params"].reverse()


def a_moved_parameter(run):
    run.params[0].data = run.params[0].data.clone()


def a_transposed_parameter(run):
    run.params[0].data = run.params[0].data.t()


@torch.no_grad()
def a_parameter_over_other_memory(run):
    run.params[1].set_(run.draw(70))


def a_state_of_its_own(run):
    run.optimizer.state[run.params[0]] = copy.deepcopy(run.state(2))


def a_step_that_is_a_number(run):
    run.state(0)["step"] = 7


def a_step_of_another_dtype(run):
    run.state(0)["step"] = run.state(0)["step"].double()


def replaced(run, key):
    run.state(0)[key] = run.state(2)[key] * 0.5


def moved(run, key):
    run.state(0)[key].data = run.state(2)[key] * 0.5


def exchanged(run, key):
    run.state(0)[key], run.state(2)[key] = run.state(2)[key], run.state(0)[key]


def copied(run, change):
    """Something else in the place of a parameter's 16-bit copy."""
    run.copies = {run.params[0]: run.draw(8, 8, dtype=torch.bfloat16)}
    run.steps()
    run.held = [*run.copies.values()]
    run.copies = {run.params[0]: change(run.held[0])}


CHANGES = [
    grads_elsewhere, grad_of_another_dtype_where_it_lies, grad_transposed_where_it_lies, a_parameter_without_gradient,
    a_loaded_state, another_group, another_rate, another_order, a_moved_parameter, a_transposed_parameter,
    a_parameter_over_other_memory, a_state_of_its_own, a_step_that_is_a_number,
    a_step_of_another_dtype,
    *(pytest.param(partial(change, key=key), id=f"{key}_{change.__name__}")
      for change in (replaced, moved, exchanged) for key in ("exp_avg", "exp_avg_sq", "step")),
    *(pytest.param(partial(copied, change=change), id=name) for name, change in {
        "another_copy": torch.clone, "copy_of_another_dtype": lambda low: low.view(torch.float16),
        "copy_transposed": torch.t, "no_copy": lambda low: None,
    }.items()),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_steps_is_seen(kernel_backend, device, made, change):
    ours, theirs = Run(device), Run(device, fused=False)
    assert len(made) == 1
    for run in (ours, theirs):
        change(run)
        run.steps(2)
    for a, b in zip(ours.tensors(), theirs.tensors(), strict=True):
        if a.dtype == torch.bfloat16:  # which Triton's interpreter cuts off where it should round
            assert ((a.float() - b.float()).abs() <= torch.finfo(a.dtype).eps * b.float().abs()).all()
        else:
            assert torch.equal(a, b)


def test_tables_are_made_once_while_nothing_moves(kernel_backend, device, made):
    """For each of two optimizers that take turns; an empty tensor, whose address is 0, is no reason either."""
    runs = [Run(device), Run(device, seed=1)]
    runs[0].optimizer.add_param_group({"params": (empty := torch.empty(0, device=device, requires_grad=True))})
    empty.grad = torch.empty(0, device=device)
    runs[0].steps()
    made.clear()
    for run in (*runs, *runs):
        for p in run.params:
            p.grad = p.grad.detach()  # another object over the same memory
        run.steps()
    assert made == []


@pytest.mark.parametrize("where", ["grad", "parameter and gradient", "exp_avg"])
def test_what_has_shrunk_is_refused(kernel_backend, device, where):
    """The kernel would write behind it."""
    run = Run(device)
    if where == "exp_avg":
        run.state(1)["exp_avg"] = run.draw(4)
    else:
        run.params[1].grad.data = run.params[1].grad.data[:4]  # its address stays
    if where == "parameter and gradient":
        run.params[1].data = run.params[1].data[:4]
    with pytest.raises(ValueError, match=r"must be of one size, got .*\(4,\)"):
        run.steps()


def test_loaded_state_has_tables_of_its_own(kernel_backend, device, made, monkeypatch):
    """Moments of another size may lie where the old ones did, and sizes of moments are read for new tables only."""
    run = Run(device)
    monkeypatch.setattr("handtuned.optim.adamw.memory_of", lambda groups: run.optimizer._seen)
    run.steps()
    assert len(made) == 1
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    run.steps()
    assert len(made) == 2


def test_a_group_on_several_devices_is_stepped_in_parts(monkeypatch, device):
    """Two devices, as far as the optimizer can tell."""
    whole = Run(device, fused=False)
    monkeypatch.setattr("handtuned.optim.adamw.INDEX", lambda t: t.numel() % 64)
    parts = Run(device, fused=False)
    assert len(parts.optimizer._by_device(parts.optimizer._collect({}))[parts.params[0].device]) == 2
    for a, b in zip(parts.tensors(), whole.tensors(), strict=True):
        assert torch.equal(a, b)

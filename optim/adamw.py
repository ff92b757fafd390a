"""AdamW as an optimizer object: the state, and one call of the step function.

On a GPU a step is one launch of `kernels/adamw.py` for all parameters (float64 ones: the reference), on a CPU torch's
own fused C++ loop, one pass over memory where torch ops take nine.
"""

from copy import deepcopy
from dataclasses import replace
from itertools import chain, compress, islice
from operator import attrgetter, is_, itemgetter

import torch
from torch.optim.adamw import adamw as torch_adamw

from ..kernels import backend
from ..kernels.adamw import ParamGroup, adamw_step_, adamw_step_reference_, gradient_factor, memory_of, same_layout
from ..kernels.unscale import squared_norm

# Of hundreds of tensors through `map`: half the time of a loop over `device`.
INDEX, DTYPE = torch.Tensor.get_device, attrgetter("dtype")
LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps", "copies")

# With the hyperparameters these are torch's keys, so that the two classes read each other's state dicts.
FLAGS = {
    "amsgrad": False, "maximize": False, "foreach": None, "capturable": False, "differentiable": False, "fused": None,
    "decoupled_weight_decay": True,
}  # fmt: skip
MOMENTS = {"step", "exp_avg", "exp_avg_sq"}


def adamw_step_cpu_(groups, grad_scale=None, found_inf=None, sq_norm=None, max_norm=None):
    """`adamw_step_` for CPU tensors by torch's fused C++ AdamW, which rounds differently in the last bit."""
    if found_inf is not None and found_inf.item() != 0:
        return
    factor = gradient_factor(grad_scale, sq_norm, max_norm)
    scale = torch.tensor(factor, dtype=torch.float64, device="cpu").reciprocal().float()
    for group in groups:
        # The C++ loop walks all four tensors by the same offsets and does not look at their strides.
        write_back = []
        dense = [same_layout([p, g.to(p.dtype), m, v], write_back) for p, g, m, v, *_ in group.rows()]
        torch_adamw(
            *map(list, zip(*dense, strict=True)), [], group.steps, fused=True,
            grad_scale=None if factor == 1.0 else scale, amsgrad=False, beta1=group.betas[0], beta2=group.betas[1],
            lr=group.lr, weight_decay=group.weight_decay, eps=group.eps, maximize=group.maximize,
        )  # fmt: skip
        for tensor, copy in write_back:
            tensor.copy_(copy)
        for param, copy in zip(group.params, group.copies, strict=True):
            if copy is not None:
                copy.copy_(param)


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, "Decoupled weight decay regularization", algorithm 2).

    Moments have the dtype of their parameter, arithmetic is float32, and the state dict is that of
    `torch.optim.AdamW`, both ways. FP16 or BF16 parameters lose small updates to rounding; `amp.MasterWeights` keeps
    float32 copies for them. On a GPU a `GradScaler` hands over its scale and overflow flag, and the step unscales and
    skips on the device, without writing gradients.

    Args:
        params: parameters, or dicts with `params` and their own hyperparameters.
        lr, betas, eps, weight_decay, maximize: as in torch; a step first multiplies parameters by 1 − lr·weight_decay.
        fused: None picks the fastest for the device, True also takes over unscaling, False runs the reference.
        foreach: taken for torch's sake; a step is one pass over all parameters anyway.
        amsgrad, differentiable, capturable: only False.

    ValueError: a hyperparameter out of range, or a flag that this class does not have (but a state dict may be
    `capturable`). TypeError: a complex parameter.
    """

    writes_copies = True  # read by amp.MasterWeights: `step` takes `copies`
    _seen, _tables = None, {}  # `memory_of` all groups when tables were made last, and these by device

    def __init__(
        self, params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, amsgrad: bool = False, *, maximize: bool = False, fused: bool | None = None,
        foreach: bool | None = None, capturable: bool = False, differentiable: bool = False,
    ):  # fmt: skip
        super().__init__(params, FLAGS | {
            "lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad,
            "fused": fused, "foreach": foreach, "maximize": maximize, "capturable": capturable,
            "differentiable": differentiable,
        })  # fmt: skip

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._seen = None  # moments of another size may lie where those before did
        for group in self.param_groups:  # a state dict of an earlier torch lacks the younger flags
            group.update(FLAGS | group)

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        check_last_group(self)

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a copy of this class's or torch.optim.AdamW's state dict. ValueError: that of another optimizer."""
        check_loaded_groups(state_dict["param_groups"], "AdamW")
        for state in state_dict["state"].values():
            if state and not state.keys() >= MOMENTS:
                raise ValueError(f"state_dict must hold {', '.join(sorted(MOMENTS))}, got {', '.join(map(str, state))}")
        super().load_state_dict(deepcopy(state_dict))

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by GradScaler (torch's too): do steps unscale and skip by themselves?"""
        fused, param = self.param_groups[0]["fused"], next((p for g in self.param_groups for p in g["params"]), None)
        return param is not None and backend(param) != "torch" if fused is None else fused

    @torch.no_grad()
    def step(self, closure=None, *, max_norm: float | None = None, copies: dict | None = None):
        """One update of every parameter that has a gradient; returns the closure's value.

        Args:
            max_norm: scale all gradients down to this joint L2 norm; `.grad` afterwards depends on the device.
            copies: parameter → 16-bit tensor of its shape that receives the rounded new value.

        RuntimeError: a gradient is sparse.
        """
        loss = torch.enable_grad()(closure)() if closure else None
        groups = self._collect(copies or {})
        as_before = self._seen is not None and self._seen == memory_of(groups)  # a CPU has no tables, and reads nothing
        if not as_before:
            self._seen, self._tables = None, {}
        # If there are tables for one device only, all groups are there, with counters as they should be.
        by_device = {device: groups for device in self._tables} if len(self._tables) == 1 else self._by_device(groups)
        if not by_device:
            return loss
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        sq_norm = None
        if max_norm is not None:
            home = next(iter(by_device))
            sq_norm = sum(squared_norm([g for group in gs for g in group.grads]).to(home) for gs in by_device.values())
        for device, of_device in by_device.items():
            scalars = [None if t is None else t.to(device, non_blocking=True) for t in (grad_scale, found_inf, sq_norm)]
            step = step_function(of_device[0].params[0], self.param_groups[0]["fused"])
            if step is adamw_step_:
                tables = adamw_step_(of_device, *scalars, max_norm, self._tables.get(device))
                self._tables.setdefault(device, tables)
            else:
                step(of_device, *scalars, max_norm)
        if not as_before and all(self._tables.get(device) for device in by_device):
            self._seen = memory_of(groups)
        return loss

    def _collect(self, copies: dict) -> list[ParamGroup]:
        """The tensors of a step, and its hyperparameters. Read through `map`: with hundreds of tensors that counts."""
        found = []
        for group in self.param_groups:
            params, grads = group["params"], [p.grad for p in group["params"]]
            if type(None) in map(type, grads):
                has_grad = [grad is not None for grad in grads]
                params, grads = [*compress(params, has_grad)], [*compress(grads, has_grad)]
            if params:
                found.append((group, params, grads))
        everything = [*chain.from_iterable(params for _, params, _ in found)]
        # The state is mostly in the parameters' order, which spares a search for each.
        ordered = len(everything) == len(self.state) and all(map(is_, everything, self.state))
        states = [*(self.state.values() if ordered else map(self.state.__getitem__, everything))]
        if not all(states):
            if any(grad.is_sparse for _, _, grads in found for grad in grads):
                raise RuntimeError("AdamW does not support sparse gradients; use torch.optim.SparseAdam")
            for p, state in zip(everything, states, strict=True):
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
        moments = [map(itemgetter(key), states) for key in ("exp_avg", "exp_avg_sq", "step")]
        return [
            ParamGroup(
                params, grads, *([*islice(moment, len(params))] for moment in moments),
                [copies.get(p) for p in params] if copies else [None] * len(params), float(group["lr"]),
                tuple(map(float, group["betas"])), group["eps"], group["weight_decay"], group["maximize"],
            )
            for group, params, grads in found
        ]  # fmt: skip

    def _by_device(self, groups: list[ParamGroup]) -> dict[torch.device, list[ParamGroup]]:
        """A group of several devices becomes several; step counters move to their parameters."""
        by_device: dict[torch.device, list[ParamGroup]] = {}
        for group in groups:
            indices, steps = [*map(INDEX, group.params)], group.steps
            tensors = set(map(type, steps)) == {torch.Tensor} and set(map(DTYPE, steps)) == {torch.float32}
            if not tensors or [*map(INDEX, steps)] != indices:
                # Counters live with the parameter: a skipped step is known on its device only.
                for i, (p, step) in enumerate(zip(group.params, steps, strict=True)):
                    steps[i] = torch.as_tensor(step, dtype=torch.float32, device=p.device)
                    self.state[p]["step"] = steps[i]
            places = set(indices)
            for index in places:
                part = group
                if len(places) > 1:
                    on_it = [place == index for place in indices]
                    part = replace(group, **{name: [*compress(getattr(group, name), on_it)] for name in LISTS})
                by_device.setdefault(part.params[0].device, []).append(part)
        return by_device


def step_function(param: torch.Tensor, fused: bool | None = None):
    """Which of the three step functions serves tensors like `param`."""
    if fused is False:
        return adamw_step_reference_
    return adamw_step_cpu_ if param.device.type == "cpu" and backend(param) == "torch" else adamw_step_


def check_last_group(optimizer: torch.optim.Optimizer) -> None:
    """Refuse the parameter group that was added last, and then without leaving it behind."""
    group = optimizer.param_groups[-1]
    try:
        _check_group(group, "amsgrad", "differentiable", "capturable")
        for param in group["params"]:
            if param.is_complex():
                raise TypeError(f"params must be real, got {param.dtype}")
    except (TypeError, ValueError):
        del optimizer.param_groups[-1]
        raise


def check_loaded_groups(groups: list[dict], name: str) -> None:
    """Refuse the groups of a state dict that are another optimizer's than `name`'s, or out of range."""
    for group in groups:
        if missing := {"lr", "betas", "eps", "weight_decay"} - group.keys():
            raise ValueError(f"state_dict must be of {name}, got a group without {', '.join(sorted(missing))}")
        _check_group(group)


def _check_group(group: dict, *flags: str) -> None:
    for flag in flags or ("amsgrad", "differentiable"):
        if group.get(flag):
            raise ValueError(f"{flag} must be False, got {group[flag]!r}: this AdamW does not have it")
    for name in ("lr", "eps", "weight_decay"):
        value = group[name]
        if isinstance(value, torch.Tensor) and value.numel() != 1:
            raise ValueError(f"{name} must be a number or a tensor of 1 element, got shape {tuple(value.shape)}")
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    if len(group["betas"]) != 2:
        raise ValueError(f"betas must be two numbers, got {group['betas']}")
    for i, beta in enumerate(group["betas"]):
        if not 0 <= beta < 1:
            raise ValueError(f"betas[{i}] must be at least 0 and below 1, got {beta}")

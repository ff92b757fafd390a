"""FP32 master weights for a model whose parameters are FP16 or BF16.

A step of 1e-3 · lr on a weight near 1 is far below the spacing of FP16 there (1e-3) or BF16 (8e-3): added in 16 bits
it rounds away. So the optimizer updates an FP32 copy, where small steps add up (Micikevicius et al. 2018, section 3.1):

    1. keep an FP32 master of every parameter, in the optimizer
    2. forward and backward in 16 bits, with the loss scaled
    3. gradients to FP32 (and only then unscale: FP16 would lose again what the scale saved)
    4. step the masters, round them into the model

Bytes per parameter with Adam: 2 (weight) + 2 (gradient) + 4 (master) + 8 (moments), and 4 for the FP32
gradient while a step lasts: no less than the 16 of plain FP32. What shrinks is the activations.
"""

import torch

LOW = (torch.float16, torch.bfloat16)


def master_step_reference(loss, params, masters, optimizer, scale=1.0) -> None:
    """Document 000's loop, one step: 16-bit `params` compute, FP32 `masters` are in the optimizer."""
    (loss * scale).backward()
    for param, master in zip(params, masters, strict=True):
        master.grad = param.grad.float() / scale
        param.grad = None
    optimizer.step()
    with torch.no_grad():
        for param, master in zip(params, masters, strict=True):
            param.copy_(master)


class MasterWeights:
    """Puts FP32 masters in place of an optimizer's 16-bit parameters, and moves gradients and weights across.

        masters = MasterWeights(model.half(), optimizer)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        masters.collect_gradients()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        masters.write_back()

    FP32 parameters stay in the optimizer as they are; state that it has already (moments) becomes FP32 too.
    ValueError: the optimizer holds a 16-bit parameter that is not the model's.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self.masters: dict[str, torch.Tensor] = {}
        self.params: dict[str, torch.nn.Parameter] = {}
        self.versions: dict[str, int] = {}
        names = {param: name for name, param in model.named_parameters()}
        places = [(group["params"], i) for group in optimizer.param_groups for i in range(len(group["params"]))]
        for params, i in places:
            param = params[i]
            if param.dtype not in LOW:
                continue
            if param not in names:
                raise ValueError(f"optimizer must hold parameters of model, got one of shape {tuple(param.shape)}")
            master = param.detach().float().requires_grad_(param.requires_grad)
            params[i] = self.masters[names[param]] = master
            self.params[names[param]] = param
            self.versions[names[param]] = param._version
            for key, value in optimizer.state.pop(param, {}).items():
                low = isinstance(value, torch.Tensor) and value.dtype in LOW
                optimizer.state[master][key] = value.float() if low else value

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """After each backward pass: add the model's gradients to the masters', in FP32, and free the former."""
        for name, param in self.params.items():
            if param._version != self.versions[name]:  # somebody has written into it; a master that rounds to it stays
                master, self.versions[name] = self.masters[name], param._version
                master.copy_(torch.where(master.to(param.dtype) == param, master, param.float()))
            if param.grad is not None:
                before = self.masters[name].grad
                self.masters[name].grad = param.grad.float() if before is None else before.add_(param.grad)
                param.grad = None

    def step_arguments(self) -> dict:
        """Keyword arguments with which `optim.AdamW.step` does `write_back`'s work in its own pass; else empty."""
        if not getattr(self.optimizer, "writes_copies", False):
            return {}
        return {"copies": {master: self.params[name].data for name, master in self.masters.items()}}

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the model."""
        if self.masters:  # a model in FP32 has none
            torch._foreach_copy_(list(self.params.values()), list(self.masters.values()))
            self.versions = {name: param._version for name, param in self.params.items()}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The masters by the model's parameter names: they hold bits that the model does not."""
        return {name: master.detach() for name, master in self.masters.items()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Restore the masters, and the model from them. ValueError: the names are not those of the masters."""
        if state_dict.keys() != self.masters.keys():
            odd = sorted(state_dict.keys() ^ self.masters.keys())
            raise ValueError(f"state_dict must have the masters' names, got or missed {odd}")
        for name, master in self.masters.items():
            master.copy_(state_dict[name])
        self.write_back()

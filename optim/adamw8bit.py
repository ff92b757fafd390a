"""AdamW with its two moments in 8 bits each: 2 bytes per parameter of state instead of 8.

Block-wise dynamic quantization (Dettmers et al. 2022, "8-bit optimizers via block-wise quantization", sections 2.1
and 3): every 256 values share one FP32 scale, their largest magnitude, so an outlier spoils only its own block; and
the 256 levels between −1 and 1 (`quant.dynamic_map`) lie in seven decades with twice as many in each as in the one
below. Large values get a relative precision of about 1 %, and values a million times smaller are still not zero.

The first moment uses signed levels. Of the second, the root is stored, with unsigned ones: its small values stand in
the update's denominator, and the root halves the decades that they span. No v > 0 is stored as zero (down to 1e-24 of
its block's largest), which would turn the division by √v + ε into one by ε alone. A step decodes the moments to FP32,
updates as `AdamW` does, and encodes them again, a piece of a tensor after the other, or those of an embedding table
alone would take more than all the 8-bit moments. Bytes per parameter: 2 + 2·4/256 = 2.03.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F

from ..kernels.adamw import ParamGroup, rounded_sqrt
from ..quant.codebooks import dynamic_map
from .adamw import MOMENTS, check_last_group, check_loaded_groups, step_function

BLOCK_SIZE = 256
# State that is flat: key → elements of the parameter per entry.
ENCODED = {"exp_avg_levels": 1, "exp_avg_scale": BLOCK_SIZE, "exp_avg_sq_levels": 1, "exp_avg_sq_scale": BLOCK_SIZE}
WIDE = "exp_avg", "exp_avg_sq"
PIECE = 2**20  # elements that are updated at once, a multiple of the block
BYTES_WHILE_STEPPING = 20  # per element of a piece, most at once on a CPU
_levels = lru_cache(dynamic_map)
HALF_RANGE = 2.0**15  # a block's largest value in FP16: as far from overflow as small ones from underflow


def quantize_blocks_reference(x: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """x (any shape) → the number of each value's nearest level (n,) uint8, and the blocks' scales (ceil(n / 256),)."""
    code = dynamic_map(signed)
    blocks = F.pad(x.flatten(), (0, -x.numel() % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
    scale = blocks.abs().amax(dim=1)
    levels = torch.bucketize(blocks / scale.clamp(min=1e-30)[:, None], (code[1:] + code[:-1]) / 2)
    return levels.flatten()[: x.numel()].to(torch.uint8), scale


@lru_cache
def _nearest_table(signed: bool) -> torch.Tensor:
    """(65536,) uint8: the level nearest to h / 2¹⁵ for every FP16 number h, by its bits as an int16 plus 32768.

    A table read is several times as fast as a search among the levels. Positive numbers never get the level zero.
    """
    code = _levels(signed)
    h = torch.arange(-32768, 32768, dtype=torch.int16, device="cpu").view(torch.float16).float()
    levels = torch.bucketize(h / HALF_RANGE, (code[1:] + code[:-1]) / 2)
    zero = int((code == 0).nonzero())
    return torch.where((levels == zero) & (h > 0), zero + 1, levels).to(torch.uint8)


def quantize_blocks(x: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference by table: of the value rounded to FP16; what is positive and above 1e-12 of its block's largest
    never becomes zero."""
    padding = -x.numel() % BLOCK_SIZE
    blocks = (F.pad(x.flatten(), (0, padding)) if padding else x).reshape(-1, BLOCK_SIZE)
    scale = torch.linalg.vector_norm(blocks, torch.inf, dim=1)
    half = (blocks * (HALF_RANGE / scale.clamp(min=1e-30))[:, None]).half()
    index = half.view(torch.int16).flatten().int().add_(32768)
    return _nearest_table(signed).to(x.device).index_select(0, index)[: x.numel()], scale


def dequantize_blocks(levels: torch.Tensor, scale: torch.Tensor, signed: bool) -> torch.Tensor:
    """The inverse: (n,) float32."""
    units = _levels(signed).to(levels.device).index_select(0, levels.int())
    return units.mul_(scale.repeat_interleave(BLOCK_SIZE)[: levels.numel()])


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose moments take 2 bytes per parameter.

    Arguments and errors as for `AdamW`, but that `fused` is taken for torch's sake alone. Tensors of fewer than
    `min_elements` keep FP32 moments; they are few bytes, and often the delicate ones (norms, biases).
    """

    encoded = ENCODED  # asked for by ZeroOptimizer, as is `block_of`

    @staticmethod
    def block_of(numel: int, min_elements: int = 4096, **_) -> int:
        """Elements of a tensor that share their state's scale; 1 where moments are FP32."""
        return BLOCK_SIZE if numel >= min_elements else 1

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False, *, min_elements=4096,
        maximize=False, foreach=None, fused=None, capturable=False, differentiable=False,
    ):  # fmt: skip
        rates = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        flags = {"amsgrad": amsgrad, "foreach": foreach, "capturable": capturable, "differentiable": differentiable}
        super().__init__(params, rates | flags | {"min_elements": min_elements})

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a state dict of `AdamW`, or of an earlier version
            group.update({"maximize": False, "min_elements": self.defaults["min_elements"]} | group)

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        check_last_group(self)

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a copy of this class's state dict, or of AdamW's, whose moments the next step encodes; unlike the base
        class, tensors keep their dtypes. ValueError: that of another optimizer."""
        check_loaded_groups(state_dict["param_groups"], "AdamW8bit or AdamW")
        for state in state_dict["state"].values():
            if state and not state.keys() >= MOMENTS and not state.keys() >= {"step", *ENCODED}:
                raise ValueError(f"state_dict must be of AdamW8bit or AdamW, got state {', '.join(map(str, state))}")
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        for param, index in zip(params, indices, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                wide = torch.float32 if key in MOMENTS else None  # AdamW's are of the parameter's dtype
                self.state[param][key] = torch.as_tensor(value).to(param.device, wide, copy=True)

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient; returns the closure's value."""
        loss = torch.enable_grad()(closure)() if closure else None
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step_one(group, param)
        return loss

    def _step_one(self, group: dict, param: torch.Tensor) -> None:
        if param.grad.is_sparse:
            raise RuntimeError("AdamW8bit does not support sparse gradients")
        state, step = self.state[param], self.state[param].get("step")
        if step is None:
            step = state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        whole = getattr(param, "whole_elements", param.numel())  # ZeroOptimizer's shards know those of the whole tensor
        if self.block_of(whole, group["min_elements"]) == 1:
            if state.keys() >= ENCODED.keys():  # by another `min_elements`
                decoded = _decoded(*(state.pop(key) for key in ENCODED))
                state.update(zip(WIDE, (moment.view(param.shape) for moment in decoded), strict=True))
            for key in WIDE:
                state.setdefault(key, torch.zeros_like(param, dtype=torch.float32))
            _update(group, param, param.grad, *(state[key] for key in WIDE), step)
            return
        wide = [state.pop(key).reshape(-1) for key in WIDE if key in state]  # AdamW's, to be encoded
        for key, block in ENCODED.items() if not state.keys() >= ENCODED.keys() else ():
            fill, dtype = (255, torch.uint8) if block == 1 else (0, torch.float32)  # level 1.0 times scale 0
            state[key] = torch.full((-(-param.numel() // block),), fill, dtype=dtype, device=param.device)
        flat, grad = param.reshape(-1), param.grad.reshape(-1)
        for at in range(0, flat.numel(), PIECE):
            end, count = min(at + PIECE, flat.numel()), step.clone()
            parts = [state[key][at // block : -(-end // block)] for key, block in ENCODED.items()]
            moments = [moment[at:end] for moment in wide] or _decoded(*parts)
            _update(group, flat[at:end], grad[at:end], *moments, count)
            new = *quantize_blocks(moments[0], True), *quantize_blocks(rounded_sqrt(moments[1]), False)
            for part, value in zip(parts, new, strict=True):
                part.copy_(value)
        step.add_(1)
        if flat.data_ptr() != param.data_ptr():  # not contiguous
            param.copy_(flat.view(param.shape))


def _decoded(levels, scale, root_levels, root_scale) -> tuple[torch.Tensor, torch.Tensor]:
    """Both moments, (n,) float32 each."""
    return dequantize_blocks(levels, scale, True), dequantize_blocks(root_levels, root_scale, False).square_()


def _update(group: dict, param: torch.Tensor, grad: torch.Tensor, exp_avg, exp_avg_sq, step) -> None:
    """Moments and arithmetic are FP32; a 16-bit parameter receives the result rounded."""
    wide = param.float()
    tensors = [wide], [grad.to(wide.dtype)], [exp_avg], [exp_avg_sq], [step], [None]
    rates = float(group["lr"]), group["betas"], group["eps"], group["weight_decay"], group["maximize"]
    step_function(wide)([ParamGroup(*tensors, *rates)])
    if wide is not param:
        param.copy_(wide)

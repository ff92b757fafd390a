"""The state dict of a `ZeroOptimizer`: gathered when it is saved, cut again when it is loaded."""

import copy

import torch

from .zero_collectives import Shard


def whole_state(zero) -> dict:
    """Gather shard by shard: no more than one whole tensor is on the device at a time."""
    local = zero.inner.state_dict()
    state = {}
    for index in sorted(local["state"]):
        shard = zero.shards[index]
        state[index] = {key: _whole(zero, shard, key, value) for key, value in local["state"][index].items()}
        if shard.master.dtype != shard.value.dtype:
            state[index]["master"] = _whole(zero, shard, "master", shard.master)
    groups = zip(zero.param_groups, local["param_groups"], strict=True)
    return {"state": state, "param_groups": [group | {"params": ours["params"]} for group, ours in groups]}


def _whole(zero, shard: Shard, key: str, value):
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return copy.deepcopy(value).cpu() if isinstance(value, torch.Tensor) else value
    if value.shape != shard.value.shape:
        raise ValueError(
            f"state must be element-wise to be gathered, got {key!r} of shape {tuple(value.shape)} for "
            f"{shard.value.numel()} elements"
        )
    whole = next(zero.group.gather_whole([value.to(shard.owned.device)], [shard.numel]))
    return whole.view(shard.shape).cpu()


def load_cut_state(zero, state_dict: dict) -> None:
    groups = copy.deepcopy(state_dict["param_groups"])
    wanted, got = ([len(group["params"]) for group in each] for each in (zero.param_groups, groups))
    if wanted != got:
        raise ValueError(f"state_dict must have groups of as many parameters as the optimizer's, {wanted}, got {got}")
    names = [name for group in groups for name in group["params"]]
    shard_of = dict(zip(names, zero.shards, strict=True))
    state = {
        name: {key: _cut(shard_of[name], key, value) for key, value in values.items()}
        for name, values in state_dict["state"].items()
    }
    masters = {shard_of[name]: values.pop("master") for name, values in state.items() if "master" in values}
    bare = [hyperparameters(group) | {"params": group["params"]} for group in groups]
    zero.inner.load_state_dict({"state": state, "param_groups": bare})
    zero.state = zero.inner.state
    for group, ours in zip(zero.param_groups, groups, strict=True):
        del ours["params"]
        group.update(ours)
    for shard in zero.trained:
        if shard.value is not shard.owned:
            shard.value.copy_(shard.owned)
        if shard.master is not shard.value:
            shard.master.copy_(masters.get(shard, shard.value))


def _cut(shard: Shard, key: str, value):
    if not isinstance(value, torch.Tensor) or (value.dim() == 0 and (key == "step" or shard.shape != value.shape)):
        return copy.deepcopy(value)
    if value.shape != shard.shape:
        raise ValueError(
            f"state must be element-wise to be cut, got {key!r} of shape {tuple(value.shape)} for a parameter of "
            f"shape {tuple(shard.shape)}"
        )
    return value.reshape(-1)[shard.start : shard.stop].clone()


def hyperparameters(group: dict) -> dict:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}

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
        state[index] = {key: gather_entry(zero, shard, key, value) for key, value in local["state"][index].items()}
        if shard.master.dtype != shard.value.dtype:
            state[index]["master"] = gather_entry(zero, shard, "master", shard.master)
    groups = zip(zero.param_groups, local["param_groups"], strict=True)
    return {"state": state, "param_groups": [group | {"params": ours["params"]} for group, ours in groups]}


def gather_entry(zero, shard: Shard, key: str, value):
    """The whole of a state entry of which every rank gives its part, on the host; all ranks must call it."""
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return copy.deepcopy(value).cpu() if isinstance(value, torch.Tensor) else value
    per = _encoded(zero).get(key, 1)
    if value.shape != (-(-shard.value.numel() // per),):
        raise ValueError(
            f"state must be element-wise to be gathered, got {key!r} of shape {tuple(value.shape)} for "
            f"{shard.value.numel()} elements"
        )
    numel, width = -(-shard.numel // per), zero.group.width(shard.numel) // per
    whole = next(zero.group.gather_whole([value.to(shard.owned.device)], [numel], [width])).cpu()
    return whole if key in _encoded(zero) else whole.view(shard.shape)


def load_cut_state(zero, state_dict: dict) -> None:
    groups = copy.deepcopy(state_dict["param_groups"])
    wanted, got = ([len(group["params"]) for group in each] for each in (zero.param_groups, groups))
    if wanted != got:
        raise ValueError(f"state_dict must have groups of as many parameters as the optimizer's, {wanted}, got {got}")
    names = [name for group in groups for name in group["params"]]
    shard_of = dict(zip(names, zero.shards, strict=False))  # after them come those that are only cut
    state = {
        name: {key: cut_entry(zero, shard_of[name], key, value) for key, value in values.items()}
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


def cut_entry(zero, shard: Shard, key: str, value):
    """This rank's part of a whole state entry."""
    if not isinstance(value, torch.Tensor) or (value.dim() == 0 and (key == "step" or shard.shape != value.shape)):
        return copy.deepcopy(value)
    per = _encoded(zero).get(key, 1)
    if value.shape != ((-(-shard.numel // per),) if key in _encoded(zero) else shard.shape) or shard.start % per:
        raise ValueError(
            f"state must be element-wise to be cut, or in the optimizer's blocks, got {key!r} of shape "
            f"{tuple(value.shape)} for a parameter of shape {tuple(shard.shape)}"
        )
    return value.reshape(-1)[shard.start // per : -(-shard.stop // per)].clone()


def _encoded(zero) -> dict[str, int]:
    """State that the inner optimizer keeps flat: key → elements of the parameter per entry."""
    return getattr(zero.inner, "encoded", {})


def hyperparameters(group: dict) -> dict:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}

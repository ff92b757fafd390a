"""Modules by the paths of the bare model: without what torch.compile, DDP, FSDP and checkpoint_wrapper put around."""

from collections.abc import Iterable, Iterator

from torch import nn

PARALLEL = nn.DataParallel, nn.parallel.DistributedDataParallel
WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


class StandsFor(nn.Module):
    """Stands in the place of another module, `current`: what it does not have itself is read from there."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "_modules" not in vars(self):  # while it is copied or read from a file
                raise
            return getattr(self.current, name)

    def __len__(self):
        return len(self.current)

    def __iter__(self):
        return iter(self.current)

    def __contains__(self, item):
        return item in self.current

    def __getitem__(self, index):
        return self.current[index]

    def __setitem__(self, index, value):
        self.current[index] = value

    def __delitem__(self, index):
        del self.current[index]

    def __bool__(self):
        return True


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's and data parallelism's wrappers."""
    while isinstance(model, PARALLEL) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, PARALLEL) else model._orig_mod
    return model


def named_modules(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """As `model.named_modules`, but of a wrapper and what it wraps the latter alone, under one path."""
    wrappers = set()
    for path, module in model.named_modules(remove_duplicate=remove_duplicate):
        if isinstance(module, PARALLEL) or WRAPPERS & module._modules.keys():
            wrappers.add(path)
        else:
            parts = path.split(".")
            yield ".".join(part for i, part in enumerate(parts) if ".".join(parts[:i]) not in wrappers), module


def ending_in(paths: Iterable[str], names: Iterable[str]) -> set[str]:
    """The paths that end in one of the names, by whole components: "proj" is not the end of "q_proj"."""
    endings = tuple(f".{name}" for name in names)
    return {path for path in paths if f".{path}".endswith(endings)}


def outermost(paths: Iterable[str]) -> list[str]:
    """The paths that do not lie inside another of them, sorted."""
    paths = sorted(paths)
    return [path for path in paths if not path.startswith(tuple(f"{other}." for other in paths))]


def replace(model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Put modules in the places of others, wherever these stand. A compiled one is replaced with its wrapper."""
    for parent in list(unwrapped(model).modules()):
        for name, child in parent._modules.items():
            inner = child if child is None else child._modules.get("_orig_mod", child)
            if inner in new:
                parent._modules[name] = new[inner]


def train_only(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Let these parameters require gradients, and no others of the model."""
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)


def may_save_whole(model: nn.Module, allowed: bool) -> None:
    """Let transformers' `save_pretrained` (and so its Trainer) write the model, or refuse while it has adapters."""
    for module in model.modules():
        if hasattr(type(module), "save_pretrained"):
            vars(module).pop("save_pretrained", None)
            if not allowed:
                module.save_pretrained = _refuse_to_save


def _refuse_to_save(*args, **kwargs):
    raise ValueError("save_pretrained would write an adapted model under names that nothing loads. Write the adapter "
                     "alone by handtuned.nn.save_adapter(model, directory), or make the model plain by "
                     "handtuned.nn.merge.merge_and_unload; a Trainer needs save_strategy='no'")  # fmt: skip

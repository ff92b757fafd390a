"""ZeRO stage 3: parameters that are whole only while a module uses them.

Between uses a parameter is an empty tensor; what is left of it is this rank's shard. Hooks on every module's call:

    before a module's forward       all-gather the parameters that it holds itself
    after it                        release them, and hook the output:
    when a gradient reaches that    all-gather them again
    when a parameter's own gradient has been accumulated, release that parameter

What autograd has saved of a parameter (often a view, `weight.t()`) points into the parameter's storage, so the
storage is shrunk to 0 bytes and grown again, never replaced.

Collectives must be called in the same order on all ranks, and on one of them an output may not reach the loss at all.
So backward marches in lockstep, through the modules in the reverse of the order in which they ran forward; a gradient
that reaches a module first makes up for those that were passed over, with zeros for gradients that have not come.
"""

import contextlib
import weakref

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves

from .zero_collectives import Shard, alike

# Their forward reads the parameters of submodules without calling these. Classes of our own say `reads_submodules`.
READ_INTO = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


class Gathering:
    """Gathers and releases parameters, and tells the `reduction` of their gradients when a module's are complete.

    If the `model` is known, the members of its ModuleLists (a decoder's layers) are gathered as a whole: fewer and
    larger collectives, and their modules may read each other's parameters.
    """

    def __init__(self, shards, group, reduction, model: nn.Module | None = None):
        self.group = group
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)] if model else []
        self.blocks = {block for blocks in lists for block in blocks}
        self.reduction = weakref.proxy(reduction)
        self.by_param = {shard.param: shard for shard in shards}
        self.full: dict[Shard, torch.Tensor] = {}  # of the whole shape, with memory only while it is whole
        self.whole: set[Shard] = set()
        self.held = False  # all of them, for a while
        self.users = dict.fromkeys(shards, 0)  # running forward calls
        self.pending = dict.fromkeys(shards, 0)  # calls whose backward still needs a frozen parameter
        self.order: dict[tuple[Shard, ...], None] = {}  # modules' shards as they ran, not yet met in backward
        self.home: dict[Shard, tuple[Shard, ...]] = {}  # with which of these a shard's gradient is reduced
        self.last: tuple[Shard, ...] = ()
        for shard in shards:
            self.full[shard] = shard.owned.new_empty(shard.shape)
            self.full[shard].untyped_storage().resize_(0)

    def hooks(self) -> list:
        me = weakref.ref(self)
        before = register_module_forward_pre_hook(lambda module, args: me().before_forward(module, args))
        after = register_module_forward_hook(lambda module, _, out: me().after_forward(module, out), always_call=True)
        return [before, after]

    @torch.no_grad()
    def gather(self, shards) -> None:
        """Make parameters whole."""
        for group in alike(shard for shard in shards if shard not in self.whole):
            flats = self.group.gather_whole([shard.owned for shard in group], [shard.numel for shard in group])
            for shard, flat in zip(group, flats, strict=True):
                full = self.full[shard]
                full.untyped_storage().resize_(shard.numel * full.element_size())
                full.view(-1).copy_(flat)
                shard.param.data = full
                self.whole.add(shard)

    def release(self, shards) -> None:
        """Give back the memory of parameters that no running forward call uses."""
        for shard in shards:
            if shard in self.whole and self.users[shard] == 0 and not self.held:
                shard.param.data = shard.owned.new_empty(0)
                self.full[shard].untyped_storage().resize_(0)
                self.whole.remove(shard)

    @contextlib.contextmanager
    def all_whole(self):
        self.gather(self.by_param.values())
        self.held = True
        try:
            yield
        finally:
            self.held = False
            self.release(self.by_param.values())

    def of_module(self, module: nn.Module) -> tuple[Shard, ...]:
        reads = isinstance(module, READ_INTO) or getattr(module, "reads_submodules", False)
        params = module.parameters(recurse=reads or module in self.blocks)
        return tuple(self.by_param[param] for param in params if param in self.by_param)

    def before_forward(self, module: nn.Module, args: tuple) -> None:
        shards = self.of_module(module)
        if not shards:
            return
        self.gather(shards)
        if self.reduction.in_backward:  # a checkpoint's second forward pass: backward uses them next
            return
        for shard in shards:
            self.users[shard] += 1
        frozen = [shard for shard in shards if not shard.param.requires_grad]
        # A frozen parameter has no gradient to wait for, but its module's input has one, after the last use.
        entered = next((x for x in args if isinstance(x, torch.Tensor) and x.requires_grad and not x.is_leaf), None)
        if not frozen or entered is None or not torch.is_grad_enabled():
            return
        for shard in frozen:
            self.pending[shard] += 1

        def passed(_):
            for shard in frozen:
                self.pending[shard] -= 1
            self.release(shard for shard in frozen if self.pending[shard] == 0)

        entered.register_hook(passed)

    def after_forward(self, module: nn.Module, output) -> None:
        shards = self.of_module(module)
        if not shards or self.reduction.in_backward:
            return
        for shard in shards:
            self.users[shard] -= 1
        self.release(shards)
        outputs = [x for x in tree_leaves(output) if isinstance(x, torch.Tensor) and x.requires_grad]
        if not outputs:
            return
        if module in self.blocks:  # the calls within were a part of this one
            self.order = {key: None for key in self.order if not set(key) < set(shards)}
            self.home.update(dict.fromkeys(shards, shards))
        self.order.pop(shards, None)
        self.order[shards] = None
        self.home = dict.fromkeys(shards, shards) | self.home
        for x in outputs:
            x.register_hook(lambda _: self.before_backward(shards))

    def before_backward(self, shards: tuple[Shard, ...]) -> None:
        """A gradient has reached a module's output."""
        self.reduction.enter_backward()
        while any(set(shards) <= set(waiting) for waiting in self.order):
            self._march()
        self.gather(shards)  # another backward pass through the same graph

    def _march(self) -> None:
        """One step of the lockstep: reduce what the last module has left, gather the next one."""
        following, _ = self.order.popitem()
        self._reduce_last()
        self.gather(following)
        self.last = following

    def _reduce_last(self) -> None:
        mine = [shard for shard in self.last if shard.param.requires_grad and self.home.get(shard) == self.last]
        self.last = ()
        self.reduction.reduce(mine, early=True)

    def finish_backward(self) -> None:
        """March through what other ranks may have met, and release everything."""
        while self.order:
            self._march()
        self._reduce_last()
        self.home.clear()
        self.pending = dict.fromkeys(self.pending, 0)
        self.users = dict.fromkeys(self.users, 0)  # of calls that a checkpoint has cut short
        self.release(self.by_param.values())

# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 08. How does LoRA live in a model?
#
# Lesson [07](07_low_rank_updates.ipynb) built one layer: y = Wx + s·B(Ax), W frozen, A and B trained. A model has
# hundreds of linear layers, and an adapter has a life: it is put in, trained, saved, loaded beside others, switched,
# merged into the weights, taken out again. Each of these steps has a way to go wrong silently. This lesson
# goes through them with the documents' code on one side and the library's on the other.
#
# An **adapter** here is the set of all A and B of a model; the **base** is everything else.
#
# The documents: 000 (CS224N lecture 12), 001 (efficient training), 003 (QLoRA diary), 004 (LoRA lesson).
#
# Terms: adapter 适配器, freeze 冻结, merge 合并, unmerge 取消合并, target modules 目标模块, checkpoint 检查点, intrinsic dimension 内在维度, multi-task switching 任务切换, throughput 吞吐量

# %%
import copy
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from handtuned import lessons, memory
from handtuned.lessons import ACCENT, GREYS, bars, claim, figure, gpu, show, skipped, source
from handtuned.lessons.house import HOUSE_A, HOUSE_B, House, accuracy, draw, fit, loss_of
from handtuned.nn import (
    LoRALayer,
    LoRALinear,
    apply_lora_to_model,
    load_adapter,
    lora_parameters,
    merge_lora,
    save_adapter,
    set_adapter,
    unmerge_lora,
)
from handtuned.nn import inject
from handtuned.nn.combine import add_weighted_adapter
from handtuned.nn.multi import adapters_by_row
from handtuned.optim import AdamW


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


# %%
from handtuned.lessons import drawings

drawings.adapter_life()

# %% [markdown]
# ## 1. A base model and two houses
#
# The model is that of lesson 07: a Llama in miniature that answers household requests with small JSON commands, one
# token per word. It is pretrained on the commands as they ship. Two customers speak other dialects: house A renames
# some words, house B renames others. Each is to get an adapter. The rows of all dialects share one vocabulary:

# %%
source(House.__init__)
print("house A:", HOUSE_A, "\nhouse B:", HOUSE_B)

torch.manual_seed(7)
DIALECTS = {"as shipped": None, "house A": HOUSE_A, "house B": HOUSE_B}
house = House(DIALECTS)
training, testing = house.training, house.testing
base = house.new_model()
fit(base, training["as shipped"], 200, 3e-3)
print({name: f"{accuracy(base, rows):.1%}" for name, rows in testing.items()})

# %% [markdown]
# ## 2. Putting adapters in
#
# 001 walks over the modules, and wherever a target's name occurs in the path it puts a LoRALinear in place of the
# linear layer. **Write down your guess**: of this model's parameters, how many will the optimizer get from
# `model.parameters()` with `requires_grad`? And what happens if the function runs a second time?
#
# Both matter. What stays trainable costs gradients and optimizer state, the very memory that LoRA is meant to save; and it
# changes without being part of the adapter, so that a saved adapter no longer fits the base that everybody else has.

# %%
lessons.guess(
    "08.a",
    "how many parameters will the optimizer get from the notes' function, and what does a second run do?",
)
class NotesLinear(nn.Module):
    """001's LoRALinear."""

    def __init__(self, original, rank=8, lora_alpha=16.0):
        super().__init__()
        self.original, self.scaling = original.requires_grad_(False), lora_alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, original.in_features))
        self.lora_B = nn.Parameter(torch.zeros(original.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, x):
        return self.original(x) + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scaling


def notes_apply(model, targets=("q_proj", "v_proj"), rank=8):
    """001's apply_lora_to_model."""
    for name, module in model.named_modules():
        if any(target in name for target in targets) and isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, NotesLinear(module, rank))
    return model


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


theirs, ours = notes_apply(copy.deepcopy(base)), apply_lora_to_model(copy.deepcopy(base), rank=8)
print(f"trainable of {sum(p.numel() for p in base.parameters()):,}: 001 {trainable(theirs):,}, library {trainable(ours):,}")

notes_apply(theirs)
nested = isinstance(theirs.model.layers[0].self_attn.q_proj.original, NotesLinear)
try:
    apply_lora_to_model(ours, rank=8)
    refused = ""
except ValueError as error:
    refused = str(error)
print("a second time: 001 nests" if nested else "", "| library:", refused)

odd = nn.ModuleDict({"audio_projector": nn.Linear(4, 4), "o_proj": nn.Linear(4, 4)})
caught = [name for name, module in notes_apply(copy.deepcopy(odd), ("o_proj",)).items() if isinstance(module, NotesLinear)]
strict = [name for name, module in apply_lora_to_model(copy.deepcopy(odd), 2, target_modules=["o_proj"]).items()
          if isinstance(module, LoRALinear)]  # fmt: skip
print("target o_proj selects: 001", caught, "| library", strict)
lessons.measured(
    "08.a",
    f"{trainable(notes_apply(copy.deepcopy(base))):,}, the adapter has {trainable(ours):,}; a second run nests",
)
claim(
    25,
    f"001's function leaves {trainable(notes_apply(copy.deepcopy(base))):,} parameters trainable where the adapter has "
    f"{trainable(ours):,}: embeddings, norms and the other layers are never frozen. Run twice it wraps the inner layer "
    "again. Its target is any substring, and it has no argument for dropout.",
    nested
    and trainable(theirs) > 10 * trainable(ours)
    and trainable(ours) == sum(p.numel() for p in lora_parameters(ours))
    and "do not nest" in refused
    and caught == ["audio_projector", "o_proj"]
    and strict == ["o_proj"],
)

# %% [markdown]
# The library selects by whole components of the path, freezes everything else, and refuses what it cannot do. Nothing is
# changed before all checks have passed: a model that is half adapted would be worse than an error.

# %%
source(inject._put_in, first="selected, values", last="return model")

# %% [markdown]
# ## Exercise 08.1: which layers a target names
#
# Write `select(paths, target)`: those paths whose last components are the target's, in order.
# `"q_proj"` and `"self_attn.q_proj"` are both legal targets.

# %%
def select(paths, target):
    raise NotImplementedError


lessons.check("08.1", select);

# %% [markdown]
# ## 3. Where gradients flow
#
# 003: "in the backward pass gradients flow only through B and A". **Write down your guess**: of the FLOPs of a full
# training step, how many does LoRA save? A half? Two thirds?
#
# On four numbers: y = Wx with W = [[1, 2], [3, 4]], and dy = (1, 0) arrives. The layer *below* needs dx = Wᵀdy.
# If W were skipped, dx would be missing all that W carries.

# %%
lessons.guess("08.b", "which share of the FLOPs of a full step does LoRA save?")
W = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
dy = torch.tensor([1.0, 0.0])
A, B = torch.tensor([[0.1, 0.0]]), torch.tensor([[0.0], [0.2]])
print("dx through W and BA:", dy @ (W + B @ A), "  through BA alone:", dy @ (B @ A))


def step_flops(train_base):
    """Forward and backward of one layer inside a model, 512 tokens, 1,024 → 1,024, with or without an adapter."""
    x = torch.randn(512, 1024, requires_grad=True)  # something below wants dx
    layer = nn.Linear(1024, 1024, bias=False)
    layer = layer if train_base else LoRALinear(layer, rank=8)
    return flops(lambda: layer(x).sum().backward())


torch.manual_seed(0)
full_step, lora_step = step_flops(True), step_flops(False)

two = nn.Sequential(LoRALinear(nn.Linear(64, 64), rank=4), nn.SiLU(), LoRALinear(nn.Linear(64, 64), rank=4))
for parameter in lora_parameters(two):
    nn.init.normal_(parameter, std=0.1)
x = torch.randn(32, 64)
two(x).square().sum().backward()
true_gradient = two[0].lora_A.grad.clone()
two.zero_grad()
inner, last = two[1](two[0](x)), two[2]
cut = last.base_layer(inner.detach()) + last.scaling * (inner @ last.lora_A.t()) @ last.lora_B.t()
cut.square().sum().backward()
off = ((two[0].lora_A.grad - true_gradient).norm() / true_gradient.norm()).item()
lessons.measured("08.b", f"{1 - lora_step / full_step:.1%}")
claim(
    33,
    f"a LoRA step takes {lora_step / full_step:.3f} of the FLOPs of a full one: dW falls away, dx = dy·W does not. If "
    f"gradients really flowed through A and B only, the gradient of the layer below would be off by {off:.0%}. What "
    "is saved is dW itself and the optimizer state of W.",
    abs(lora_step / full_step - 2 / 3) < 0.03 and off > 0.5,
)

# %% [markdown]
# ## 4. Merging
#
# After training, BA can be added to W: the adapter is gone and the layer is as fast as before. 001 gives LoRALayer, a
# layer with a frozen weight of its own, a `merge_weights` for that. Read its parts: the weight is
# `torch.zeros(out, in)`; `merge_weights` adds s·BA to it; `forward` computes Wx + s·B(Ax). **Write down your guess**:
# what does forward return after merging?

# %%
lessons.guess("08.c", "what does forward return after merging?")
class NotesLayer(nn.Module):
    """001's LoRALayer."""

    def __init__(self, in_features, out_features, rank=8, lora_alpha=16.0):
        super().__init__()
        self.scaling = lora_alpha / rank
        self.weight = nn.Parameter(torch.zeros(out_features, in_features), requires_grad=False)
        self.lora_A = nn.Parameter(torch.randn(rank, in_features) / in_features**0.5)
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank))

    def forward(self, x):
        return F.linear(x, self.weight) + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scaling

    @torch.no_grad()
    def merge_weights(self):
        self.weight += self.scaling * (self.lora_B @ self.lora_A)


torch.manual_seed(0)
x = torch.randn(16, 64)
added_twice, fresh = {}, {}
for layer in (NotesLayer(64, 32, rank=4), LoRALayer(64, 32, rank=4)):
    name = "001" if isinstance(layer, NotesLayer) else "library"
    fresh[name] = layer(x).abs().max().item()
    nn.init.normal_(layer.lora_B, std=0.1)
    before = layer(x).detach()
    update = layer.scaling * F.linear(F.linear(x, layer.lora_A), layer.lora_B).detach()
    layer.merge_weights()
    added_twice[name] = ((layer(x) - before).norm() / update.norm()).item()
print("largest output of a new layer:", fresh)
lessons.measured("08.c", f"off by {added_twice['001']:.2f} of ΔW·x: it is added twice")
claim(
    23,
    f"a new layer of 001 answers 0 to everything (its frozen weight is zero). After merge_weights its output is off by "
    f"{added_twice['001']:.2f} of ΔW·x: forward adds ΔW again, for nothing says that it is merged. The library's "
    f"layer, which remembers: {added_twice['library']:.0e}.",
    fresh["001"] == 0 and fresh["library"] > 0 and abs(added_twice["001"] - 1) < 1e-3 and added_twice["library"] < 1e-5,
)

# %% [markdown]
# 001's second class, LoRALinear, wraps a layer that exists. It is right, and it is what section 2 used. One thing it
# cannot do: the adapter is created in fp32, and a 16-bit base meets it in one product. **Write down your guess**: what
# happens,
# and which dtype should win?

# %%
lessons.guess("08.d", "an fp32 adapter on a bf16 base: what happens, and which dtype should win?")
torch.manual_seed(0)
linear = nn.Linear(64, 32)
theirs, ours = NotesLinear(linear, rank=4), LoRALinear(copy.deepcopy(linear), rank=4)
nn.init.normal_(theirs.lora_B, std=0.1)
ours.load_state_dict({"lora_A": theirs.lora_A, "lora_B": theirs.lora_B}, strict=False)
difference = (theirs(x) - ours(x)).abs().max().item()

half = NotesLinear(copy.deepcopy(linear).bfloat16(), rank=4)
try:
    half(x.bfloat16())
    message = ""
except RuntimeError as error:
    message = str(error)
print("001 on a bf16 base:", message)
answer = LoRALinear(copy.deepcopy(linear).bfloat16(), rank=4)(x.bfloat16())
print("library on a bf16 base:", answer.dtype, "with adapters in fp32")
lessons.measured("08.d", f"an error in 001; the library answers in {answer.dtype}")
claim(
    24,
    f"on an fp32 base 001's LoRALinear and the library's differ by {difference:.0e}. On a bf16 base 001's raises an "
    "error; the library computes in the input's dtype and keeps A and B in fp32, where small updates survive.",
    difference < 1e-5 and "dtype" in message and answer.dtype == torch.bfloat16,
)

# %% [markdown]
# ### Does an adapter cost anything at inference?
#
# 004 says so in its summary. **Write down your guess** for this model, unmerged and merged, in FLOPs.
#
# (A trap beside it: `state_dict`, what `torch.save` would write. If it held the merged weight *and* A and B, whoever loads
# it would add ΔW twice. So while merged, the library's layer still gives the original weight; a test holds it to that.)

# %%
lessons.guess("08.e", "FLOPs beside the base's: with the adapter beside it, and merged?")
torch.manual_seed(0)
adapted = apply_lora_to_model(copy.deepcopy(base), rank=8, target_modules="all-linear")
for layer in (module for module in adapted.modules() if isinstance(module, LoRALinear)):
    nn.init.normal_(layer.lora_B, std=0.02)
tokens = testing["as shipped"][0][:8]
with torch.no_grad():
    cost = {"base": flops(lambda: base(tokens)), "adapter beside": flops(lambda: adapted(tokens))}
    unmerged_logits = adapted(tokens)
    merge_lora(adapted)
    cost["merged"] = flops(lambda: adapted(tokens))
    moved = (adapted(tokens) - unmerged_logits).abs().max().item()
    unmerge_lora(adapted)
    restored = torch.equal(adapted(tokens), unmerged_logits)
print(cost, f"| merging changes logits by {moved:.0e}, unmerging restores every bit: {restored}")
lessons.measured(
    "08.e",
    f"{cost['adapter beside'] / cost['base'] - 1:+.1%} and {cost['merged'] / cost['base'] - 1:+.1%}",
)
claim(
    27,
    f"beside the weights the adapter costs {cost['adapter beside'] / cost['base'] - 1:.1%} more FLOPs here (layers of "
    f"width 64; less for wide ones), merged {cost['merged'] / cost['base'] - 1:.1%}.",
    cost["merged"] == cost["base"] < cost["adapter beside"] and restored and moved < 1e-3,
)

# %% [markdown]
# ## 5. Switching by subtracting
#
# 004: to switch tasks, subtract BA and add B′A′. In real numbers that is exact. **Write down your guess** of how far W
# has moved after 100 rounds, each of which goes to one task and to the other and back, in fp16 and in bf16.

# %%
lessons.guess("08.f", "how far has W moved after 100 rounds, in fp16 and in bf16?")
torch.manual_seed(0)
exact = torch.randn(256, 256) * 0.02  # weights of a usual size
updates = [(torch.randn(256, 8) @ torch.randn(8, 256)) * 0.02 / 8**0.5 * 0.1 for _ in range(2)]  # 10 % of W each


def drift(dtype, rounds=100):
    """Relative distance from where W started, after each round of two swaps, every sum rounded to dtype."""
    W = exact.to(dtype)
    start, course = W.float(), []
    first, second = (update.to(dtype) for update in updates)
    for _ in range(rounds):
        W = W + first
        W = W - first
        W = W + second
        W = W - second
        course.append(((W.float() - start).norm() / start.norm()).item())
    return course


courses = {"bf16": drift(torch.bfloat16), "fp16": drift(torch.float16), "fp32": drift(torch.float32)}
layer = LoRALinear(nn.Linear(256, 256, bias=False).bfloat16(), rank=8)
nn.init.normal_(layer.lora_B, std=0.02)
kept = layer.weight.clone()
for _ in range(100):
    layer.merge_weights()
    layer.unmerge_weights()
exactly = torch.equal(layer.weight, kept)

fig, ax = figure(7, 2.6)
for (name, course), color, style in zip(courses.items(), (ACCENT, GREYS[0], GREYS[2]), ("-", "--", ":"), strict=True):
    ax.plot(range(1, 101), [100 * value for value in course], color=color, linestyle=style, label=name)
ax.set(xlabel="rounds of two swaps", ylabel="distance from W, %", ylim=(0, None))
ax.legend(loc="center right")
show(fig, alt="Distance of the weight from where it began, in per cent, over 100 rounds of adding and subtracting: "
     "it grows for bf16 and fp16 and stays near zero for fp32.")  # fmt: skip
lessons.measured("08.f", f"{courses['fp16'][-1]:.2%} and {courses['bf16'][-1]:.2%}")
claim(
    26,
    f"after 100 rounds W has moved by {courses['fp16'][-1]:.2%} in fp16, {courses['bf16'][-1]:.2%} in bf16 and "
    f"{courses['fp32'][-1]:.1e} in fp32; every sum rounds. Keeping the original and putting it back: bit-equal after 100 "
    f"rounds in bf16 ({exactly}).",
    courses["bf16"][-1] > courses["fp16"][-1] > 0 and exactly,
)

# %% [markdown]
# Two kinds of drift. In bf16 the weights are coarse: they soon land on values from which every sum and difference rounds
# back to the same place, and stay there, wrong. In fp16 the steps are finer and the walk goes on. Neither is loud: the
# model just gets a little worse with every switch. The way out is not to compute what one can remember.
#
# ## Exercise 08.2: merge, and take it back
#
# Write a class `Mergeable(linear, A, B, scaling)` with `forward`, `merge` and `unmerge`. Merging
# twice must be harmless, and unmerging must give every bit back, in fp16 too.

# %%
class Mergeable(nn.Module):
    def __init__(self, linear, A, B, scaling):
        super().__init__()
        raise NotImplementedError

    def forward(self, x): ...

    def merge(self): ...

    def unmerge(self): ...


lessons.check("08.2", Mergeable);

# %% [markdown]
# ## 6. Several adapters in one model
#
# Train one adapter for each house, save both, and load both into a fresh base. The files are PEFT's own
# (`adapter_model.safetensors`, `adapter_config.json`).

# %%
folder = Path(tempfile.mkdtemp())
for name in ("house A", "house B"):
    torch.manual_seed(0)
    model = apply_lora_to_model(copy.deepcopy(base), rank=8, target_modules="all-linear")
    fit(model, training[name], 80, 5e-3, lora_parameters(model))
    save_adapter(model, folder / name[-1])

shared = copy.deepcopy(base)
for name in "AB":
    print(load_adapter(shared, folder / name, name=name))
    print(f"   {sum(f.stat().st_size for f in (folder / name).iterdir()) / 1e3:.0f} kB on disk, "
          f"base {sum(p.numel() * 4 for p in base.parameters()) / 1e3:.0f} kB")  # fmt: skip

# %% [markdown]
# The reports say that every tensor in the file found its layer. Loading is strict: a name that does not fit is an error,
# for an adapter that is half loaded answers nonsense and reports nothing.
#
# Loaded adapters rest beside the weights; `set_adapter` makes one the active one by exchanging parameters, without
# touching W. So nothing can drift. 004's own questions ask what can go wrong with LoRA, and a reader answers: with one
# adapter per task, who knows which to use for a request that belongs to no task? **Write down your guess**: how well
# does adapter A do in house B, and in the language the base was trained on? And the sum of both adapters?

# %%
lessons.guess("08.g", "how well does adapter A do in house B, in the old language? And the sum of both, in house A?")
add_weighted_adapter(shared, ["A", "B"], [1.0, 1.0], "sum", combination_type="cat")
table = {"no adapter": {name: accuracy(base, rows) for name, rows in testing.items()}}
for adapter in ("A", "B", "sum"):
    set_adapter(shared, adapter)
    table[f"adapter {adapter}"] = {name: accuracy(shared, rows) for name, rows in testing.items()}

fig, ax = figure(6, 2.4)
grid = torch.tensor([list(row.values()) for row in table.values()])
ax.imshow(grid, cmap="Greys", vmin=0.75, vmax=1.2, aspect="auto")
for i in range(grid.shape[0]):
    for j in range(grid.shape[1]):
        own = grid[i, j] == grid[:, j].max()
        ax.text(j, i, f"{grid[i, j]:.1%}", ha="center", va="center", fontweight="bold" if own else "normal")
ax.set_xticks(range(3), DIALECTS)
ax.set_yticks(range(4), table)
ax.tick_params(length=0)
ax.set_title("held-out tokens right; bold: best for this house")
show(fig, alt="A table of accuracies: no adapter, adapter A, adapter B and their sum against the shipped language, "
     "house A and house B. Each adapter is best in its own house and no help elsewhere.")  # fmt: skip

lessons.measured(
    "08.g",
    f"{table['adapter A']['house B']:.1%}, {table['adapter A']['as shipped']:.1%}, {table['adapter sum']['house A']:.1%}",
)
claim(
    56,
    f"adapter A: house A {table['adapter A']['house A']:.1%}, house B {table['adapter A']['house B']:.1%}, the old "
    f"language {table['adapter A']['as shipped']:.1%} (no adapter {table['no adapter']['as shipped']:.1%}). The sum of "
    f"both: {table['adapter sum']['house A']:.1%} and {table['adapter sum']['house B']:.1%}. So the reader has a point: an "
    "adapter serves its task, hurts elsewhere, and adapters do not add up. But the base is untouched, and the choice can "
    "be made anew for every request.",
    table["adapter A"]["house A"] > table["no adapter"]["house A"] + 0.05
    and table["adapter A"]["as shipped"] < table["no adapter"]["as shipped"] - 0.05
    and max(table["adapter sum"]["house A"], table["adapter sum"]["house B"]) < table["adapter B"]["house B"],
)

# %% [markdown]
# Which adapter serves a request can be chosen request by request, even within one batch: the base product is computed
# once, then each adapter adds its thin products to its own rows.

# %%
rows = 12
mixed = torch.stack([testing[name][0][i] for i in range(rows // 3) for name in DIALECTS])
names = [None, "A", "B"] * (rows // 3)
with torch.no_grad(), adapters_by_row(shared, names):
    together = shared(mixed)
with torch.no_grad():
    for adapter in (None, "A", "B"):
        mine = [i for i, name in enumerate(names) if name == adapter]
        if adapter is None:
            alone = base(mixed[mine])
        else:
            set_adapter(shared, adapter)
            alone = shared(mixed[mine])
        print(f"{adapter or 'base'}: rows in the mixed batch differ from a batch of their own by "
              f"{(together[mine] - alone).abs().max():.0e}")  # fmt: skip

# %% [markdown]
# ## Exercise 08.3: an adapter for each row
#
# Write `forward_rows(x, W, adapters, names)` for x (batch, T, in): row i gets the adapter
# `adapters[names[i]] = (A, B, scaling)`, or none. The checker counts FLOPs: the base product may happen only once.

# %%
def forward_rows(x, W, adapters, names):
    raise NotImplementedError


lessons.check("08.3", forward_rows);

# %% [markdown]
# ## 7. Which layers?
#
# 000 and 001 report that Q and V are best, and 001 gives a reason against K. The source is table 5 of the LoRA paper
# (Hu et al. 2021): GPT-3, 18 million trained parameters spent in seven ways, scored on WikiSQL (questions to database
# queries) and MNLI (does one sentence follow from another?). The numbers below are quoted from there.
# First check that the seven budgets are equal; then repeat the experiment in small. **Write down your guess** of the
# order, including Q, K, V and O together at rank 2.

# %%
lessons.guess("08.h", "the order of q, k, v, o, qk, qv, qkvo, from the worst?")
PAPER = {  # Hu et al. 2021, table 5: rank, WikiSQL, MNLI (validation accuracy)
    "q": (8, 70.4, 91.0), "k": (8, 70.0, 90.8), "v": (8, 73.0, 91.0), "o": (8, 73.2, 91.3),
    "qk": (4, 71.4, 91.3), "qv": (4, 73.7, 91.3), "qkvo": (2, 73.7, 91.7),
}  # fmt: skip
GPT3_LAYERS, GPT3_WIDTH = 96, 12288
budgets = {name: GPT3_LAYERS * len(name) * 2 * GPT3_WIDTH * rank for name, (rank, *_) in PAPER.items()}
print("trained parameters in the paper:", ", ".join(f"{name} {count:,}" for name, count in budgets.items()))

reached = {}
for name, (rank, *_) in PAPER.items():
    torch.manual_seed(0)
    model = copy.deepcopy(base)
    apply_lora_to_model(model, rank=rank, lora_alpha=2 * rank, target_modules=[f"{letter}_proj" for letter in name])
    fit(model, training["house A"], 60, 1e-2, lora_parameters(model))
    reached[name] = accuracy(model, testing["house A"])

fig, (left, right) = figure(7.5, 2.6, columns=2)
labels = [f"{name.upper()}, r = {rank}" for name, (rank, *_) in PAPER.items()]
for ax, values, title in (
    (left, [wikisql for _, wikisql, _ in PAPER.values()], "GPT-3 on WikiSQL, % (quoted)"),
    (right, [100 * value for value in reached.values()], "our miniature in house A, %"),
):
    lessons.dots(ax, labels, values, accent=5, form="{:.1f}")
    ax.set_title(title)
right.set_yticklabels([])
show(fig, alt="Two rows of dots over seven choices of layers at equal budget: the LoRA paper's WikiSQL accuracies, in "
     "which V and O do better than Q and K, and the same experiment with our small model.")  # fmt: skip
lessons.measured("08.h", ", ".join(sorted(reached, key=reached.get)) + " in our miniature")
claim(
    29,
    f"quoted: Q+V {PAPER['qv'][1:]}, all four at rank 2 {PAPER['qkvo'][1:]}, at equal budgets of "
    f"{budgets['qv'] / 1e6:.2f} M. So Q+V is not best, all four are as good or better. Nor is K the odd one: K alone "
    f"{PAPER['k'][1:]}, Q alone {PAPER['q'][1:]}. In our miniature: "
    + ", ".join(f"{name.upper()} {value:.1%}" for name, value in reached.items()) + ".",
    len(set(budgets.values())) == 1
    and all(four >= two for four, two in zip(PAPER["qkvo"][1:], PAPER["qv"][1:], strict=True))
    and abs(PAPER["k"][1] - PAPER["q"][1]) < 0.5,  # the paper's own spread on WikiSQL is ±0.5
)  # fmt: skip

# %% [markdown]
# In the miniature, as in the paper, V and O do more than Q and K. A plausible reason: Q and K only decide *where* a
# position looks, V and O carry *what* is passed on, and our new words are a matter of what. But it is one task and one
# model. A common choice today is to adapt all linear layers, those of the feed-forward part too, at a small rank.
#
# ## 8. The figures for GPT-3
#
# 004 quotes section 4.2 of the paper: memory in training from 1.2 TB to 350 GB, "up to 2/3"; checkpoints from 350 GB
# to 35 MB, "10,000 times"; "25 % faster". No one here has a GPT-3, but the arithmetic can be done. **Write down your
# guess**: with which bytes per parameter do 1.2 TB and 2/3 come out?
#
# It also tells of Alpaca, a LLaMA-7B: three hours on 8 A100s in full, five on a single RTX 4090 with LoRA. **Write down
# your guess**: how many GB are its states in full fine-tuning, and its peak with LoRA?

# %%
lessons.guess("08.i", "with which bytes per parameter does 1.2 TB come out?")
lessons.guess("08.j", "LLaMA-7B: how many GB of states in full fine-tuning, how many at the peak with LoRA?")
N = 175e9
frozen = 2 * N  # fp16 weights, all that is left of the base
counted = {
    "fp16 weights + fp16 Adam moments": 2 + 4,
    "the same + fp16 gradients": 2 + 2 + 4,
    "mixed precision, all states": 2 + 2 + 4 + 8,
}
for name, per in counted.items():
    print(f"{name:34} {per * N / 1e12:.2f} TB; LoRA keeps {frozen / 1e9:.0f} GB of it, saves {1 - frozen / (per * N):.0%}")
per_parameter = 1.2e12 / N
lessons.measured("08.i", f"{per_parameter:.1f}")
claim(
    31,
    f"1.2 TB is {per_parameter:.1f} bytes per parameter, 350 GB is exactly the fp16 weights. \"Up to 2/3\" fits weights "
    f"with two 16-bit moments ({1 - frozen / (6 * N):.0%}); with fp32 states the share would be "
    f"{1 - frozen / (16 * N):.0%}. What goes is optimizer state and gradients; weights and activations stay. (Hu et al. "
    "2021, section 4.2; how they counted is not said.)",
    frozen == 350e9 and abs(1 - frozen / (6 * N) - 2 / 3) < 1e-9 and 6 < per_parameter < 8,
)

alpaca, on_one = 8 * 3, 1 * 5  # GPU hours
full_7b, lora_7b = (memory.estimate("llama-7b", method, "bfloat16", batch=1, seq=512, checkpoint=True) for method in ("full", "lora"))
lessons.measured("08.j", f"{full_7b.states / 1e9:.0f} GB and {lora_7b.peak / 1e9:.1f} GB")
claim(
    67,
    f"{alpaca} against {on_one} GPU hours, as 004 quotes them; we have neither card. What can be counted is why one card is "
    f"enough: LLaMA-7B takes {full_7b.states / 1e9:.0f} GB of states in full fine-tuning, which even one A100 of 80 GB does not hold, and "
    f"{lora_7b.peak / 1e9:.1f} GB at its peak with LoRA, which a 4090 of 24 GB does. Whether the models are equal no count says.",
    full_7b.states > 80e9 and lora_7b.peak < 24e9,
)

adapter = GPT3_LAYERS * 2 * 2 * GPT3_WIDTH * 4  # q and v, r = 4
times = frozen / (2 * adapter)
full_speed, lora_speed = 32.5, 43.1  # tokens per second on one V100, Hu et al. 2021, section 4.2
claim(
    32,
    f"r = 4 on Q and V: {adapter / 1e6:.2f} M parameters, {2 * adapter / 1e6:.1f} MB in fp16, {times:,.0f} times less than "
    f"350 GB. \"25 % faster\" is {lora_speed / full_speed - 1:+.0%} throughput ({full_speed} → {lora_speed} tokens per second "
    f"per V100), that is {full_speed / lora_speed - 1:+.0%} time.",
    round(adapter / 1e6, 2) == 18.87 and round(times) == 9272 and round(100 * (1 - full_speed / lora_speed)) == 25,
)

# %% [markdown]
# ## 9. Is low rank a law?
#
# 003 and 004 rest LoRA on a **low intrinsic dimension**: of all directions in which the parameters could move, few are
# needed (Li et al. 2018; Aghajanyan et al. 2020). It can be measured: choose d random directions once and train only
# the d coordinates along them. The smallest d that reaches 90 % of what full training gains is the intrinsic
# dimension of this task for this model. Here every parameter is tied to one of d coordinates with a random sign.
#
# **Write down your guess** of d, for a model with this many parameters, and whether there is a task without one.

# %%
lessons.guess("08.k", "which d is enough?")
names, shapes = zip(*((name, p.shape) for name, p in base.named_parameters()), strict=True)
start = torch.cat([p.detach().flatten() for p in base.parameters()])
draws = torch.Generator().manual_seed(3)
signs = torch.randint(0, 2, start.shape, generator=draws) * 2.0 - 1


def fit_subspace(d, rows, steps=100, lr=2e-3):
    """Train d coordinates of a random subspace of all parameters."""
    place = torch.randint(d, start.shape, generator=draws)
    z = torch.zeros(d, requires_grad=True)
    optimizer = AdamW([z], lr=lr, weight_decay=0.0)
    order = torch.Generator().manual_seed(0)

    def parameters():
        parts = (start + signs * z[place]).split([shape.numel() for shape in shapes])
        return {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}

    for _ in range(steps):
        tokens, labels = draw(rows, order)
        loss = loss_of(torch.func.functional_call(base, parameters(), tokens), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model = house.new_model()
    model.load_state_dict({name: part.detach() for name, part in parameters().items()})
    return model


untrained = accuracy(base, testing["house A"])
everything = copy.deepcopy(base)
fit(everything, training["house A"], 100, 2e-3)
ceiling = accuracy(everything, testing["house A"])
dimensions = (64, 1024, 4096, 16384)
by_dimension = [accuracy(fit_subspace(d, training["house A"]), testing["house A"]) for d in dimensions]
goal = untrained + 0.9 * (ceiling - untrained)
print(f"{start.numel():,} parameters: {untrained:.1%} → {ceiling:.1%}; 90 % of the gain is {goal:.1%}")
print({d: f"{value:.1%}" for d, value in zip(dimensions, by_dimension, strict=True)})
lessons.measured(
    "08.k",
    ", ".join(f"d = {d}: {value:.1%}" for d, value in zip(dimensions, by_dimension, strict=True)) + f"; the goal is {goal:.1%}",
)

# %% [markdown]
# And now a task made against it. One linear layer has to learn a ΔW that is planted: once of rank 4, once with all
# its singular values about equal. What the best matrix of rank 8 can reach is known from lesson 07: the singular
# values cut off.

# %%
torch.manual_seed(0)
x, W = torch.randn(2048, 64), torch.randn(64, 64) / 8
planted = {
    "rank 4": torch.randn(64, 4) @ torch.randn(4, 64) / 64,
    "full rank": torch.linalg.qr(torch.randn(64, 64)).Q / 4,
}
left_over, bound = {}, {}
for name, delta in planted.items():
    layer = LoRALinear(nn.Linear(64, 64, bias=False), rank=8)
    layer.base_layer.weight.data.copy_(W)
    optimizer = AdamW(lora_parameters(layer), lr=1e-2, weight_decay=0.0)
    target = x @ (W + delta).t()
    for _ in range(300):
        optimizer.zero_grad()
        F.mse_loss(layer(x), target).backward()
        optimizer.step()
    left_over[name] = ((layer.delta_weight() - delta).norm() / delta.norm()).item()
    squares = torch.linalg.svdvals(delta) ** 2
    bound[name] = (squares[8:].sum() / squares.sum()).sqrt().item()

fig, (left, right) = figure(7.5, 2.4, columns=2)
left.plot(dimensions, by_dimension, color=ACCENT, linestyle="-", marker="o")
for height, text, at, side, end in (
    (untrained, "base", dimensions[-1], "bottom", "right"),
    (ceiling, "all parameters", dimensions[0], "bottom", "left"),
    (goal, "90 % of the gain", dimensions[0], "top", "left"),
):
    left.axhline(height, color=GREYS[1], linewidth=0.8, linestyle=":")
    left.text(at, height, text, va=side, ha=end, color=GREYS[1], fontsize=8)
left.margins(y=0.12)
left.set(xscale="log", xlabel=f"random directions trained, of {start.numel():,}", ylabel="held-out tokens right")
bars(right, ["planted rank 4", "  best of rank 8", "planted full rank", "  best of rank 8"],
     [100 * v for pair in zip(left_over.values(), bound.values(), strict=True) for v in pair], "%", accent=2, form="{:.1f}")  # fmt: skip
right.set_title("error of ΔW after LoRA, r = 8")
show(fig, alt="Left: accuracy against the number of random directions trained, rising from the base's level towards that "
     "of full training. Right: LoRA of rank 8 learns a planted rank-4 update nearly exactly and leaves over nine "
     "tenths of a planted full-rank one.")  # fmt: skip

reached_at = next((d for d, value in zip(dimensions, by_dimension, strict=True) if value >= goal), None)
claim(
    34,
    f"our task: 90 % of the gain with {'more than ' + str(dimensions[-1]) if reached_at is None else reached_at} of "
    f"{start.numel():,} directions; planted rank 4: LoRA of rank 8 leaves {left_over['rank 4']:.1%}; planted full rank: it "
    f"leaves {left_over['full rank']:.0%}, and no rank-8 update does better than {bound['full rank']:.0%}. Low rank is a "
    "property of a task and a model. It is often found, and it is a hypothesis, not a law (Aghajanyan et al. 2020).",
    left_over["rank 4"] < 0.05 and left_over["full rank"] > 0.9 and by_dimension[-1] > by_dimension[0],
)

# %%
if gpu():
    print("On a GPU try a larger model: handtuned finetune --model DIR --method lora --target-modules q_proj v_proj")
else:
    skipped("the same sweep over target modules on a model of a billion parameters")

# %% [markdown]
# ## What to remember
#
# - Freeze everything, then let A and B train; select layers by whole names; never nest.
# - dW falls away, dx does not: a LoRA step takes two thirds of the FLOPs, not a few per cent.
# - Merged, an adapter is free. A merged layer must know that it is merged, and must keep the original to go back.
# - Switch by exchanging A and B. Within one batch each row can have its own.
# - Published figures are worth recomputing: budgets, bytes and percentages tell how they were counted.
#
# On a real model: `handtuned finetune --method lora --target-modules q_proj v_proj`, then `handtuned merge --adapter handtuned-out/run-1 --out merged`.
#
# Next: [09. How do 4 bits hold a weight?](09_four_bits.ipynb)

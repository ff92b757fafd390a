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
# # 04. Where does memory go?
#
# Training a model takes many times the memory of the model itself. In this lesson you count every byte of a training step, predict the peak of one before it runs, and decode a figure in the study documents that nobody explained: "28.5 G".
#
# You need Python and a little torch, and from [lesson 03](03_fp16_training.ipynb) what a master weight is: an FP32 copy of a 16-bit parameter that small updates can add up in.
#
# The claims examined here come from document 001 (efficient training) and document 002 (efficient network training).
#
# Terms: model states 模型状态, parameter 参数, gradient 梯度, optimizer state 优化器状态, activation 激活值, peak memory 峰值显存, logits 输出层分数, sequence length 序列长度, context length 上下文长度

# %%
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from handtuned import lessons, memory
from handtuned.memory.recommend import recommend
from handtuned.amp import MasterWeights
from handtuned.nn import linear_cross_entropy
from handtuned.nn.live_memory import LiveMemory
from handtuned.nn.transformer import Transformer, TransformerBlock
from handtuned.optim import AdamW
from handtuned.memory.model_shapes import PRESETS, Shape
from torch import nn

GB, GIB = 10**9, 2**30

# %% [markdown]
# **A word on units.** 1 GB is 10⁹ bytes. 1 GiB is 2³⁰ bytes, 7.4 % more. Tools that say "G" mean either; GPUs are sold in GiB and called GB. Here every figure says which.
#
# ## Four tenants
#
# | tenant | what it is | it grows with |
# |---|---|---|
# | parameters | the numbers that are learnt | the model |
# | gradients | one number per parameter: which way the loss falls | the model |
# | optimizer state | what the optimizer remembers; Adam keeps two running means, *m* and *v* | the model |
# | activations | results of the forward pass that the backward pass needs again | model × batch × sequence |
#
# The first three are the *model states*. Let us meet them on a model of four numbers.
#
# **Write down your guess:** a model has four FP32 parameters and is trained with Adam. How many bytes are alive between two steps if the gradients are not thrown away?

# %%
lessons.guess("04.a", "how many bytes are alive between two steps?")
w = np.array([0.5, -1.0, 2.0, 0.25], dtype=np.float32)  # parameters
x, target = np.array([1, 2, 3, 4], dtype=np.float32), np.float32(3.0)
m, v = np.zeros_like(w), np.zeros_like(w)  # Adam's two moments

g = 2 * (w @ x - target) * x  # gradient of (w·x − target)²
m += (1 - 0.9) * (g - m)
v += (1 - 0.999) * (g * g - v)
w -= 0.1 * (m / (1 - 0.9)) / (np.sqrt(v / (1 - 0.999)) + 1e-8)

for name, array in {"parameters": w, "gradients": g, "m": m, "v": v}.items():
    print(f"{name:11} {array.nbytes:3} bytes  {array}")
print(f"together    {sum(a.nbytes for a in (w, g, m, v)):3} bytes = {sum(a.nbytes for a in (w, g, m, v)) // 4} per parameter")
lessons.measured("04.a", f"{sum(a.nbytes for a in (w, g, m, v))} bytes")

# %% [markdown]
# Sixteen bytes per parameter: 4 + 4 + 4 + 4. Torch keeps exactly the same, and so a small layer is enough to know what a model of 7 billion parameters takes. Document 001 says: 28 GB of parameters, 28 GB of gradients, 56 GB of optimizer state.

# %%
torch.manual_seed(0)
layer = nn.Linear(300, 200, bias=False)
optimizer = torch.optim.AdamW(layer.parameters())
layer(torch.randn(8, 300)).square().mean().backward()
optimizer.step()

state = optimizer.state[layer.weight]
bytes_per_parameter = {
    "parameters": layer.weight.nbytes / layer.weight.numel(),
    "gradients": layer.weight.grad.nbytes / layer.weight.numel(),
    "optimizer state": (state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes) / layer.weight.numel(),
}
at_7b = {name: count * 7e9 / GB for name, count in bytes_per_parameter.items()}
print(at_7b)
lessons.claim(
    44,
    measured=f"torch keeps {', '.join(f'{c:g}' for c in bytes_per_parameter.values())} bytes per parameter, so 7 billion take "
    f"{', '.join(f'{c:g}' for c in at_7b.values())} GB. (In GiB, as a GPU counts: {sum(at_7b.values()) * GB / GIB:.1f} together.)",
    holds=list(at_7b.values()) == [28, 28, 56],
)

# %% [markdown]
# The library does this sum in `estimate`. Its table of states is short enough to read whole:

# %%
from handtuned.memory.estimate import state_bytes

lessons.source(state_bytes)

# %% [markdown]
# ## Does mixed precision halve it?
#
# Documents 001 and 002 say that 16-bit training halves memory. Weights and gradients do shrink to 2 bytes. But the FP32 masters come on top.
#
# **Write down your guess:** bytes of model states per parameter, FP32 against BF16 with masters. And what about the activations: exactly half, more, or less?
#
# The model below is a small Llama-like decoder from the library. `loss_of` runs it and takes the loss. `memory.measure` watches every tensor that is made and dies.

# %%
lessons.guess(
    "04.b",
    "bytes of states per parameter, FP32 and BF16 with masters; and what share of the activations is left in BF16?",
)
SMALL = Shape("6 layers of 256", layers=6, hidden=256, heads=4, kv_heads=2, head_dim=64, intermediate=688, vocab=2000)


def decoder(shape, dtype=torch.float32):
    torch.manual_seed(1)
    options = {"num_kv_heads": shape.kv_heads, "head_dim": shape.head_dim}
    model = Transformer(shape.vocab, shape.layers, shape.hidden, shape.heads, shape.intermediate, **options)
    return model.to(dtype)


def loss_of(model, tokens):
    x = model.model.embed_tokens(tokens)
    for block in model.model.layers:
        x = block(x)
    x = model.model.norm(x)
    return linear_cross_entropy(x[:, :-1], model.lm_head.weight, tokens[:, 1:]) / tokens[:, 1:].numel()


tokens = torch.randint(0, SMALL.vocab, (4, 128), generator=torch.Generator().manual_seed(2))
states, activations = {}, {}
for dtype in (torch.float32, torch.bfloat16):
    model = decoder(SMALL, dtype)
    optimizer = AdamW(model.parameters())
    masters = MasterWeights(model, optimizer)
    parameters = sum(p.numel() for p in model.parameters())

    forward = memory.measure(loss_of, model, tokens)  # its result holds the graph, and so the activations
    activations[dtype] = forward.after - forward.before
    forward.result.backward()
    gradients = sum(p.grad.nbytes for p in model.parameters())
    masters.collect_gradients()
    optimizer.step(**masters.step_arguments())  # steps the masters and rounds them into the model
    moments = sum(s["exp_avg"].nbytes + s["exp_avg_sq"].nbytes for s in optimizer.state.values())
    copies = sum(t.nbytes for t in masters.masters.values())
    weights = sum(p.nbytes for p in model.parameters())
    states[dtype] = [count / parameters for count in (weights, gradients, copies, moments)]
    print(f"{dtype!s:15}", *(f"{name} {c:g}" for name, c in zip(("weights", "gradients", "masters", "Adam"), states[dtype], strict=True)),
          f"= {sum(states[dtype]):g} bytes per parameter; kept after forward: {activations[dtype] / 1e6:.1f} MB")
lessons.measured(
    "04.b",
    f"{sum(states[torch.float32]):g} and {sum(states[torch.bfloat16]):g} bytes; {activations[torch.bfloat16] / activations[torch.float32]:.0%} of the activations",
)

# %%
share = activations[torch.bfloat16] / activations[torch.float32]
lessons.claim(
    8,
    measured=f"the states take {sum(states[torch.float32]):g} bytes per parameter in FP32 and {sum(states[torch.bfloat16]):g} in "
    f"BF16 with masters; what forward leaves behind shrinks to {share:.0%}, not to 50 %, because norms and the loss "
    "keep FP32 tensors",
    holds=sum(states[torch.float32]) == sum(states[torch.bfloat16]) == 16 and 0.5 < share < 0.75,
)

# %% [markdown]
# So mixed precision saves on activations and buys speed. It does not save on states. Whether it "halves memory" depends on which tenant pays most of the rent. Here is a 7B model at one row of 2048 tokens, by five methods. Each tenant is drawn at its fullest. They do not all reach that at the same time, so under the name stands the peak: the most that is alive at any one moment of the step. (With masters that is the optimizer step, when the 16-bit gradients become FP32 for a moment.)

# %%
def tenants(breakdown):
    """Each tenant at its fullest, in GB."""
    return {
        "weights": sum(breakdown[name] for name in ("weights", "quantization constants", "adapters")) / GB,
        "gradients": breakdown["gradients"] / GB,
        "Adam and masters": (breakdown["optimizer state"] + breakdown["master weights"]) / GB,
        "activations and logits": (breakdown.activations + breakdown["logits"]) / GB,
    }


methods = {
    "FP32": {},
    "BF16 + masters": {"dtype": "bfloat16"},
    "… checkpointed": {"dtype": "bfloat16", "checkpoint": True},
    "LoRA, BF16": {"method": "lora", "dtype": "bfloat16"},
    "QLoRA, BF16": {"method": "qlora", "dtype": "bfloat16"},
}
breakdowns = {name: memory.estimate("7b", batch=1, seq=2048, **settings) for name, settings in methods.items()}
parts = {name: [tenants(breakdown)[name] for breakdown in breakdowns.values()] for name in tenants(breakdowns["FP32"])}
labels = [f"{name}\npeak {breakdown.peak / GB:.0f} GB" for name, breakdown in breakdowns.items()]
fig, ax = lessons.figure(height=3.2)
lessons.stacked(ax, labels, parts, unit="GB", form="{:.0f}")
lessons.show(fig, alt="Stacked bars of the memory of a 7B model. FP32 and BF16 with masters both need 112 GB of states; "
             "checkpointing removes the activations; LoRA and QLoRA have almost no states beyond the weights.")

# %% [markdown]
# Read it row by row. In FP32 and in BF16 with masters the first three parts are equally long together: that was claim 8. The FP32 peak is *less* than its bar, because gradients are complete only when the activations have gone. Checkpointing ([lesson 05](05_trading_time_for_memory.ipynb)) removes activations and nothing else. LoRA ([lesson 07](07_low_rank_updates.ipynb)) freezes the weights, and a frozen weight has neither gradient nor state. QLoRA ([lesson 10](10_qlora.ipynb)) also packs the frozen weights, into about half a byte each.
#
# ## Activations: what backward needs again
#
# Take the gate in the middle of a SwiGLU block, `y = silu(a) · b` with `silu(a) = a · sigmoid(a)`, on four numbers. (SwiGLU is the feed-forward part of Llama-like models, `nn.TransformerBlock` in the library.) Its gradients are `da = dy · b · silu'(a)` and `db = dy · silu(a)`. So three arrays must survive until backward: *a*, *b* and *silu(a)*.

# %%
a, b = np.array([-1.0, 0.0, 1.0, 2.0]), np.array([3.0, -2.0, 0.5, 1.0])
sigma = 1 / (1 + np.exp(-a))
silu = a * sigma
y = silu * b

dy = np.ones(4)
da, db = dy * b * (sigma + silu * (1 - sigma)), dy * silu

a_t, b_t = torch.tensor(a, requires_grad=True), torch.tensor(b, requires_grad=True)
(F.silu(a_t) * b_t).sum().backward()
print("da", da, "db", db)
assert np.allclose(da, a_t.grad) and np.allclose(db, b_t.grad)

# %% [markdown]
# Autograd saves tensors through a pair of hooks, so one can watch it. This is everything that one block of our decoder keeps for four rows of 128 tokens, parameters left out.

# %%
block = TransformerBlock(256, 4, 688, num_kv_heads=2)
own = {p.untyped_storage().data_ptr() for p in block.parameters()}
seen = {}


def note(tensor):
    storage = tensor.untyped_storage()
    if tensor.dim() and storage.data_ptr() not in own:
        seen[storage.data_ptr()] = (str(tuple(tensor.shape)), storage.nbytes())
    return tensor


x = torch.randn(4, 128, 256, requires_grad=True)
with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
    out = block(x)
for shape in sorted({shape for shape, _ in seen.values()}, key=lambda s: -sum(n for t, n in seen.values() if t == s)):
    sizes = [size for other, size in seen.values() if other == shape]
    print(f"{len(sizes)} × {shape:20} {sum(sizes) / 1e6:6.2f} MB")

# %% [markdown]
# The tensors that are 688 wide are the MLP: gate, silu(gate), up, and their product. Those with four dimensions and 128 × 64 at the end are queries (4 heads), keys and values (2 heads). The plain (128, 64) are two tables of sines and cosines that tell attention where a token stands. The rest is as wide as the model, inputs of linears and of norms, or tiny: statistics, one number per token. Nearly all of it grows with the number of tokens, rows × sequence.
#
# `memory.estimate` counts the same without running anything: it sends the model's own step through tensors that have a size and no memory, and looks where each one was made and how long it lives. Six layers less five are one:

# %%
deep, shallow = (memory.estimate(replace(SMALL, layers=n), batch=4, seq=128) for n in (6, 5))
kinds = {name: deep[name] - shallow[name] for name in deep.lines if name.startswith("activations")}
for kind, count in kinds.items():
    print(f"{kind:30} {count / (4 * 128):6,.0f} bytes per token")
counted = memory.measure(lambda: block(x))
made = counted.after - counted.before  # the input was there before, the output was not: as large
print(f"estimated {sum(kinds.values()) / 1e6:.2f} MB, measured {made / 1e6:.2f} MB")

# %% [markdown]
# ## The decoded 28.5
#
# Document 002 gives 28.5 "G" as the activations of a 7B model with one row of 2048 tokens, as a rough estimate without a derivation. A known formula (Korthikanti et al. 2022, equation 2) counts a GPT layer in 16 bits:
#
# `bytes per layer = s · b · h · (34 + 5 · a · s / h)`
#
# with sequence *s*, batch *b*, hidden size *h*, and *a* heads. The 34 are
#
# | part | bytes per value of s·b·h |
# |---|---|
# | two LayerNorms: their inputs | 2 + 2 |
# | q, k, v: one shared input; the three results | 2 + 6 |
# | output projection: input, dropout mask | 2 + 1 |
# | MLP: input, GELU's input, second linear's input (4h wide each), dropout mask | 2 + 8 + 8 + 1 |
#
# and the 5 are what attention keeps for each pair of tokens and head: probabilities (2), their dropout mask (1), the dropped-out probabilities (2).
#
# **Write down your guess:** can a formula of 2022 be exact to the byte for a layer that you write yourself? Let us write one and measure.

# %%
lessons.guess("04.c", "is the formula of 2022 exact to the byte for a layer of your own?")
def gpt_layer(x, p, heads):
    rows, seq, hidden = x.shape

    def drop(t):
        return torch.native_dropout(t, 0.1, True)[0]

    normed = F.layer_norm(x, (hidden,), p["g1"], p["b1"])
    q, k, v = (F.linear(normed, p[name]).view(rows, seq, heads, -1).transpose(1, 2) for name in "qkv")
    scores = (q @ k.transpose(-2, -1)) / (hidden // heads) ** 0.5
    mixed = drop(scores.softmax(-1)) @ v
    x = x + drop(F.linear(mixed.transpose(1, 2).reshape(rows, seq, hidden), p["o"]))
    normed = F.layer_norm(x, (hidden,), p["g2"], p["b2"])
    return x + drop(F.linear(F.gelu(F.linear(normed, p["up"])), p["down"]))


torch.manual_seed(3)
rows, seq, hidden, heads = 2, 96, 128, 4
shapes = {"q": (hidden, hidden), "k": (hidden, hidden), "v": (hidden, hidden), "o": (hidden, hidden), "up": (4 * hidden, hidden),
          "down": (hidden, 4 * hidden), "g1": (hidden,), "b1": (hidden,), "g2": (hidden,), "b2": (hidden,)}
p = {name: nn.Parameter(torch.randn(shape, dtype=torch.bfloat16) * 0.1) for name, shape in shapes.items()}
x = torch.randn(rows, seq, hidden, dtype=torch.bfloat16, requires_grad=True)

run = memory.measure(gpt_layer, x, p, heads)
measured = run.after - run.before
formula = memory.korthikanti(rows, seq, hidden, heads, layers=1)
statistics = measured - formula
print(f"measured {measured:,} bytes, formula {formula:,}, the difference of {statistics:,} is "
      f"{statistics / (rows * seq):g} bytes per token: mean and 1/σ of the two LayerNorms")
lessons.measured(
    "04.c",
    f"all but {statistics / (rows * seq):g} bytes per token, the statistics of the two LayerNorms",
)

# %%
notes = memory.korthikanti(batch=1, seq=2048, hidden=4096, heads=32, layers=32)
fused = memory.korthikanti(batch=1, seq=2048, hidden=4096, heads=32, layers=32, flash=True)
lessons.claim(
    46,
    measured=f"s·b·h·(34 + 5·a·s/h) · 32 layers = {notes / GIB:g} GiB = {notes / GB:.1f} GB, so the notes' figure is GiB, and "
    f"adding it to 14 GB mixes units. A layer written by hand keeps what the formula says, {statistics / measured:.2%} more. "
    f"{1 - fused / notes:.0%} of it are stored scores: with fused attention {fused / GIB:g} GiB remain",
    holds=notes == 28.5 * GIB and fused == 8.5 * GIB and 0 <= statistics < 0.01 * measured,
)

# %% [markdown]
# The scores grow with the *square* of the sequence. Fused attention (Flash attention and its kin) computes them in tiles and keeps none; torch's `scaled_dot_product_attention` does so wherever it can.
#
# **Write down your guess:** for 512 tokens and 4 heads, how many times as many bytes does attention by hand keep for backward as the fused one? And 001 says that the activations of a 7B model take 10–50 GB with one row of 2048 tokens: how many GB is it, with and without fused attention?

# %%
lessons.guess("04.d", "512 tokens, 4 heads: how many times as many bytes does attention by hand keep?")
lessons.guess("04.e", "7B, one row of 2048 tokens: how many GB of activations, from the least to the most?")


def kept_by(attention):
    """Bytes that stay after forward, and the gradient of the queries, for 1 row, 4 heads, 512 tokens of 32."""
    torch.manual_seed(4)
    q, k, v = (torch.randn(1, 4, 512, 32, requires_grad=True) for _ in range(3))
    run = memory.measure(attention, q, k, v)
    attention(q, k, v).square().sum().backward()
    return run.after - run.before, q.grad


scores_kept, by_hand = kept_by(lambda q, k, v: (q @ k.mT / 32**0.5).softmax(-1) @ v)
none_kept, by_tiles = kept_by(F.scaled_dot_product_attention)
lessons.measured("04.d", f"{scores_kept / none_kept:.0f} times")
lessons.claim(
    60,
    measured=f"512 tokens, 4 heads: attention by hand keeps {scores_kept / 1e6:.2f} MB, torch's fused one {none_kept / 1e6:.2f} MB, and the "
    f"gradients agree to {(by_hand - by_tiles).abs().max():.0e}. What is not written to memory need not be waited for: on GPUs the paper measured "
    "a speedup of 15 % for BERT-large and of 3 times for GPT-2 (Dao et al. 2022, abstract); speed is not measured here",
    holds=none_kept < scores_kept / 8 and torch.allclose(by_hand, by_tiles, rtol=1e-4, atol=1e-5),
)

ways = {f"{dtype}, {'fused attention' if flash else 'scores kept'}": memory.estimate("7b", dtype=dtype, batch=1, seq=2048, flash=flash).activations / GB
        for dtype in ("float32", "bfloat16") for flash in (True, False)}
lessons.measured("04.e", f"{min(ways.values()):.1f} to {max(ways.values()):.1f} GB")
lessons.claim(
    59,
    measured="activations of a Llama-like 7B model, one row of 2048 tokens: " + ", ".join(f"{name} {size:.1f} GB" for name, size in ways.items())
    + ". All lie in the range, in 001's FP32 as in 16 bits; a checkpoint in every layer leaves "
    f"{memory.estimate('7b', batch=1, seq=2048, checkpoint=True).activations / GB:.1f} GB",
    holds=all(10 < size < 50 for size in ways.values()),
)

# %%
lengths = 2 ** np.arange(9, 15)
fig, ax = lessons.figure(height=2.6)
for flash, style, color, name in ((False, "-", lessons.ACCENT, "scores kept"), (True, "--", "0.2", "fused attention")):
    sizes = [memory.korthikanti(1, int(s), 4096, 32, 32, flash) / GIB for s in lengths]
    ax.plot(lengths, sizes, style, color=color, marker="o", markersize=3)
    ax.text(lengths[-1] * 1.1, sizes[-1], name, color=color, va="center")
ax.axvline(2048, color="0.7", lw=0.8)
ax.text(2048 * 0.95, 700, "the notes' case", color="0.4", ha="right")
ax.set(xscale="log", yscale="log", xlabel="tokens in a row", ylabel="GiB of activations", xlim=(450, 60000))
ax.set_xticks(lengths, [str(s) for s in lengths])
ax.minorticks_off()
lessons.show(fig, alt="Activations of a 7B GPT against sequence length: with stored scores they grow with the square, with fused "
             "attention in proportion.")

# %% [markdown]
# ## A step, moment by moment
#
# The tenants are not all at home at the same time. Forward piles up activations. Backward frees them one layer after the other while gradients appear. The optimizer comes when the activations have gone. The *peak* is the fullest moment of this film, and it is what must fit.

# %%
model = decoder(SMALL)
optimizer = AdamW(model.parameters())
loss_of(model, tokens).backward()
optimizer.step()  # once, so that m and v are there
optimizer.zero_grad(set_to_none=True)

with LiveMemory("cpu", keep_history=True) as live:
    loss = loss_of(model, tokens)
    after_forward = len(live.history)
    loss.backward()
    after_backward = len(live.history)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

def standing(model, optimizer):
    """Bytes of weights and moments: this notebook holds other tensors too, which are not to be counted."""
    moments = sum(state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes for state in optimizer.state.values())
    return sum(p.nbytes for p in model.parameters()) + moments


base = standing(model, optimizer) / 1e6
course = base + np.array(live.history) / 1e6

fig, ax = lessons.figure(height=2.8)
ax.fill_between(range(len(course)), base, course, color="0.85")
ax.fill_between(range(len(course)), 0, base, facecolor="0.95", hatch="..", edgecolor="0.8", lw=0)
ax.plot(course, color="0.2", lw=0.8)
ax.axhline(base, color="0.5", lw=0.8, ls=":")
top = course.max()
ax.plot(course.argmax(), top, "o", color=lessons.ACCENT, markersize=5)
ax.annotate(f"peak {top:.0f} MB", (course.argmax(), top), (8, 2), textcoords="offset points", color=lessons.ACCENT)
for edge in (after_forward, after_backward):
    ax.axvline(edge, color="0.6", lw=0.8, ls="--")
for middle, name in ((after_forward / 2, "forward, loss"), ((after_forward + after_backward) / 2, "backward"),
                     (after_backward + 0.5 * (len(course) - after_backward), "step")):
    ax.text(middle, top * 1.12, name, ha="center")
ax.set(ylim=(0, top * 1.22), xlabel="tensors made and freed, in order", ylabel="MB alive")
ax.text(len(course) * 0.01, base * 0.4, "weights, m, v", backgroundcolor="white")
lessons.show(fig, alt="Memory over one training step: it climbs during forward, falls in steps during backward while gradients "
             "appear, and returns to the level of weights and moments after the optimizer step.")

# %% [markdown]
# Three things to see. The six steps up are the six layers, and each comes down again in backward. The way down is flatter than the way up, since gradients appear while activations go. And the peak stands at the loss, where the logits are: a small model with a large vocabulary peaks there, a deep model with long rows in the middle.
#
# ## Predict a peak within 5 %
#
# The library's `estimate` does what you have just done, without the numbers: it writes down what is alive at each moment of the step (the loss, the backward pass of each layer, the optimizer's step) and takes the largest sum. It needs only sizes, so it can be asked about a model that does not fit.
#
# **Write down your guess** in MB for the step above at 8 rows of 256 tokens instead of 4 of 128. Then let `estimate` predict, and measure.

# %%
lessons.guess("04.f", "the peak of the larger step, in MB?")
def training_step(model, optimizer, tokens):
    loss_of(model, tokens).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


larger = torch.randint(0, SMALL.vocab, (8, 256), generator=torch.Generator().manual_seed(4))
predicted = memory.estimate(SMALL, "full", torch.float32, batch=8, seq=256)
measured = memory.measure(training_step, model, optimizer, larger)
taken = standing(model, optimizer) + measured.added
error = predicted.peak / taken - 1
print(predicted)
print(f"\nmeasured {taken / 1e6:.1f} MB, predicted {predicted.peak / 1e6:.1f} MB: off by {error:+.2%}")
lessons.measured("04.f", f"{taken / 1e6:.1f} MB")
assert abs(error) < 0.05

# %%
if lessons.gpu():
    on_gpu = decoder(SMALL).cuda()
    gpu_optimizer = AdamW(on_gpu.parameters())
    training_step(on_gpu, gpu_optimizer, larger.cuda())
    on_device = memory.measure(training_step, on_gpu, gpu_optimizer, larger.cuda(), device="cuda")
    print(torch.cuda.get_device_name(), on_device, f"prediction off by {predicted.peak / on_device.peak - 1:+.1%}")
else:
    lessons.skipped("the same prediction against what CUDA's caching allocator counts")

# %% [markdown]
# ## The tips of document 002
#
# Its list for the case that memory runs out begins with: do not compute metrics on an array of batch × sequence × vocabulary. Such arrays are called *logits*: one score for every word of the vocabulary, for every token. The second tip is 16 bits, then fused attention, a smaller batch with accumulation ([lesson 06](06_faking_a_big_batch.ipynb)), a shorter context, ZeRO ([lesson 11](11_many_machines.ipynb)).
#
# **Write down your guess:** how large are the logits of one row of 2048 tokens with Qwen's 151,936 words, in FP32?

# %%
lessons.guess("04.g", "how many GB are the logits of one row of 2048 tokens?")
qwen = PRESETS["qwen2.5-1.5b"]
logits_gb = 2048 * qwen.vocab * 4 / GB

torch.manual_seed(5)
hidden_states = torch.randn(512, 128, requires_grad=True)
head = torch.randn(20_000, 128) * 0.05
labels = torch.randint(0, 20_000, (512,))


def whole():
    F.cross_entropy(hidden_states @ head.T, labels, reduction="sum").backward()


def in_chunks():
    linear_cross_entropy(hidden_states, head, labels, chunk=32).backward()


peaks, gradients = {}, {}
for function in (whole, in_chunks):
    hidden_states.grad = None
    peaks[function] = memory.measure(function).added
    gradients[function] = hidden_states.grad
same = torch.allclose(gradients[whole], gradients[in_chunks], atol=1e-5)
print(f"one array of logits here: {512 * 20_000 * 4 / 1e6:.1f} MB; peak with all at once {peaks[whole] / 1e6:.1f} MB, "
      f"in chunks of 32 tokens {peaks[in_chunks] / 1e6:.1f} MB")


@torch.no_grad()
def evaluate(keep):
    """An evaluation of 16 batches that hands compute_metrics what `keep` makes of their logits."""
    return [keep(hidden_states[start : start + 32] @ head.T) for start in range(0, 512, 32)]


all_scores, best_words = (memory.measure(evaluate, keep).added for keep in (lambda logits: logits, lambda logits: logits.argmax(-1)))
plain = dict(dtype="float32", batch=8, seq=2048, flash=False, logits="full")
tips = {"16 bits": {"dtype": "bfloat16"}, "flash attention": {"flash": True}, "batch 1, accumulated": {"batch": 1, "accumulation_steps": 8},
        "half the context": {"seq": 1024}, "ZeRO-2 on 8 GPUs": {"zero": 2, "world_size": 8}}
without = memory.estimate("qwen2.5-1.5b", **plain).peak
saves = {tip: 1 - memory.estimate("qwen2.5-1.5b", **(plain | change)).peak / without for tip, change in tips.items()}
print(f"the 1.5B Qwen, 8 rows of 2048 tokens, FP32: {without / GB:.0f} GB. Each tip alone saves",
      ", ".join(f"{tip} {share:.0%}" for tip, share in saves.items()))
lessons.measured("04.g", f"{logits_gb:.2f} GB")
lessons.claim(
    48,
    measured=f"2048 × {qwen.vocab:,} × 4 bytes = {logits_gb:.2f} GB for one row, and an evaluation that keeps the logits of all its rows for the "
    f"metrics takes {all_scores / best_words:.0f} times the memory of one that keeps the best words only. Training holds such arrays too: a "
    f"plain cross-entropy {peaks[whole] / (512 * 20_000 * 4):.1f} of them at its peak, in chunks {peaks[in_chunks] / peaks[whole]:.0%} of that for "
    f"the same gradient. But the order of the tips is not one of bytes: {' < '.join(f'{tip} {saves[tip]:.0%}' for tip in sorted(saves, key=saves.get))}",
    holds=abs(logits_gb - 1.24) < 0.01 and all_scores > 8 * best_words and peaks[in_chunks] < peaks[whole] / 4 and same
    and list(saves) != sorted(saves, key=saves.get, reverse=True),
)

# %% [markdown]
# `handtuned memory --gpu 24GB` walks the notes' list for you: it adds one technique after another until the model fits, then takes back those that were not needed. Here for a full fine-tuning of the 1.5B Qwen:

# %%
settings = dict(model="qwen2.5-1.5b", method="full", dtype="bfloat16", optimizer="adamw", batch=8, seq=2048, checkpoint=False,
                zero=0, world_size=1, flash=False, lora_r=8, target_modules="all-linear", logits="full", accumulation_steps=1,
                offload=False)
print(recommend(settings, budget=24 * GIB))

# %% [markdown]
# Look at the order. The notes' first tip, the logits, is also the first here. And look at what the cheapest set does not contain: a smaller batch buys nothing any more once the states are what does not fit.
#
# ## Exercise 04.1: The states of a training run
#
# Write `states(total, trained, itemsize, masters)`: the bytes of weights, gradients, masters and Adam's moments. `total` parameters have `itemsize` bytes each; only `trained` of them are trained. Frozen parameters have neither gradients nor state. With `masters` the trained ones get an FP32 copy, and the moments are FP32; without, the moments have `itemsize` bytes.

# %%
def states(total, trained, itemsize, masters):
    raise NotImplementedError


lessons.check("04.1", states);

# %% [markdown]
# ## Exercise 04.2: What autograd keeps
#
# Write `kept_bytes(function, *inputs)`: run `function(*inputs)` and return the bytes that autograd saves for its backward pass. Count a storage once, however many saved tensors are views of it, and do not count leaves that require a gradient (parameters, inputs): they were there before. Use `torch.autograd.graph.saved_tensors_hooks`.

# %%
def kept_bytes(function, *inputs):
    raise NotImplementedError


lessons.check("04.2", kept_bytes);

# %% [markdown]
# ## Exercise 04.3: A loss without all logits
#
# Write `chunked_loss(hidden, weight, target, chunk)`: the mean cross-entropy of `hidden @ weight.T` over the targets that are not −100, with never more than `chunk` rows of logits alive. No gradient is needed.

# %%
def chunked_loss(hidden, weight, target, chunk):
    raise NotImplementedError


lessons.check("04.3", chunked_loss);

# %% [markdown]
# ## What to remember
#
# - Training with Adam takes 16 bytes per parameter for its states, in FP32 and in mixed precision alike.
# - Activations grow with batch × sequence. Stored attention scores grow with the square of the sequence; fused attention keeps none.
# - The peak is one moment of the step. Add up what is alive then, not everything that ever was.
# - Logits of a large vocabulary are a tenant of their own. Compute them in chunks.
# - Say GB or GiB. The notes' "28.5 G" is GiB.
#
# On a real model: `handtuned finetune --optim adamw8bit` keeps AdamW's moments in 2 bytes per parameter, and `handtuned memory --measure` compares the sum on paper with a step.
#
# Activations are the tenant that can be evicted and called back. That is [lesson 05: How do I trade time for memory?](05_trading_time_for_memory.ipynb)

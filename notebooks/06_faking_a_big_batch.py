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
# # 06. How do I fake a big batch?
#
# A batch of 64 rows does not fit, a batch of 4 does. *Gradient accumulation* runs sixteen small batches one after the other and updates once. It sounds like a loop and a division. The division is where it goes wrong: for the tail of an epoch, for rows of different length, and in the count of steps that the learning-rate schedule is built on.
#
# You need [lesson 04](04_where_memory_goes.ipynb) for what an activation is. The claims come from document 001 (efficient training) and document 003 (QLoRA diary).
#
# Terms: gradient accumulation 梯度累积, micro-batch 小批次, effective batch 等效批大小, gradient clipping 梯度裁剪, learning-rate schedule 学习率调度, warmup 预热, cosine decay 余弦衰减

# %%
import json
import math

import numpy as np
import torch
import torch.nn.functional as F
from handtuned import lessons, memory
from handtuned.datasets import shipped_dataset
from handtuned.nn.transformer import Transformer
from handtuned.optim import AdamW, GradientAccumulationTrainer, cosine_with_warmup, optimizer_steps
from handtuned.optim.accumulate import TokenMean, cross_entropy_sum
from handtuned.optim.schedule import warmup_cosine
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

# %% [markdown]
# Some words first. A *micro-batch* is what one forward pass sees. An *update* is one call of the optimizer. The *effective batch* is all micro-batches between two updates. A *token* is one position that is predicted; label −100 marks positions that are not (prompt, padding).
#
# ## On four numbers
#
# Four examples, one weight, loss (w·x − t)². The gradient of the mean over four examples is the mean of four gradients, and a sum may be taken in parts.
#
# **Write down your guess:** we cut the four examples into 3 + 1 and average the two means. Is that still right?

# %%
lessons.guess("06.a", "parts of 3 + 1, the two means averaged: still right?")
x, t, w = np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 1.0, 0.0, 3.0]), 0.5
per_example = 2 * (w * x - t) * x
print("gradient of each example  ", per_example)
print("mean of all four          ", per_example.mean())
print("halves 2 + 2, averaged    ", np.mean([per_example[:2].mean(), per_example[2:].mean()]))
print("parts 3 + 1, averaged     ", np.mean([per_example[:3].mean(), per_example[3:].mean()]))
print("parts 3 + 1, sums over 4  ", (per_example[:3].sum() + per_example[3:].sum()) / 4)
lessons.measured(
    "06.a",
    f"{np.mean([per_example[:3].mean(), per_example[3:].mean()]):g} instead of {per_example.mean():g}",
)

# %% [markdown]
# Averages of averages are right only for equal parts. **Sums, divided once by the whole count, are always right.** Keep that sentence; the rest of the lesson is its consequences.
#
# ## Why do it: memory
#
# The model states do not shrink, but activations are those of one micro-batch. A small decoder, sixteen rows of 128 tokens, cut in five ways. The price, says 001, is that training becomes slower.
#
# **Write down your guess:** sixteen rows one at a time, instead of all at once: by what factor does the arithmetic grow, and the number of operations that torch is asked for?

# %%
lessons.guess("06.b", "16 × 1 row instead of 1 × 16: how many times the FLOPs, how many times the operations?")
torch.manual_seed(0)
model = Transformer(vocab_size=256, num_layers=4, d_model=64, num_heads=4, d_ff=172)
tokens = torch.randint(0, 256, (16, 128))


def accumulate(rows):
    for start in range(0, 16, rows):
        part = tokens[start : start + rows]
        loss, _ = cross_entropy_sum(model(part[:, :-1]), part[:, 1:])
        (loss / tokens[:, 1:].numel()).backward()


cuts = (16, 8, 4, 2, 1)
peaks = []
for rows in cuts:
    model.zero_grad(set_to_none=True)
    peaks.append(memory.measure(accumulate, rows).added / 1e6)
fig, ax = lessons.figure(height=2.2)
lessons.bars(ax, [f"{16 // rows} × {rows} rows" for rows in cuts], peaks, unit="MB")
lessons.show(fig, alt="Peak memory above the weights for 16 rows in one to sixteen micro-batches: it falls nearly in proportion.")


class Calls(TorchDispatchMode):
    """Counts the operations that torch is asked for: on a GPU, launches."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


work = {}
for rows in (16, 1):
    with FlopCounterMode(display=False) as flops:
        accumulate(rows)
    with Calls() as calls:
        accumulate(rows)
    work[rows] = flops.get_total_flops(), calls.count
lessons.measured("06.b", f"{work[1][0] / work[16][0]:g} × and {work[1][1] / work[16][1]:.0f} ×")
lessons.claim(
    62,
    measured=f"16 rows as 1 × 16 and as 16 × 1: {work[16][0]:,} and {work[1][0]:,} FLOPs, the very same, in {work[16][1]:,} and {work[1][1]:,} "
    f"operations. Accumulation adds no arithmetic; it asks {work[1][1] / work[16][1]:.0f} times as often for pieces of a sixteenth, which is "
    "slower where a piece no longer fills the machine, and free where it still does",
    holds=work[16][0] == work[1][0] and work[1][1] > 8 * work[16][1],
)

# %% [markdown]
# Half the rows, half the peak, nearly. What remains at 16 × 1 is the gradient of all parameters, which has to be kept between the micro-batches, and one row's activations. The price is time: sixteen small passes use a GPU less well than one large pass. And some things see the micro-batch and not the effective batch, most of all BatchNorm, whose statistics are then those of a few rows. Transformers normalize within a token and do not care.
#
# ## The notes' loop, and its tail
#
# Document 001 divides every micro-batch's mean loss by `accumulation_steps`, steps after so many of them, and once more for the rest at the end of the epoch. Here is its `train_epoch`, reduced to what matters:

# %%
def notes_epoch(model, optimizer, batches, accumulation_steps):
    for number, (inputs, labels) in enumerate(batches, start=1):
        loss = F.cross_entropy(model(inputs), labels) / accumulation_steps
        loss.backward()
        if number % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
    if number % accumulation_steps != 0:
        optimizer.step()
        optimizer.zero_grad()


# %% [markdown]
# To see the gradient of every update at the *same* weights, the optimizer gets a learning rate of 0 and a hook that writes down what it was handed. There are nine micro-batches of equal size and four make an update: 4 + 4 + 1.
#
# **Write down your guess:** how large is the last gradient, relative to the true mean gradient of that batch?

# %%
lessons.guess("06.c", "how large is the last gradient, relative to the true one?")
torch.manual_seed(1)
classifier = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3)).double()
batches = [(torch.randn(5, 6, dtype=torch.double), torch.randint(0, 3, (5,))) for _ in range(9)]


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def handed_over(run):
    """The gradient of every optimizer step that `run(optimizer)` makes."""
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.0)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(flat_gradient(classifier).clone()))
    run(optimizer)
    return seen


def true_gradient(some):
    classifier.zero_grad()
    F.cross_entropy(classifier(torch.cat([x for x, _ in some])), torch.cat([y for _, y in some])).backward()
    gradient = flat_gradient(classifier).clone()
    classifier.zero_grad()
    return gradient


expected = [true_gradient(batches[i : i + 4]) for i in (0, 4, 8)]
notes = handed_over(lambda optimizer: notes_epoch(classifier, optimizer, batches, 4))
classifier.zero_grad()
ours = handed_over(lambda optimizer: GradientAccumulationTrainer(classifier, optimizer, 4, max_norm=None).train_epoch(batches))
sizes = {name: [(g @ e / (e @ e)).item() for g, e in zip(found, expected, strict=True)] for name, found in (("notes", notes), ("library", ours))}
errors = [((g - e).norm() / e.norm()).item() for g, e in zip(notes, expected, strict=True)]
print("relative to the true gradient:", {name: np.round(values, 6).tolist() for name, values in sizes.items()})
print("error of the notes' full batches:", [f"{e:.0e}" for e in errors[:2]])
lessons.measured("06.c", f"{sizes['notes'][-1]:.3g}")

# %% [markdown]
# Equal micro-batches are exact. The tail has one micro-batch and is divided by four. Two more things are missing in that epoch loop: it never clips (001's `train_step` does), and it does not clear gradients before the first backward. So whatever was left over from before is in the first update.

# %%
def largest_norm(run):
    return max(g.norm().item() for g in handed_over(run))


steep = [(inputs * 20, labels) for inputs, labels in batches]
unclipped = largest_norm(lambda optimizer: notes_epoch(classifier, optimizer, steep, 4))
clipped = largest_norm(lambda optimizer: GradientAccumulationTrainer(classifier, optimizer, 4, max_norm=1.0).train_epoch(steep))

classifier.zero_grad()
F.cross_entropy(classifier(batches[5][0]), batches[5][1]).backward()  # something left over
stale = handed_over(lambda optimizer: notes_epoch(classifier, optimizer, batches, 4))[0]
stale_error = ((stale - expected[0]).norm() / expected[0].norm()).item()
classifier.zero_grad()

lessons.claim(
    42,
    measured=f"full batches agree with the big batch to {max(errors[:2]):.0e}; the tail's gradient comes out at "
    f"{sizes['notes'][2]:.2f} of its size; the epoch does not clip (norm {unclipped:.1f} where 1.0 was wanted, the library's "
    f"{clipped:.2f}); a gradient left over from before changes the first update by {stale_error:.0%}",
    holds=(max(errors[:2]) < 1e-12 and abs(sizes["notes"][2] - 0.25) < 1e-12 and unclipped > 1.01 >= clipped
           and stale_error > 0.05 and np.allclose(sizes["library"], 1)),
)

# %% [markdown]
# ## Rows of different length
#
# A language model's loss is a mean over tokens. Four micro-batches with one row each, of 2, 4, 8 and 16 tokens: the mean of four means is not the mean of 30 tokens.
#
# **Write down your guess:** by what factor does a token of the shortest row weigh too much?

# %%
lessons.guess("06.d", "by what factor does a token of the shortest row weigh too much?")
lengths = (2, 4, 8, 16)
token_losses = torch.rand(sum(lengths), requires_grad=True)
sum(part.mean() for part in token_losses.split(lengths)).div(4).backward()  # the notes' division
weights = token_losses.grad * sum(lengths)  # 1 = as in the mean over all tokens
factors = [part[0].item() for part in weights.split(lengths)]

fig, ax = lessons.figure(height=2.2)
lessons.bars(ax, [f"row of {n} tokens" for n in lengths], factors, unit="×", accent=0)
ax.set_xlabel("weight of a token, its share = 1")
ax.axvline(1, color="0.3", ls=":", lw=1)
lessons.show(fig, alt="Weight of one token under the mean of means, where 1 is right: the shortest row weighs 3.75 times too much, "
             "the longest half as much as it should.")
lessons.measured("06.d", f"{factors[0]:.3g} ×")

# %% [markdown]
# This is not an academic point. The most used training library had exactly this error until October 2024 (transformers, GitHub issue 34191): accumulating gave another model than the big batch.
#
# What becomes of a model? Take the smallest language model there is: one pair of logits, the same for every token. The two short rows say "0" throughout, the two long ones "1". Of 30 tokens, 6 are "0", so a model of tokens should learn P(0) = 6 / 30.

# %%
rows = [(torch.zeros(1, n, dtype=torch.long), torch.full((1, n), int(n > 4))) for n in lengths]


def learnt(update):
    torch.manual_seed(2)
    model = nn.Embedding(1, 2)  # input is always token 0
    model.weight.data = torch.tensor([[1.0, 0.0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step = update(model, optimizer)
    course = []
    for _ in range(40):
        step()
        course.append(model.weight.softmax(-1)[0, 0].item())
    return course


def mean_of_means(model, optimizer):
    return lambda: notes_epoch(lambda inputs: model(inputs).flatten(0, 1), optimizer,
                               [(inputs, labels.flatten()) for inputs, labels in rows], 4)


def token_weighted(model, optimizer):
    trainer = GradientAccumulationTrainer(model, optimizer, accumulation_steps=4, max_norm=None)
    return lambda: trainer.train_epoch(rows)


courses = {"mean of means": learnt(mean_of_means), "library": learnt(token_weighted)}
fig, ax = lessons.figure(height=2.6)
for (name, course), style in zip(courses.items(), ((lessons.ACCENT, "--"), ("0.1", "-")), strict=True):
    ax.plot(range(1, 41), course, color=style[0], linestyle=style[1], label=name)
ax.axhline(6 / 30, color="0.6", lw=0.8, ls=":")
ax.text(40, 6 / 30 + 0.01, "6 of 30 tokens", ha="right", color="0.4")
ax.set(xlabel="update", ylabel="P(0)", ylim=(0.15, 0.8))
ax.legend()
lessons.show(fig, alt="Learnt probability over 40 updates: with the library's division it falls to 0.2, the share of tokens; with the "
             "mean of means to 0.5, the share of rows.")

# %%
lessons.claim(
    43,
    measured=f"with rows of {lengths} tokens a token of the shortest weighs {factors[0]:.2f} times its share, one of the longest "
    f"{factors[-1]:.2f} times; the tiny model learns P(0) = {courses['mean of means'][-1]:.2f} instead of "
    f"{courses['library'][-1]:.2f}. Only equal micro-batches are safe",
    holds=(abs(factors[0] - 3.75) < 1e-5 and abs(courses["library"][-1] - 0.2) < 0.01
           and abs(courses["mean of means"][-1] - 0.5) < 0.01),
)

# %% [markdown]
# Which of the two is "right"? Both are losses that one may want. But a big batch computes the first, so accumulation that claims to fake a big batch must compute it too. Otherwise the result depends on how rows happened to be cut into micro-batches.
#
# ## How the library divides
#
# Each micro-batch contributes its *sum* of losses. The count of all answer tokens is known only after the last one, so the sum is first divided by an estimate (this keeps FP16 gradients in range, see [lesson 03](03_fp16_training.ipynb)), and the finished gradient is multiplied by estimate / count.

# %%
lessons.source(TokenMean.part)
lessons.source(TokenMean.correct)

# %%
lessons.source(GradientAccumulationTrainer._update)

# %% [markdown]
# Now for real. The rows that ship with the package are spoken requests and their answers, one small JSON command. Characters are the tokens; only the answer is learnt. One run takes 8 rows at once; the other four micro-batches of 2 rows, all of different length. The seed, the order and everything else are equal.
#
# **Write down your guess:** how far apart are the two loss curves after 30 updates?

# %%
lessons.guess("06.e", "how far apart are the two loss curves after 30 updates?")
def as_row(line):
    _, question, answer = (message["content"] for message in json.loads(line)["messages"])
    ids = list((question + "\n" + answer + "\n").encode())
    prompt = len(question.encode()) + 1
    return ids[:-1], [-100] * (prompt - 1) + ids[prompt:]


def batch_of(some):
    width = max(len(ids) for ids, _ in some)
    inputs = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in some])
    labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in some])
    return inputs, labels


train_file, _ = shipped_dataset()
data = [as_row(line) for line in train_file.read_text(encoding="utf-8").splitlines()]
order = torch.randperm(len(data), generator=torch.Generator().manual_seed(3))[:240].tolist()


def train(micro, accumulation_steps):
    torch.manual_seed(4)
    model = Transformer(vocab_size=128, num_layers=2, d_model=64, num_heads=4, d_ff=172)
    optimizer = AdamW(model.parameters(), lr=3e-3)
    schedule = cosine_with_warmup(optimizer, total_steps=30)
    trainer = GradientAccumulationTrainer(model, optimizer, accumulation_steps, scheduler=schedule)
    losses, seen = [], [0.0, 0]
    for start in range(0, len(order), micro):
        inputs, labels = batch_of([data[i] for i in order[start : start + micro]])
        updated = trainer.train_step(inputs, labels)
        tokens = (labels != -100).sum().item()
        seen = [seen[0] + trainer.last_loss.item() * tokens, seen[1] + tokens]
        if updated:
            losses.append(seen[0] / seen[1])
            seen = [0.0, 0]
    return np.array(losses)


big, faked = train(8, 1), train(2, 4)
fig, ax = lessons.figure(height=2.6)
ax.plot(range(1, 31), big, color="0.75", lw=5, linestyle="-", label="1 × 8 rows")
ax.plot(range(1, 31), faked, color=lessons.ACCENT, linestyle="--", label="4 × 2 rows")
ax.set(xlabel="update", ylabel="loss per character, nats")
ax.legend()
lessons.show(fig, alt="Two loss curves over 30 updates, batch 8 at once and 4 times 2 rows, lie on each other.")
print(f"largest difference of the losses: {np.abs(big - faked).max():.1e}, from {big[0]:.3f} down to {big[-1]:.3f}")
lessons.measured("06.e", f"{np.abs(big - faked).max():.1e} at most")
assert np.abs(big - faked).max() < 1e-3

# %% [markdown]
# The difference is rounding: the same sums in another order.
#
# ## How many updates are there?
#
# Document 003 raises the learning rate from 0 during the first 10 % of the steps (*warmup*) and then lets it fall along half a cosine. It counts steps as rows / batch × epochs. The shape is right. But the schedule moves once per *update*, and with accumulation and several processes there are fewer of them.
#
# **Write down your guess:** 900 rows, micro-batch 8, 4 accumulation steps, 2 processes, 3 epochs. How many updates? Which part of them is spent in warmup, if the schedule was told the notes' count?

# %%
lessons.guess("06.f", "how many updates, and which part of them is warmup if the schedule was told the notes' count?")
epochs, micro, accumulation, processes = 3, 8, 4, 2
notes_steps = 900 // micro * epochs
effective = micro * accumulation * processes
true_steps = optimizer_steps(900, micro, accumulation, processes, epochs)
print(f"the notes count {notes_steps} steps, there are {true_steps} updates")


def notes_rate(k, total):
    """Update k's learning rate as 003 describes it, peak 1."""
    warmup = math.ceil(0.1 * total)
    return k / warmup if k < warmup else 0.5 * (1 + math.cos(math.pi * (k - warmup) / (total - warmup)))


def library_rates(total, updates):
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = cosine_with_warmup(optimizer, total)
    rates = []
    for _ in range(updates):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return np.array(rates)


k = np.arange(true_steps)
told_wrong = np.array([notes_rate(i, notes_steps) for i in k])
told_right = library_rates(true_steps, true_steps)
fig, ax = lessons.figure(height=2.6)
ax.plot(k, told_wrong, color=lessons.ACCENT, linestyle="--", label=f"planned for {notes_steps} steps")
ax.plot(k, told_right, color="0.1", linestyle="-", label=f"planned for {true_steps} updates")
ax.set(xlabel="update", ylabel="learning rate, peak = 1", ylim=(0, 1.25))
ax.legend(loc="upper right")
lessons.show(fig, alt="Learning rate over the updates that really happen: planned for the right count it rises quickly and falls "
             "to 0; planned for the notes' count most of the run is warmup and it ends near its peak.")
lessons.measured("06.f", f"{true_steps}, of which {min(1, math.ceil(0.1 * notes_steps) / true_steps):.0%}")

# %% [markdown]
# With the wrong count three quarters of the run are warmup, and it ends when the decay has hardly begun. Such a run does not crash. It only ends with a larger loss than it could have had, and nobody knows why.
#
# The second catch: at update 0 the learning rate is 0. A whole effective batch is computed to move the weights by nothing.

# %%
def moved_by_first_update(schedule_of):
    torch.manual_seed(5)
    layer = nn.Linear(4, 4)
    before = layer.weight.detach().clone()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    schedule_of(optimizer)
    layer(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    return (layer.weight - before).abs().max().item()


from_zero = moved_by_first_update(
    lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: notes_rate(k, true_steps)))
library = moved_by_first_update(lambda optimizer: cosine_with_warmup(optimizer, true_steps))
agree = np.allclose(told_right[1:], [notes_rate(i, true_steps) for i in k[1:]])
warmup_share = math.ceil(0.1 * notes_steps) / true_steps
lessons.claim(
    55,
    measured=f"rows / batch × epochs = {notes_steps}, but there are {true_steps} updates, so the warmup takes {warmup_share:.0%} of the "
    f"run and the last learning rate is {told_wrong[-1]:.2f} of the peak. The first update at rate 0 moves weights by "
    f"{from_zero:g} (the library's by {library:.0e}); from the second update on the two schedules agree. If 003's batch is meant to be "
    f"the effective one, of {effective} rows, its formula gives {900 / effective * epochs:.1f}, right but for each epoch's last, smaller update",
    holds=notes_steps == 336 and 900 / effective * epochs < true_steps < 900 / effective * epochs + epochs and true_steps == 45 and from_zero == 0 < library and agree and told_wrong[-1] > 0.9,
)

# %%
lessons.source(warmup_cosine)

# %%
if lessons.gpu():
    wide = Transformer(vocab_size=32_000, num_layers=8, d_model=1024, num_heads=16, d_ff=2816).cuda()
    ids = torch.randint(0, 32_000, (16, 513), device="cuda")
    for size in (16, 4, 1):
        def run(size=size):
            for part in ids.split(size):
                (cross_entropy_sum(wide(part[:, :-1]), part[:, 1:])[0] / ids[:, 1:].numel()).backward()
        run()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        taken = memory.measure(run, device="cuda")
        end.record()
        torch.cuda.synchronize()
        print(torch.cuda.get_device_name(), f"{16 // size} × {size}: {ids.numel() / start.elapsed_time(end) * 1e3:,.0f} tokens/s, {taken}")
else:
    lessons.skipped("tokens per second and peak memory for 1 × 16, 4 × 4 and 16 × 1 rows")

# %% [markdown]
# ## Exercise 06.1: The gradient of all tokens
#
# Write `accumulate(model, micro_batches)`: `micro_batches` is a list of (inputs, labels), labels −100 do not count. Leave in `.grad` the gradient of the mean cross-entropy over *all* answer tokens of *all* micro-batches (whatever was in `.grad` before is not part of it), and return that mean.

# %%
def accumulate(model, micro_batches):
    raise NotImplementedError


lessons.check("06.1", accumulate);

# %% [markdown]
# ## Exercise 06.2: An epoch with a tail
#
# Write `train_epoch(model, optimizer, batches, accumulation_steps, max_norm)`: batches of equal size, one update for each `accumulation_steps` of them and one for the tail, each with the gradient of the mean over its rows, clipped to `max_norm` as a whole. What is in `.grad` when the epoch begins must not count.

# %%
def train_epoch(model, optimizer, batches, accumulation_steps, max_norm):
    raise NotImplementedError


lessons.check("06.2", train_epoch);

# %% [markdown]
# ## Exercise 06.3: Warmup and cosine
#
# Write `rate(k, total, warmup)`, the learning rate of update *k* as a share of the peak: k / warmup during warmup, but half of 1 / warmup at k = 0; then half a cosine from 1 at k = warmup to 0 at k = total; 0 from there on.

# %%
def rate(k, total, warmup):
    raise NotImplementedError


lessons.check("06.3", rate);

# %% [markdown]
# ## What to remember
#
# - Accumulation buys memory: activations of one micro-batch, gradient of the whole batch.
# - Sum the losses, divide once by the count of all answer tokens. Means of means are wrong for tails and for unequal rows.
# - Clip the finished gradient, not its parts. Clear gradients before the first micro-batch.
# - A schedule counts updates: rows / (micro-batch × accumulation × processes), rounded up, times epochs.
#
# On a real model: `handtuned finetune --per-device-train-batch-size 1 --gradient-accumulation-steps 8 --lr-scheduler cosine`.
#
# So far every parameter is trained. Must it be? [Lesson 07: Why is a low-rank update enough?](07_low_rank_updates.ipynb)

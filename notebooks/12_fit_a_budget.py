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
# # 12. Capstone: how do I fit a budget?
#
# You have a model, a task and a number of bytes. What do you do? This lesson puts the course together: full fine-tuning, LoRA and QLoRA on one small model, measured in bytes and in loss; the question of the rank, on which the documents contradict themselves; and a search that chooses the settings for you within a budget.
#
# You need [lesson 04](04_where_memory_goes.ipynb) (where memory goes), [08](08_lora_in_a_model.ipynb) (LoRA) and [10](10_qlora.ipynb) (QLoRA). The claims come from all five documents.
#
# Terms: full fine-tuning 全量微调, rank 秩, hyperparameter 超参数, search 搜索, AutoML 自动机器学习, held-out 留出集, Pareto front 帕累托前沿

# %%
import contextlib
import copy
import io
import json
import random
import re
import tempfile
from pathlib import Path

import torch
from handtuned import lessons, memory
from handtuned.training.data import batch_indices, shipped_dataset
from handtuned.nn import apply_lora_to_model, checkpoint_sequential, linear_cross_entropy, lora_parameters
from handtuned.nn.transformer import Transformer
from handtuned.optim import AdamW, cosine_with_warmup
from handtuned.quant import quantize_model
from handtuned.training.settings import FinetuneSettings
from handtuned.tune import tune

GB = 10**9


def bar(done, total, text=""):
    print(f"\r{'█' * round(30 * done / total):30} {done}/{total} {text}", end="\n" if done == total else "", flush=True)


# %% [markdown]
# ## First on paper
#
# Before anything runs, the breakdown of lesson 04 says what can fit. A 7B model, one row of 2048 tokens, a card of 24 GB:

# %%
print(f"{'method':38} {'states':>9} {'peak':>9}   24 GB?")
for name, settings in {
    "full, BF16 with masters": {"method": "full", "dtype": "bfloat16"},
    "full, checkpointed, offloaded": {"method": "full", "dtype": "bfloat16", "checkpoint": True, "offload": True},
    "LoRA r 8": {"method": "lora", "dtype": "bfloat16"},
    "LoRA r 8, checkpointed": {"method": "lora", "dtype": "bfloat16", "checkpoint": True},
    "QLoRA r 8": {"method": "qlora", "dtype": "bfloat16"},
    "QLoRA r 8, checkpointed": {"method": "qlora", "dtype": "bfloat16", "checkpoint": True},
    "QLoRA r 64, checkpointed": {"method": "qlora", "dtype": "bfloat16", "checkpoint": True, "lora_r": 64},
}.items():
    breakdown = memory.estimate("7b", batch=1, seq=2048, **settings)
    print(f"{name:38} {breakdown.states / GB:6.1f} GB {breakdown.peak / GB:6.1f} GB   {'fits' if breakdown.peak <= 24 * GB else '–'}")

# %% [markdown]
# Several ways fit. Bytes alone do not choose between them: that takes the task. On a laptop a 7B model is out of reach, so the rest of the lesson does the same with a very small one, in two minutes.
#
# ## A model and two tasks
#
# The base model learns to turn the spoken requests that ship with the package into JSON commands. Then it is fine-tuned on two new tasks, on the same requests:
#
# - **backwards:** the fields of the command in reverse order. Nothing new to know, only another order.
# - **cipher:** every word of the command is replaced by another one, by a fixed table, some 160 words in all. All of the table has to be learnt.
#
# Rows are cut into training, validation (for choosing) and test (looked at once, at the end).

# %%
TOKEN = re.compile(r"[A-Za-z]+|\d|[^\w\s]+")
requests = []
for file in shipped_dataset():
    for line in file.read_text(encoding="utf-8").splitlines():
        _, question, answer = (message["content"] for message in json.loads(line)["messages"])
        requests.append((TOKEN.findall(question), json.loads(answer)))
random.Random(1).shuffle(requests)


def forwards(command):
    return TOKEN.findall(json.dumps(command, separators=(",", ":")))


def backwards(command):
    return forwards(dict(reversed(command.items())))


words = sorted({word for question, command in requests for word in question + forwards(command) + backwards(command)})
letters = [word for word in words if word.isalpha()]
table = dict(zip(letters, random.Random(0).sample(letters, len(letters)), strict=True))
number = {word: index for index, word in enumerate(words, start=2)}  # 0: the answer begins; 1: it ends


def cipher(command):
    return [table.get(word, word) for word in forwards(command)]


def encode(question, answer):
    ids = [number[word] for word in question] + [0] + [number[word] for word in answer] + [1]
    return ids[:-1], [-100] * len(question) + ids[len(question) + 1 :]


def batch(rows):
    width = max(len(ids) for ids, _ in rows)
    return (torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows]),
            torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows]))


def rows_of(form):
    rows = [encode(question, form(command)) for question, command in requests]
    return {"train": rows[:796], "validation": rows[796:896], "test": rows[896:]}


for form in (forwards, backwards, cipher):
    print(f"{form.__name__:10}", " ".join(requests[0][0]), "→", "".join(form(requests[0][1])))

# %%
def loss_of(model, inputs, labels, segments=None):
    """Mean cross-entropy of the answer tokens."""
    x = model.model.embed_tokens(inputs)
    if segments is None:
        for block in model.model.layers:
            x = block(x)
    else:
        x = checkpoint_sequential(model.model.layers, x, segments)
    return linear_cross_entropy(model.model.norm(x), model.lm_head.weight, labels) / (labels != -100).sum()


@torch.no_grad()
def score(model, rows):
    return loss_of(model.eval(), *batch(rows)).item()


def train(model, parameters, rows, steps, learning_rate, segments=None, watch=lambda done: None):
    """AdamW, warmup and cosine, 16 rows per step."""
    optimizer = AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = cosine_with_warmup(optimizer, steps)

    def step(number):
        inputs, labels = batch([rows[i] for i in batch_indices(number, len(rows), 16, seed=0)])
        loss_of(model, inputs, labels, segments).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)

    model.train()
    for number in range(steps):
        step(number)
        watch(number + 1)
    return optimizer, step


torch.manual_seed(0)
base = Transformer(vocab_size=len(number) + 2, num_layers=2, d_model=64, num_heads=4, d_ff=172)
data = {form.__name__: rows_of(form) for form in (forwards, backwards, cipher)}
train(base, list(base.parameters()), data["forwards"]["train"], 300, 4e-3, watch=lambda done: bar(done, 300, "steps: base model"))
before = {name: score(base, data[name]["validation"]) for name in data}
print(f"{sum(p.numel() for p in base.parameters()):,} parameters; loss on held-out rows, nats per token:",
      {name: round(value, 2) for name, value in before.items()})

# %% [markdown]
# ## Three methods, in bytes and loss
#
# `finetune` below is all of lessons 04 to 10 in twenty lines: copy the base, quantize it or not, put adapters on it or not, train, score, and count the peak of one more step. The bytes are weights, adapters, optimizer state, and what the step adds: gradients, activations, logits.
#
# **Write down your guess:** order the three methods by bytes and by loss. How much does QLoRA lose to LoRA?

# %%
lessons.guess("12.a", "order full, LoRA and QLoRA by loss; how much does QLoRA lose to LoRA?")
STEPS = 48


def finetune(task, method, rank=8, learning_rate=5e-3, scaling=2.0, segments=None):
    torch.manual_seed(1)
    model = copy.deepcopy(base)
    if method == "qlora":
        quantize_model(model)
    if method == "full":
        parameters = list(model.parameters())
    else:
        apply_lora_to_model(model, rank, scaling * rank, "all-linear")
        parameters = list(lora_parameters(model))
    rows = data[task]
    optimizer, step = train(model, parameters, rows["train"], STEPS, learning_rate, segments)
    result = {name: score(model, rows[name]) for name in ("validation", "test")}
    model.train()
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor))
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    result["peak"] = weights + state + memory.measure(step, 0).added
    result["trained"] = sum(p.numel() for p in parameters)
    result["states"] = weights + state + 4 * result["trained"]  # the last: gradients
    return result


runs = {
    "full": dict(method="full", learning_rate=2e-3),
    "full, checkpointed": dict(method="full", learning_rate=2e-3, segments=2),
    "LoRA r 8": dict(method="lora"),
    "LoRA r 8, checkpointed": dict(method="lora", segments=2),
    "QLoRA r 8": dict(method="qlora"),
    "QLoRA r 8, checkpointed": dict(method="qlora", segments=2),
}
compared = {}
for done, (name, settings) in enumerate(runs.items(), start=1):
    compared[name] = finetune("backwards", **settings)
    bar(done, len(runs), "runs")
for name, run in compared.items():
    print(f"{name:24} trains {run['trained']:7,}   states {run['states'] / 1e6:5.2f} MB   peak {run['peak'] / 1e6:5.2f} MB   loss {run['validation']:.3f}")
lessons.measured(
    "12.a",
    ", ".join(f"{name} {compared[name]['validation']:.3f}" for name in ("full", "LoRA r 8", "QLoRA r 8")),
)

# %% [markdown]
# Checkpointing changes bytes and not one bit of the loss ([lesson 05](05_trading_time_for_memory.ipynb)). In a model this small the embedding table and the head, which stay in FP32, are most of the weights. In a 7B model they are a few per cent, and QLoRA's gap is far larger: the table on paper above shows it.
#
# 002 says that QLoRA is slower than LoRA. **Write down your guess:** by how many per cent is a step slower, if the same library computes both on a CPU?

# %%
lessons.guess("12.b", "by how many per cent is a step of QLoRA slower than one of LoRA?")
assert compared["LoRA r 8"]["validation"] == compared["LoRA r 8, checkpointed"]["validation"]
assert compared["QLoRA r 8"]["peak"] < compared["LoRA r 8"]["peak"] < compared["full"]["peak"]

readme = Path("..", "README.md").read_text(encoding="utf-8")
stored = {name: float(seconds) for name, seconds in re.findall(r"\| (peft, [^|]+|handtuned, NF4) base \| ([\d.]+) \|", readme)}  # measured on a quiet machine
slower = stored["peft, bitsandbytes NF4"] / stored["peft, fp32"] - 1
lessons.measured("12.b", f"{slower:+.0%} with peft and bitsandbytes")
lessons.claim(
    70,
    measured=f"LoRA {compared['LoRA r 8']['peak'] / 1e6:.2f} MB at its peak, QLoRA {compared['QLoRA r 8']['peak'] / 1e6:.2f} MB, for the same products "
    f"and the decoding of each weight, forward and backward, on top. A step of SmolLM2 on a CPU took peft {stored['peft, fp32']:.2f} s with a base in "
    f"FP32, {stored['peft, bitsandbytes NF4']:.2f} s with one in NF4 ({slower:+.0%}). How much slower is a matter of the decoder: this library's took "
    f"{stored['handtuned, NF4']:.2f} s (README)",
    holds=compared["QLoRA r 8"]["peak"] < compared["LoRA r 8"]["peak"] and slower > 0,
)

# %% [markdown]
# 001 and 002 say that LoRA does slightly worse than full fine-tuning. **Write down your guess:** how many nats is it behind, each at the best of three learning rates, in `backwards` and in `cipher`?

# %%
lessons.guess("12.c", "how many nats is LoRA behind full fine-tuning, in backwards and in cipher?")
sweep = {}
for task in ("backwards", "cipher"):
    for method in ("full", "lora"):
        sweep[task, method] = {rate: finetune(task, method, learning_rate=rate)["validation"] for rate in (2e-3, 5e-3, 1.5e-2)}
        bar(len(sweep), 4, f"rates: {task} {method}")
for (task, method), losses in sweep.items():
    print(f"{task:10} {method:5}", ", ".join(f"rate {rate:g}: loss {loss:.2f}" for rate, loss in losses.items()))
behind = {task: min(sweep[task, "lora"].values()) - min(sweep[task, "full"].values()) for task in ("backwards", "cipher")}
lessons.measured("12.c", f"{behind['backwards']:.2f} and {behind['cipher']:.2f}")
lessons.claim(
    68,
    measured=f"each at the best of three learning rates, LoRA of rank 8 is {behind['backwards']:.2f} nats behind full fine-tuning where only the order "
    f"is new, and {behind['cipher']:.2f} where every word is. Slightly worse for a new form, much worse for new knowledge, at this rank",
    holds=0 < behind["backwards"] < 0.5 < behind["cipher"],
)

# %% [markdown]
# 000 says that alpha is usually 1, and may be larger where the model has to learn what it has not seen. In `cipher` all is new. **Write down your guess:** with alpha / r at 1, 2 and 8 and one learning rate, which gives the lowest loss? What is left of the lead if each gets the best of three rates?

# %%
lessons.guess("12.d", "how much lower is the loss with alpha / r = 8 than with 1: at one rate, each at its best?")
factors = {2.0: sweep["cipher", "lora"]}
for factor in (1.0, 8.0):
    factors[factor] = {rate: finetune("cipher", "lora", learning_rate=rate, scaling=factor)["validation"] for rate in (5e-3, 1.5e-2, 3e-2)}
at_one_rate = {factor: factors[factor][5e-3] for factor in (1.0, 2.0, 8.0)}
at_its_best = {factor: min(factors[factor].values()) for factor in (1.0, 2.0, 8.0)}
lessons.measured("12.d", f"{at_one_rate[1.0] - at_one_rate[8.0]:.2f} and {at_its_best[1.0] - at_its_best[8.0]:.2f} nats")
lessons.claim(
    69,
    measured="cipher, all new to the model. At one learning rate the factor decides: "
    + ", ".join(f"loss {loss:.2f} at {factor:g}" for factor, loss in at_one_rate.items()) + ". At the best of three rates each: "
    + ", ".join(f"{loss:.2f} at {factor:g}" for factor, loss in at_its_best.items())
    + ". A larger alpha helps where the rate is too small: most of it is a second learning rate. As for \"usually 1\": 001 and 003 take alpha = 2 r and 4 r",
    holds=at_one_rate[1.0] > at_one_rate[8.0]
    and at_its_best[1.0] - min(at_its_best.values()) < (at_one_rate[1.0] - min(at_one_rate.values())) / 2,
)

# %% [markdown]
# One more thing to see: the three methods were given learning rates that differ. The best one depends on the method, on alpha and on the task, as the sweep above shows. Comparing methods at one learning rate compares nothing.
#
# ## Which rank?
#
# 001 says 8 to 64, "the harder the task, the larger". 003 says 4 to 32 in one place and 4 to 16 in another. They cannot all be rules.
#
# **Write down your guess** for our two tasks: from which rank on does more rank stop paying? Every rank gets the same steps and the better of two learning rates.

# %%
lessons.guess("12.e", "from which rank on does more rank stop paying, in either task?")
ranks, rates = (1, 4, 16, 64), (5e-3, 1.5e-2)
curve = {}
for task in ("backwards", "cipher"):
    for rank in ranks:
        curve[task, rank] = min(finetune(task, "lora", rank, rate)["validation"] for rate in rates)
        bar(len(curve), 2 * len(ranks), f"ranks: {task} r {rank}")

fig, (ax, below) = lessons.figure(height=3.2, rows=2, sharex=True, height_ratios=(4, 1))
for task, style in (("backwards", ("0.1", "-", "o")), ("cipher", (lessons.ACCENT, "--", "s"))):
    ax.plot(ranks, [curve[task, rank] for rank in ranks], color=style[0], linestyle=style[1], marker=style[2], label=task)
for row, (low, high, text) in enumerate(((8, 64, "001"), (4, 32, "003"), (4, 16, "003"))):
    below.plot((low, high), (row, row), color="0.55", lw=3, linestyle="-", solid_capstyle="butt")
    below.text(high * 1.06, row, f"{text}: {low}–{high}", va="center", color="0.4", fontsize=8)
below.set(ylabel="advised", yticks=(), ylim=(2.7, -0.7), xlabel="rank")
ax.set(xscale="log", ylabel="held-out loss,\nnats per token", xlim=(0.9, 130), ylim=(0, None))
ax.set_xticks(ranks, [str(rank) for rank in ranks])
ax.minorticks_off()
ax.legend(loc="upper right")
lessons.show(fig, alt="Held-out loss against rank, with the ranges that the notes recommend as lines below: the task backwards is "
             "nearly done at rank 4, the task cipher gains all the way to rank 64.")
lessons.measured(
    "12.e",
    "; ".join(f"{task}: " + ", ".join(f"r {rank} {curve[task, rank]:.2f}" for rank in ranks) for task in ("backwards", "cipher")),
)

# %%
def enough(task, within=0.2):
    """The least rank whose loss is within so many nats of the best."""
    best = min(curve[task, rank] for rank in ranks)
    return next(rank for rank in ranks if curve[task, rank] <= best + within)


gain = {task: curve[task, 4] - min(curve[task, rank] for rank in ranks) for task in ("backwards", "cipher")}
lessons.claim(
    30,
    measured=f"reversing fields needs rank {enough('backwards')} (more than 4 gains {gain['backwards']:.2f} nats), a table of "
    f"words gains {gain['cipher']:.2f} nats beyond rank 4 and wants {enough('cipher')}. No range is right for both; what 001 says "
    "beside its range, that harder tasks want more, holds",
    holds=enough("backwards") < enough("cipher") and gain["cipher"] > 2 * gain["backwards"],
)

# %% [markdown]
# Why do the tasks differ? Reversing the fields is one rule, the same for every word: a change of a few directions. The table has a separate entry for each word, so the update must act in many directions independently, and a product of rank 4 has four ([lesson 07](07_low_rank_updates.ipynb)). When you fine-tune, ask which of the two your task resembles: a new form for what the model knows, or new facts.
#
# ## Let a search choose
#
# Rank, scaling, learning rate, targets: four knobs, and they depend on each other: that is why every rank was tried with two learning rates. Document 004 sets it as homework to let a machine turn them: *AutoML*. It can, if one does it on a budget. The library's command for that is `handtuned tune` (with Optuna: `pip install "handtuned[tune]"`). What it needs:
#
# - **A budget of steps.** Eight trials. A trial is looked at after 1/8, 1/4 and 1/2 of its steps and stopped unless it is among the better half of those that came as far. This is *successive halving*; you write it yourself in exercise 12.3.
# - **A budget of bytes.** Each trial records what its adapter takes: 16 bytes per trained parameter. What does not fit is not chosen; our limit is twice what the usual settings take.
# - **A seed,** so that the search can be repeated, and a **sampler** that learns from the trials before (Optuna's TPE).
# - **The usual settings as the first trial,** so that the search ends no worse than it began.
# - **Rows for choosing and other rows for the verdict.** The best of eight is lucky as well as good.
#
# `tune` works on files, as `finetune` does: a model directory and rows of text. So the base model is written out as an ordinary Llama with its word list as tokenizer, and the cipher task as JSON Lines.
#
# **Write down your guess:** by how much does the best of eight trials beat rank 8 with the usual settings? And with more or fewer bytes?

# %%
lessons.guess("12.f", "by how much does the best of eight trials beat the usual settings?")
def save_base(directory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()

    sizes = dict(vocab_size=len(number) + 2, hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=4, max_position_embeddings=128, eos_token_id=1, pad_token_id=1, tie_word_embeddings=False)
    llama = LlamaForCausalLM(LlamaConfig(**sizes))
    llama.load_state_dict(base.state_dict())  # the names are the same
    llama.save_pretrained(directory)
    tokenizer = Tokenizer(models.WordLevel({"<answer>": 0, "<end>": 1, **number}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", unk_token="<end>",
                                   additional_special_tokens=["<answer>"])
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {{ '<answer> ' if m['role'] == 'user' else '<end> ' }}{% endfor %}"
    fast.save_pretrained(directory)


TRIALS = 8
with tempfile.TemporaryDirectory() as directory:
    directory = Path(directory)
    with contextlib.redirect_stdout(io.StringIO()):  # what tune prints is shown below, without this machine's paths
        save_base(directory / "base")
        for name, part in (("train", requests[:796]), ("held-out", requests[796:])):
            lines = [json.dumps({"prompt": " ".join(q), "completion": " ".join(cipher(command))}) for q, command in part]
            (directory / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        settings = FinetuneSettings(
            model=str(directory / "base"), data=str(directory / "train.jsonl"), eval_data=str(directory / "held-out.jsonl"),
            output_dir=str(directory / "study"), method="qlora", lora_r=8, lora_alpha=16, learning_rate=5e-3, max_steps=STEPS,
            per_device_train_batch_size=16, max_grad_norm=1.0, warmup_ratio=0.1, max_seq_length=64, seed=0)
        study = tune(settings, TRIALS, search=("lora_r", "lora_alpha", "learning_rate", "target_modules"))

for trial in sorted(study["trials"], key=lambda trial: (-trial["steps"], trial["loss"])):
    chosen = trial["settings"]
    targets = chosen["target_modules"] if isinstance(chosen["target_modules"], str) else ",".join(chosen["target_modules"])
    print(f"trial {trial['number']:2}  {trial['steps']:3} steps  loss {trial['loss']:.3f}  {trial['bytes'] / 1e3:4.0f} KB  r {chosen['lora_r']:<2} "
          f"alpha {chosen['lora_alpha']:<4g} lr {chosen['learning_rate']:.1e}  {targets.replace('_proj', '')}"
          + "  ← the usual settings" * bool(trial["first"]))

# %%
usual = study["first"]
finished = [trial for trial in study["trials"] if trial["state"] == "complete"]
best = min((trial for trial in finished if trial["bytes"] <= 2 * usual["bytes"]), key=lambda trial: trial["loss"])
as_good = min((trial for trial in finished if trial["untouched"]["loss"] <= usual["untouched"]["loss"] + 0.05), key=lambda trial: trial["bytes"])
spent = sum(trial["steps"] for trial in study["trials"])
lessons.measured(
    "12.f",
    f"{usual['untouched']['loss'] - best['untouched']['loss']:.2f} nats, with {best['bytes'] / usual['bytes']:.2f} of the bytes",
)
lessons.claim(
    57,
    measured=f"{TRIALS} trials in {spent} steps ({spent / (TRIALS * STEPS):.0%} of running all to the end) found settings with a loss of "
    f"{best['untouched']['loss']:.2f} on rows that decided nothing, in {best['bytes'] / 1e3:.0f} KB, where the usual ones reach "
    f"{usual['untouched']['loss']:.2f} in {usual['bytes'] / 1e3:.0f} KB; and the smallest adapter within 0.05 of that has "
    f"{as_good['bytes'] / 1e3:.0f} KB",
    holds=best["untouched"]["loss"] < usual["untouched"]["loss"] and spent < TRIALS * STEPS,
)

# %% [markdown]
# ## The Pareto picture
#
# A setting is on the *Pareto front* if no other is at least as good in bytes and in loss and better in one. Everything off the front is a waste, everything on it is a fair choice. The picture has the finished trials, and full fine-tuning and LoRA with the same number of steps. Bytes are the model states; activations are nearly the same for all.

# %%
packed = compared["QLoRA r 8"]["states"] - 16 * compared["QLoRA r 8"]["trained"]  # frozen weights and constants in NF4
everything = [("trial", packed + trial["bytes"], trial["untouched"]["loss"]) for trial in finished]
everything += [(name, run["states"], run["test"]) for name, run in {
    "full": finetune("cipher", **runs["full"]), "LoRA r 8": finetune("cipher", **runs["LoRA r 8"])}.items()]
everything.append(("QLoRA r 8", packed + usual["bytes"], usual["untouched"]["loss"]))

front = sorted({(size, loss) for _, size, loss in everything
                if not any(s <= size and other <= loss and (s, other) != (size, loss) for _, s, other in everything)})
fig, ax = lessons.figure(height=3)
ax.step([size / 1e6 for size, _ in front], [loss for _, loss in front], where="post", color="0.8", lw=4, linestyle="-", label="Pareto front")
ax.plot(*zip(*[(size / 1e6, loss) for name, size, loss in everything if name == "trial"], strict=True), linestyle="none", marker="o", color="0.3",
        markersize=5, label="finished trials of the search (QLoRA)")
for (name, size, loss), marker in zip(everything[-3:], "s^D", strict=True):
    ax.plot(size / 1e6, loss, marker, color=lessons.ACCENT, markersize=6, linestyle="none")
    beside = {"xytext": (-9, 0), "ha": "right", "va": "center"} if name == "full" else {"xytext": (0, 9), "ha": "center"}
    ax.annotate(name, (size / 1e6, loss), textcoords="offset points", color=lessons.ACCENT, **beside)
ax.margins(x=0.08, y=0.2)
ax.set(xlabel="model states, MB", ylabel="loss on untouched rows,\nnats per token")
ax.legend(loc="upper right")
lessons.show(fig, alt="Loss against bytes of model states, with the Pareto front as a staircase: the search's QLoRA trials at the left, "
             "LoRA with rank 8 to their right and above the front, full fine-tuning far to the right with the least loss.")
for size, loss in front:
    print(f"on the front: {size / 1e6:.2f} MB, loss {loss:.3f}")

# %% [markdown]
# Read the picture as a price list. In a model this small a few hundred kilobytes buy a lot of loss, and full fine-tuning is on the front: if its bytes fit, take it (document 002 says so too). In a model of 7 billion the same step to the right costs a hundred gigabytes.

# %%
if lessons.gpu():
    breakdown = memory.estimate("smollm2", "qlora", "bfloat16", batch=8, seq=512)
    print(torch.cuda.get_device_name(), f"predicted for `handtuned finetune` with 8 × 512 tokens: {breakdown.peak / GB:.2f} GB; "
          "run `handtuned memory --model smollm2 --measure` and compare")
else:
    lessons.skipped("the memory breakdown of `handtuned finetune` on this GPU")

# %% [markdown]
# ## Exercise 12.1: The Pareto front
#
# Write `pareto(points)`: from a list of (bytes, loss), the points that no other point beats, sorted by bytes. A point beats another if it is at most as large in both and smaller in at least one.

# %%
def pareto(points):
    raise NotImplementedError


lessons.check("12.1", pareto);

# %% [markdown]
# ## Exercise 12.2: The best that fits
#
# Write `choose(budget, runs)`: `runs` maps a name to (loss, moments), and moments maps the moments of a training step to the bytes alive then. Return the name with the least loss among those that fit into `budget` bytes, or None.

# %%
def choose(budget, runs):
    raise NotImplementedError


lessons.check("12.2", choose);

# %% [markdown]
# ## Exercise 12.3: Successive halving
#
# Write `halving(settings, evaluate, steps)`: evaluate all settings for `steps` steps with `evaluate(setting, steps)`, which returns a loss; keep the better half (rounded up); double the steps; go on until one is left, and return it.

# %%
def halving(settings, evaluate, steps):
    raise NotImplementedError


lessons.check("12.3", halving);

# %% [markdown]
# ## Exercise 12.4: The capstone
#
# Your own rows, a memory budget, a loop of your own parts, answers before and after, and an adapter that PEFT loads. Write `capstone(model, tokenizer, rows, budget, directory)`:
#
# - **It gets** a transformers Llama in FP32 on the CPU and its tokenizer; `rows`, a list of (question, answer); `budget`, the bytes that it may take at its peak above the model; and an empty `directory`.
# - **It does** five things: answer all questions, put an adapter into the model (not into a copy, then the checker can compare logits as well), train it on the rows within the budget, save it in PEFT's format, answer again.
# - **It gives** two lists of texts: the answers before and the answers after, made by `answer` below.
#
# Most of it you have already written. What you skipped, `lessons.solution("07.4", now=True)` shows, and so on:
#
# | part | yours from |
# |---|---|
# | an adapted layer: an autograd Function, forward and backward | 07.2 and 07.4 (the kernels of 07.7 also fit, but interpreted they take minutes) |
# | one row in memory, the gradients of all | 06.1 |
# | blocks recomputed in backward | 05.2; the input of the first block needs `requires_grad_()`. Not a must: one row takes 0.65 MB above the model with it, 0.92 MB without, and the budget is 1.3 MB |
# | learning rate | 06.3, 20 steps with a peak of 2e-2 |
#
# New is the data: the question in the chat template, the answer, the end token, and labels that are −100 up to the answer, each the token that *follows*. And the file: `adapter_model.safetensors` holds A and B by the paths of their layers (`base_model.model.model.layers.0.mlp.up_proj.lora_A.weight`), `adapter_config.json` says how to apply them. The library has both for a real run: `apply_lora_to_model` and `save_adapter`.
#
# The checker brings a small model, six rows, and a budget for which six rows at once are too much. It wants every row answered right, the base as it was to the bit, nothing but the adapter in the files, and from PEFT the same logits. With `capstone.rows = […]` it takes your own rows instead of its six. It needs PEFT itself (`pip install peft`).
#
# On a real model you call the same function, after `model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct", dtype=torch.float32)`, with a lower learning rate. Or one command does it, in 4 bits: `handtuned finetune --data my.jsonl --memory-budget 2GB`.

# %%
@torch.no_grad()
def answer(model, tokenizer, question):
    """What the model says to a question: greedy, 16 tokens at most."""
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.eval().generate(**prompt, max_new_tokens=16, do_sample=False)
    return tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def capstone(model, tokenizer, rows, budget, directory):
    raise NotImplementedError  # before = [answer(model, tokenizer, question) for question, _ in rows] …


# capstone.rows = [("What is my cat called?", "Minka"), …]  # four or more of your own
lessons.check("12.4", capstone);

# %% [markdown]
# ## What to remember
#
# - Add up on paper first: a breakdown rules out most settings for free.
# - What fits is chosen by the task. QLoRA costs little loss and saves most where the linear layers are most of the model.
# - There is no rank for all tasks. Learning another form takes little rank, learning facts takes much.
# - A search needs four things: a budget of bytes, a budget of steps, a seed, and rows that it never saw.
#
# On a real model: `handtuned finetune --memory-budget 8GB` trains one within a budget, `handtuned memory --gpu SIZE` says what fits, `handtuned tune --minutes 20` searches the settings. This was the last lesson; the [map of the course](README.md) leads back to any lesson.

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
# # 11. How do many machines share one model?
#
# Eight GPUs that each hold the whole model, the whole optimizer and an eighth of the batch: that is data parallelism, and seven eighths of its memory are copies. *ZeRO* cuts the copies away, one kind after the other. In this lesson two processes on your machine train one model in seven ways. They learn the same to the bit, and you count the bytes that each holds and the numbers that each sends.
#
# You need [lesson 04](04_where_memory_goes.ipynb) (16 bytes per parameter) and [lesson 06](06_faking_a_big_batch.ipynb) (the gradient of a batch in parts). The claims come from document 002 (efficient network training).
#
# Terms: data parallelism 数据并行, process 进程, shard 分片, optimizer state sharding 优化器状态分片, gradient sharding 梯度分片, parameter sharding 参数分片, offload 卸载到内存

# %%
import inspect
import json
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from handtuned import lessons, memory
from handtuned.amp import MasterWeights
from handtuned.nn.transformer import Transformer
from handtuned.optim import AdamW, ZeroOptimizer
from handtuned.optim.zero_parameters import Gathering
from handtuned.optim.zero_collectives import Collectives
from torch.nn.parallel import DistributedDataParallel

GB = 10**9

# %% [markdown]
# ## Words
#
# Several processes, each with its own device, train together. The number of processes is the *world size* N, each one's number its *rank*. They talk in *collectives*, calls that all ranks make at the same time:
#
# | collective | before | after |
# |---|---|---|
# | broadcast | rank 0 has a tensor | all have it |
# | all-reduce | each has a tensor | all have the sum |
# | reduce-scatter | each has a tensor | rank r has piece r of the sum |
# | all-gather | rank r has piece r | all have the whole |
#
# ## On four numbers
#
# Two ranks, a gradient of four numbers, each rank has computed its own on its part of the batch.
#
# **Write down your guess:** which of the collectives are two others done one after the other?

# %%
lessons.guess("11.a", "which collective is two others, one after the other?")
gradients = np.array([[1.0, 2.0, 3.0, 4.0],  # rank 0
                      [10.0, 20.0, 30.0, 40.0]])  # rank 1


def reduce_scatter(tensors):
    total = tensors.sum(axis=0)
    return total.reshape(len(tensors), -1)  # row r stays on rank r


def all_gather(pieces):
    return np.tile(pieces.reshape(-1), (len(pieces), 1))


pieces = reduce_scatter(gradients)
whole = all_gather(pieces)
print("reduce-scatter: rank 0 has", pieces[0], "rank 1 has", pieces[1])
print("all-gather:     rank 0 has", whole[0], "rank 1 has", whole[1])
lessons.measured("11.a", "all-reduce: reduce-scatter, then all-gather")
assert (whole == gradients.sum(axis=0)).all()

# %% [markdown]
# All-reduce is reduce-scatter and then all-gather. In a ring of N devices each of the two sends (N − 1)/N of the tensor over every link, so count A elements for each and 2A for an all-reduce of A.
#
# *DDP* (distributed data parallel) does one all-reduce of the gradients in every step. All ranks then make the same update, on the same weights, with the same state.
#
# **Here is the idea of ZeRO:** put the optimizer's update *between* the two halves. After the reduce-scatter rank r has piece r of the gradient. So let it update piece r of the weights, with piece r of Adam's state, and all-gather the new weights. Same traffic, and nobody ever needed the other pieces of the state.

# %%
fig, axes = lessons.figure(width=7, height=1.9, columns=4)
for ax, (title, owners) in zip(axes, {
    "DDP": [[0] * 4, [1] * 4, [0] * 4, [1] * 4, [0] * 4, [1] * 4],
    "ZeRO-1": [[0] * 4, [1] * 4, [0] * 4, [1] * 4, [0, 0, -1, -1], [-1, -1, 1, 1]],
    "ZeRO-2": [[0] * 4, [1] * 4, [0, 0, -1, -1], [-1, -1, 1, 1], [0, 0, -1, -1], [-1, -1, 1, 1]],
    "ZeRO-3": [[0, 0, -1, -1], [-1, -1, 1, 1]] * 3,
}.items(), strict=True):
    lessons.who_reads(ax, owners, title)
    ax.set_ylim(6.1, -0.1)
for row, name in enumerate(("weights", "gradients", "Adam, master")):
    axes[0].text(-0.3, 2 * row + 1, name, ha="right", va="center", fontsize=8)
lessons.show(fig, alt="Which of four numbers each of two ranks holds. DDP: both hold everything. ZeRO-1: Adam's state is cut in two. "
             "ZeRO-2: gradients too. ZeRO-3: weights too.")

# %% [markdown]
# ## Bytes on paper
#
# In mixed precision a parameter has 2 bytes of weight, 2 of gradient and 12 of optimizer state (FP32 master, *m*, *v*). With A parameters on N ranks document 002 gives:
#
# | | cut among the ranks | bytes per rank |
# |---|---|---|
# | DDP | nothing | 16A |
# | ZeRO-1 | optimizer state | 4A + 12A/N |
# | ZeRO-2 | and gradients | 2A + 14A/N |
# | ZeRO-3 | and parameters | 16A/N |
#
# **Write down your guess** for 7 billion parameters on 8 GPUs.

# %%
lessons.guess("11.b", "GB per GPU for 7 billion parameters on 8 GPUs: DDP, ZeRO-1, 2, 3?")
stages = {"DDP": 0, "ZeRO-1": 1, "ZeRO-2": 2, "ZeRO-3": 3}
paper = {name: memory.estimate(7e9, dtype="bfloat16", zero=stage, world_size=8) for name, stage in stages.items()}
parts = {
    "weights": [breakdown["weights"] / GB for breakdown in paper.values()],
    "gradients": [breakdown["gradients"] / GB for breakdown in paper.values()],
    "Adam and masters": [(breakdown["optimizer state"] + breakdown["master weights"]) / GB for breakdown in paper.values()],
}
fig, ax = lessons.figure(height=2.6)
lessons.stacked(ax, list(stages), parts, unit="GB", form="{:.4g}")
lessons.show(fig, alt="Model states per GPU for 7 billion parameters on 8 GPUs: 112 GB under DDP, then 38.5, 26.25 and 14 GB under "
             "ZeRO-1, 2 and 3.")
lessons.measured("11.b", ", ".join(f"{breakdown.states / GB:.4g}" for breakdown in paper.values()))

# %% [markdown]
# ## The library's ZeRO
#
# `ZeroOptimizer` is an optimizer of this rank's shards. Its step is the idea above, nearly word for word: update the shard's master, round it into the shard, gather (under stage 3 there is nothing to gather yet: weights are gathered when a layer needs them).

# %%
lessons.source(ZeroOptimizer.step, first="for group, ours in zip")
lessons.source(ZeroOptimizer.write_back)

# %%
lessons.source(Collectives.reduce_scatter)

# %% [markdown]
# What `_reduce_scatter` calls is torch.distributed; the library adds only the counting. Stage 3 needs one thing more. A layer's weights must be whole while the layer computes, in forward and again in backward, and nowhere else. So hooks on every module gather them before and give the memory back after:

# %%
lessons.source(Gathering.gather)

# %% [markdown]
# At any moment one layer is whole and all others are in pieces. That is why stage 3 can train a model that fits on none of its devices.
#
# ## Two processes
#
# A notebook is one process. So the next cells define functions, and `launch` writes their source into a file and starts it twice with `torchrun`, PyTorch's own launcher. The processes talk through gloo, PyTorch's collectives for CPUs; on GPUs it would be NCCL. `work` is what each of them runs; what it returns comes back as JSON.

# %%
HEAD = """
import json, sys, warnings
import torch, torch.distributed as dist, torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from handtuned.amp import MasterWeights
from handtuned.nn.transformer import Transformer
from handtuned.optim import AdamW, ZeroOptimizer
"""
TAIL = """
if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    with open(f"{sys.argv[1]}/{rank}.json", "w") as file:
        json.dump(work(rank, size), file)
    dist.barrier()  # no rank leaves while another still reads from it
    dist.destroy_process_group()
"""


def launch(*functions, processes=2):
    """Run the function `work` of `functions` in so many processes; what each rank returned."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        script = Path(directory) / "worker.py"
        script.write_text("\n\n".join([HEAD, *map(inspect.getsource, functions), TAIL]), encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(processes),
                   "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", str(script), directory]
        done = subprocess.run(command, capture_output=True, text=True, timeout=110)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        return [json.loads((Path(directory) / f"{rank}.json").read_text()) for rank in range(processes)]


# %% [markdown]
# The model is a small decoder. Each rank takes its part of every batch. Under DDP and under ZeRO the gradient is the mean over ranks, so with equal parts it is the gradient of the whole batch (lesson 06).
#
# **Write down your guess:** after eight steps, how far are the weights of ZeRO-1, 2, 3 and of the offloaded stages from those of DDP?

# %%
lessons.guess("11.c", "after eight steps, how far are the weights from DDP's?")
def model_of(dtype):
    torch.manual_seed(0)
    return Transformer(vocab_size=65, num_layers=2, d_model=64, num_heads=4, d_ff=172).to(dtype)


def loss_of(model, step, rank, size):
    start = torch.randint(0, 65, (8, 2), generator=torch.Generator().manual_seed(step))
    tokens = (start[:, :1] + start[:, 1:] % 4 * torch.arange(17)) % 65  # arithmetic sequences: something to learn
    mine = tokens[rank::size]
    return F.cross_entropy(model(mine[:, :-1]).flatten(0, 1).float(), mine[:, 1:].flatten())


def mean(value):
    total = torch.tensor(value)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def train_ddp(rank, size, steps=8):
    model = model_of(torch.float32)
    wrapped = DistributedDataParallel(model)
    optimizer = AdamW(model.parameters(), lr=1e-2, fused=False)
    losses = []
    for step in range(steps):
        loss = loss_of(wrapped, step, rank, size)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean(loss.item()))
    return model, losses


def train_zero(stage, offload, rank, size, steps=8):
    model = model_of(torch.float32)
    optimizer = ZeroOptimizer(model.parameters(), AdamW, stage=stage, offload=offload, lr=1e-2, fused=False)
    losses = []
    for step in range(steps):
        loss = loss_of(model, step, rank, size)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean(loss.item()))
    optimizer.close()  # whole weights again
    return model, losses


def work(rank, size):
    reference, losses = train_ddp(rank, size)
    result = {"losses": losses}
    for stage in (1, 2, 3):
        for offload in (False, True):
            model, others = train_zero(stage, offload, rank, size)
            furthest = max((p - q).abs().max().item() for p, q in zip(model.parameters(), reference.parameters(), strict=True))
            result[f"ZeRO-{stage}" + " + offload" * offload] = [furthest, max(abs(a - b) for a, b in zip(losses, others, strict=True))]
    return result


parity = launch(model_of, loss_of, mean, train_ddp, train_zero, work)
losses = parity[0].pop("losses")
print(f"DDP: loss {losses[0]:.4f} → {losses[-1]:.4f} in {len(losses)} steps")
for name, (weights, loss) in parity[0].items():
    print(f"{name:17} weights differ from DDP's by at most {weights:g}, losses by {loss:g}")
lessons.measured("11.c", f"{max(weights for weights, _ in parity[0].values()):g}")
assert all(difference == 0 for pair in parity[0].values() for difference in pair)

# %% [markdown]
# Not a bit. With two ranks a sum has one order only; with more, reduction orders differ and so do last bits. ZeRO is no approximation. It changes *where* numbers lie, not which.
#
# ## Bytes, counted
#
# Now in BF16 with masters, as on the paper above. `bytes_held` counts the storages of a rank: after backward, when gradients are there. For DDP the same is counted by hand. (The odd thousandth in the optimizer's column is Adam's step counter, one number per tensor.)

# %%
def count_ddp(rank, size):
    model = model_of(torch.bfloat16)
    wrapped = DistributedDataParallel(model)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    masters = MasterWeights(model, optimizer)
    for step in range(2):
        loss_of(wrapped, step, rank, size).backward()
        gradients = sum(p.grad.nbytes for p in model.parameters())
        masters.collect_gradients()
        optimizer.step(**masters.step_arguments())
        optimizer.zero_grad()
    moments = sum(s["exp_avg"].nbytes + s["exp_avg_sq"].nbytes for s in optimizer.state.values())
    states = moments + sum(m.nbytes for m in masters.masters.values())
    return {"parameters": sum(p.nbytes for p in model.parameters()), "gradients": gradients, "optimizer state": states, "host": 0}


def count_zero(stage, offload, rank, size):
    model = model_of(torch.bfloat16)
    optimizer = ZeroOptimizer(model.parameters(), AdamW, stage=stage, offload=offload, lr=1e-3)
    optimizer.bucket_elements = 10_000
    for step in range(2):
        optimizer.group.traffic.clear()
        loss_of(model, step, rank, size).backward()
        held = optimizer.bytes_held()
        optimizer.step()
        optimizer.zero_grad()
    sent = optimizer.group.traffic
    return held | {"sent": sent["reduce-scatter"] + sent["all-gather"]}


def work(rank, size):
    result = {"A": sum(p.numel() for p in model_of(torch.bfloat16).parameters()), "DDP": count_ddp(rank, size)}
    for stage in (1, 2, 3):
        for offload in (False, True):
            result[f"ZeRO-{stage}" + " + offload" * offload] = count_zero(stage, offload, rank, size)
    return result


counted = launch(model_of, loss_of, count_ddp, count_zero, work)[0]
A, N = counted.pop("A"), 2
kinds = ("parameters", "gradients", "optimizer state")
device = {name: sum(held[kind] for kind in kinds) / A for name, held in counted.items()}
print(f"{A:,} parameters, {N} ranks; bytes per parameter on each")
print(f"{'':18}{'parameters':>12}{'gradients':>12}{'optimizer':>12}{'device':>10}{'host':>8}")
for name, held in counted.items():
    row = [held[kind] / A for kind in kinds]
    print(f"{name:18}" + "".join(f"{v:12.3f}" for v in row) + f"{device[name]:10.3f}{held['host'] / A:8.3f}")

# %%
formula = {"DDP": 16, "ZeRO-1": 4 + 12 / N, "ZeRO-2": 2 + 14 / N, "ZeRO-3": 16 / N}
worst = max(abs(device[name] / formula[name] - 1) for name in formula)
on_eight = {name: breakdown.states / GB for name, breakdown in paper.items()}
lessons.claim(
    45,
    measured=f"two ranks hold {', '.join(f'{device[name]:.2f}' for name in formula)} bytes per parameter under DDP and ZeRO-1, 2, 3, "
    f"where the formulas say {', '.join(f'{v:g}' for v in formula.values())} (off by {worst:.1%} at most); for 7 billion on 8 they give "
    f"{', '.join(f'{v:g}' for v in on_eight.values())} GB. These are states only: activations come on top, uncut",
    holds=worst < 0.02 and list(on_eight.values()) == [112, 38.5, 26.25, 14],
)

# %% [markdown]
# ## What it costs in traffic
#
# The library counts every element that goes through a collective. DDP's all-reduce is 2A by definition.

# %%
traffic = {"DDP": 2.0} | {name: counted[name]["sent"] / A for name in ("ZeRO-1", "ZeRO-2", "ZeRO-3")}
fig, ax = lessons.figure(height=2)
lessons.bars(ax, list(traffic), list(traffic.values()), unit="A", form="{:.2f}")
ax.set_xlabel("elements that a rank sends per step, in units of the parameters A")
lessons.show(fig, alt="Elements sent per step: twice the parameters under DDP, ZeRO-1 and ZeRO-2, three times under ZeRO-3.")

# %% [markdown]
# Stages 1 and 2 are free: the same traffic as DDP. Stage 3 pays half as much again, since weights must be gathered for forward and once more for backward. On paper, that is; measured on a network, latency and overlap decide.
#
# With gradient accumulation the bill changes. DDP and ZeRO-1 keep a whole gradient on each rank, so they can add up micro-batches in silence and communicate once per update (`no_sync` in PyTorch; the trainer of lesson 06 does it by itself). ZeRO-2 and 3 have no room for a whole gradient. They reduce every micro-batch, and their traffic grows with the number of micro-batches.
#
# ## Offload, and the order of things
#
# *ZeRO-offload* moves optimizer state and gradients into the host's memory and runs the update there. Document 002 orders the variants by memory: DDP < ZeRO-1 < ZeRO-2 < ZeRO-2 + offload < ZeRO-3 < ZeRO-3 + offload.
#
# **Write down your guess:** read "<" as "takes less". Is DDP the smallest? Read it as "saves less". Is ZeRO-2 + offload always larger than ZeRO-3?

# %%
lessons.guess("11.d", "is DDP the smallest? Is ZeRO-2 + offload always larger than ZeRO-3?")
order = sorted(device, key=device.get)
ranks = 2 ** np.arange(0, 8)
curves = {
    "DDP": np.full(len(ranks), 16.0),
    "ZeRO-1": 4 + 12 / ranks,
    "ZeRO-2": 2 + 14 / ranks,
    "ZeRO-3": 16 / ranks,
    "ZeRO-2 + offload": np.full(len(ranks), 2.0),
    "ZeRO-3 + offload": 2 / ranks,
}
looks = {"DDP": ("0.6", "-"), "ZeRO-1": ("0.6", "--"), "ZeRO-2": ("0.6", "-."), "ZeRO-3": ("0.1", "-"),
         "ZeRO-2 + offload": (lessons.ACCENT, "--"), "ZeRO-3 + offload": (lessons.ACCENT, ":")}
fig, ax = lessons.figure(height=3)
for name, values in curves.items():
    ax.plot(ranks, values, color=looks[name][0], linestyle=looks[name][1])
    ax.text(ranks[-1] * 1.1, values[-1] * (1.25 if name == "ZeRO-2" else 0.82 if name == "ZeRO-2 + offload" else 1), name, va="center", fontsize=8, color=looks[name][0] if looks[name][0] != "0.6" else "0.4")
    ax.plot(2, device[name], "o", color=looks[name][0], markersize=5)
ax.axvline(8, color="0.85", lw=0.8, linestyle="-")
ax.text(8.3, 20, "the notes' N = 8", color="0.4", fontsize=8)
ax.set(xscale="log", yscale="log", xlabel="ranks N (dots: measured on 2)", ylabel="bytes per parameter on the device", xlim=(0.9, 420), ylim=(0.012, 30))
ax.set_xticks(ranks, [str(n) for n in ranks])
ax.minorticks_off()
lessons.show(fig, alt="Bytes per parameter on the device against the number of ranks: ZeRO-2 with offload stays at 2 and is crossed by "
             "ZeRO-3, which falls with 1/N, at 8 ranks. Dots show the values measured on two ranks.")
lessons.measured("11.d", "from the smallest, on two ranks: " + ", ".join(order))

# %% [markdown]
# And by speed? 002 orders: ZeRO-1 > ZeRO-2 > ZeRO-2 + offload > ZeRO-3 > ZeRO-3 + offload. Seconds depend on the network; what is sent can be counted.
#
# **Write down your guess:** how many elements per parameter does a rank send in a step, with ZeRO-1, 2 and 3? How many bytes per parameter more does offload move, to the host and back?

# %%
lessons.guess("11.e", "elements sent per parameter with ZeRO-1, 2, 3, and the bytes that offload adds on two ranks?")
moved = {name: counted[name]["sent"] / A for name in counted if "sent" in counted[name]}
over_link = 4 / N  # bytes per parameter and step: each rank's share of the gradient down, of the new weights up
lessons.measured("11.e", ", ".join(f"{moved[name]:.2f}" for name in ("ZeRO-1", "ZeRO-2", "ZeRO-3")) + f"; {over_link:g} bytes")
lessons.claim(
    66,
    measured=f"elements sent per step and parameter: ZeRO-1 {moved['ZeRO-1']:.2f}, ZeRO-2 {moved['ZeRO-2']:.2f}, ZeRO-3 {moved['ZeRO-3']:.2f}, so 1 and 2 "
    f"are equal (until gradients are accumulated) and 3 is behind them. Offload sends as much between the ranks ({moved['ZeRO-2 + offload']:.2f}) and "
    f"{over_link:g} bytes per parameter more to the host and back; whether that costs more than ZeRO-3's extra gather is decided by the "
    "link to the host, which no count knows",
    holds=abs(moved["ZeRO-1"] - moved["ZeRO-2"]) < 0.01 and moved["ZeRO-3"] > 1.4 * moved["ZeRO-2"]
    and abs(moved["ZeRO-2 + offload"] - moved["ZeRO-2"]) < 0.01,
)

crossing = int(ranks[np.argmax(curves["ZeRO-3"] <= curves["ZeRO-2 + offload"])])
eight = memory.estimate(7e9, dtype="bfloat16", zero=2, world_size=8, offload=True)
lessons.claim(
    47,
    measured=f"by bytes on the device, smallest first: {' < '.join(order)}. As memory taken the notes' chain reads backwards (their own list of tips has "
    f"it the other way round); as memory saved it holds but for one link: on two ranks ZeRO-2 + offload ({device['ZeRO-2 + offload']:.2f} bytes per parameter) holds less than "
    f"ZeRO-3 ({device['ZeRO-3']:.2f}); the two meet at N = {crossing}, where both leave {eight.states / GB:g} GB of 7 billion",
    holds=(order[0] == "ZeRO-3 + offload" and order[-1] == "DDP" and device["ZeRO-2 + offload"] < device["ZeRO-3"]
           and crossing == 8 and eight.states == paper["ZeRO-3"].states),
)

# %% [markdown]
# The notes' other advice, not to go beyond ZeRO-2 + offload, is about speed and depends on the links between the devices. Where they are fast, ZeRO-3 (under its PyTorch name, FSDP) is the usual way to train what does not fit.
#
# And one reminder of lesson 04: activations are not cut by any stage. Each rank keeps those of its own part of the batch. The library's estimate has both:

# %%
for name, stage in stages.items():
    breakdown = memory.estimate("7b", dtype="bfloat16", batch=1, seq=2048, checkpoint=True, zero=stage, world_size=8)
    print(f"{name:7} states {breakdown.states / GB:6.2f} GB   peak with activations {breakdown.peak / GB:6.2f} GB, at: {breakdown.moment}")

# %%
if torch.cuda.device_count() > 1:
    print(f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}: torchrun --nproc-per-node {torch.cuda.device_count()} "
          "-m handtuned finetune --parallel zero3")
else:
    lessons.skipped("the command for real work on several GPUs: torchrun --nproc-per-node N -m handtuned finetune --parallel zero3")

# %% [markdown]
# ## Exercise 11.1: Bytes per rank
#
# Write `bytes_per_rank(parameters, ranks, stage, offload)` for mixed precision: 2 bytes of weight, 2 of gradient, 12 of optimizer state per parameter, cut as stage 0 (DDP) to 3 says; with `offload` (stages 2 and 3 only: under stage 1 the whole gradient stays) gradients and optimizer state are not on the device. The number of parameters is divisible by the number of ranks.

# %%
def bytes_per_rank(parameters, ranks, stage, offload):
    raise NotImplementedError


lessons.check("11.1", bytes_per_rank);

# %% [markdown]
# ## Exercise 11.2: Who owns what
#
# Write `shards(elements, ranks)`: a list with (start, stop) for each rank. Every rank's piece is ceil(elements / ranks) wide, except that no piece goes beyond the end: the last ones may be shorter, or empty. (Pieces of equal width are what a collective wants; it pads the last.)

# %%
def shards(elements, ranks):
    raise NotImplementedError


lessons.check("11.2", shards);

# %% [markdown]
# ## Exercise 11.3: A step of ZeRO-1
#
# Write `zero_step(weights, gradients, momenta, lr, beta)`. `weights` is a flat tensor, the same on all ranks; `gradients` a list with every rank's own gradient of it; `momenta` a list with every rank's piece of the momentum, equally wide. Update with momentum: m ← beta · m + g, w ← w − lr · m, where g is the *mean* gradient. Rank r may touch only its own piece of m, in place. Return the new weights, put together from the ranks' pieces.

# %%
def zero_step(weights, gradients, momenta, lr, beta):
    raise NotImplementedError


lessons.check("11.3", zero_step);

# %% [markdown]
# ## What to remember
#
# - Data parallelism averages gradients. All-reduce is reduce-scatter plus all-gather.
# - ZeRO puts the update between the two halves: 4A + 12A/N, 2A + 14A/N, 16A/N bytes instead of 16A, and the same numbers to the bit.
# - Stages 1 and 2 send as much as DDP. Stage 3 sends half as much again.
# - ZeRO-2 + offload leaves 2A on the device, whatever N is; ZeRO-3 leaves 16A/N. They meet at N = 8.
# - No stage cuts activations: that is what checkpointing and small micro-batches are for.
#
# On a real model: `handtuned finetune --method full --parallel zero2 --offload` in one process, and on N ranks the same behind `torchrun --nproc-per-node N -m`, with `zero1`, `zero2` or `zero3`.
#
# Now put it all together: [lesson 12, the capstone](12_fit_a_budget.ipynb).

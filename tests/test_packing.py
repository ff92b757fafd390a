"""Rows that share a sequence: computed as if each were alone, or refused; and batches of rows of like length."""

import json
import re
import shutil

import finetuned
import numpy as np
import pytest
import ranks
import torch
from adapted_models import shake
from finetuned import COMMON, finetune, losses
from handtuned.nn import apply_lora_to_model, lora_parameters
from helpers import assert_same_function
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_model
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from handtuned import cli
from handtuned.training import data, loop
from handtuned.training.evaluation import CausalLM
from handtuned.training.packing import pack, packer

model_dir, rows = finetuned.model_dir, finetuned.rows
LONGEST = 3 * 7 * 128  # terms of the longest chain of sums: 3 layers with 7 products of up to 128 terms each
# Every way that transformers' decoders differ in attention: rotary, learned and no positions; norms of queries and
# keys; sliding windows shorter than the rows; soft caps; latent keys; experts.
APART = {
    "llama": {}, "qwen2": {}, "qwen3": {"head_dim": 16}, "gemma2": {"head_dim": 16, "sliding_window": 5}, "phi3": {},
    "gemma3_text": {"head_dim": 16, "sliding_window": 5}, "smollm3": {}, "granite": {}, "olmo2": {},
    "gpt2": {"attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0},
    "mistral": {"sliding_window": 5}, "mixtral": {}, "qwen3_moe": {"head_dim": 16}, "gpt_neox": {}, "cohere2": {},
}  # fmt: skip
TOGETHER = {
    "mamba": {}, "falcon": {}, "opt": {}, "bloom": {}, "gpt_oss": {}, "jamba": {}, "rwkv": {}, "qwen3_next": {},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
}  # fmt: skip


SIZES = {"vocab_size": 40, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "pad_token_id": 0,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


def model_with(kind, attention, **sizes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | sizes)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def examples(*lengths, seed=0):
    """Rows of random tokens, of which a part is learnt, never the first."""
    rng, found = np.random.default_rng(seed), []
    for length in lengths:
        ids = rng.integers(1, 40, length).astype(np.int32)
        learnt = rng.random(length) < 0.6
        learnt[0], learnt[-1] = False, True
        found.append(data.Example(ids, np.where(learnt, ids, data.IGNORE_INDEX).astype(np.int32)))
    return found


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = CausalLM(model, torch.arange(1, 9)[None]).loss(batch)
    loss.backward()
    return loss.detach(), torch.cat([parameter.grad.flatten() for parameter in lora_parameters(model)])


def assert_packed_is_padded(model, lengths, limit=24):
    model = shake(apply_lora_to_model(model, rank=2, target_modules="all-linear")).train()
    some = examples(*lengths)
    bins = packer(model, limit)(some)
    padded, packed = data.collate(some, 0), data.collate(some, 0, bins=bins)
    assert packed["input_ids"].numel() < padded["input_ids"].numel() and "position_ids" in packed
    assert packed["input_ids"].shape[1] <= limit or len(bins) == 1
    loss, gradients = loss_and_gradients(model, padded)
    found, others = loss_and_gradients(model, packed)
    assert_same_function(found, loss, "loss", terms=LONGEST)
    assert_same_function(others, gradients, "gradients", terms=LONGEST)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", APART)
@pytest.mark.filterwarnings("ignore")
def test_loss_and_gradients_are_those_of_the_padded_batch(kind, attention):
    try:
        model = model_with(kind, attention, **APART[kind])
    except ValueError as error:
        assert "does not support an attention implementation" in str(error)
        pytest.skip(f"transformers has no {attention} for {kind}")
    assert_packed_is_padded(model, (20, 3, 9, 2, 11, 6, 5))


@pytest.mark.parametrize("kind", TOGETHER)
def test_a_model_that_mixes_rows_is_refused_by_name(kind):
    model = model_with(kind, "eager", **TOGETHER[kind])
    with pytest.raises(ValueError, match=rf"--packing: {type(model).__name__} with eager attention does not keep rows"):
        packer(model, 64)
    assert not any(parameter.grad is not None for parameter in model.parameters()) and not model.training


def flash_by_hand(module, query, key, value, attention_mask, scaling, position_ids=None, **kwargs):
    """The contract of flash attention in transformers: no mask; rows begin where positions do, in a batch of one."""
    assert attention_mask is None
    count = query.shape[2]
    starts = torch.zeros(count, dtype=torch.long)
    if len(query) == 1:
        starts = (position_ids[0].expand(count) == 0).long().cumsum(0)
    mask = (starts[:, None] == starts) & torch.ones(count, count).tril().bool()
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    found = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
    return found.transpose(1, 2), None


def test_flash_attention_gets_one_sequence():
    AttentionInterface.register("flash_by_hand", flash_by_hand)
    AttentionMaskInterface.register("flash_by_hand", flash_attention_mask)
    model = model_with("llama", "sdpa")
    model.config._attn_implementation = "flash_by_hand"
    assert_packed_is_padded(model, (20, 3, 9, 2, 11, 6, 5))


def test_16_bit_models_are_judged_alike():
    for dtype in (torch.bfloat16, torch.float16):
        packer(model_with("llama", "sdpa").to(dtype), 64)
        with pytest.raises(ValueError, match="does not keep rows"):
            packer(model_with("falcon", "sdpa").to(dtype), 64)


@given(st.lists(st.integers(2, 60), min_size=1, max_size=40), st.integers(60, 200))
def test_a_layout_holds_each_row_once_and_costs_no_more_than_padding(lengths, limit):
    bins = pack(lengths, limit, hidden=64)
    assert sorted(row for shared in bins for row in shared) == list(range(len(lengths)))
    width = max(sum(lengths[row] for row in shared) for shared in bins)
    assert width <= limit
    assert len(bins) * width * (6 * 64 + width) <= len(lengths) * max(lengths) * (6 * 64 + max(lengths))


def test_layouts_one_can_check_by_hand():
    assert sorted(map(sorted, pack([8, 1, 3, 4], 8, 64))) == [[0], [1, 2, 3]], "no padding is left"
    assert len(pack([5] * 8, 40, 64)) == 8, "rows of one length stay as they are"
    assert len(pack([50, 49], 60, 64)) == 2, "what does not fit is not forced"
    assert len(pack([400] + [20] * 20, 512, 64)) == 2
    assert len(pack([30, 29, 31, 30], 512, 8)) == 4, "a narrow model's attention costs more than the padding saved"


# Losses of runs that sum in another order (see test_distributed.py).
CLOSE = {"rel": 2e-5, "abs": 2e-5}


@pytest.fixture(scope="module")
def long_tailed(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp("long") / "rows.jsonl", np.random.default_rng(0)
    with open(path, "w") as file:
        for _ in range(24):
            words = " ".join(f"w{i}" for i in rng.integers(0, 40, min(24, 1 + int(rng.exponential(4)))))
            file.write(json.dumps({"prompt": words, "completion": " ".join(reversed(words.split()))}) + "\n")
    return str(path)


FLAGS = ["--max-steps", "8", "--save-steps", "4", "--learning-rate", "2e-3"]


@pytest.fixture(scope="module")
def packed(model_dir, long_tailed, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "out"
    assert finetune(model_dir, long_tailed, out, *FLAGS, "--gradient-accumulation-steps", "2", "--packing") == 0
    return out


def test_a_packed_run_is_the_padded_run_and_resumes_to_the_bit(model_dir, long_tailed, packed, tmp_path, monkeypatch):
    slots, collate = [], loop.collate

    def counted(*arguments):
        batch = collate(*arguments)
        slots.append((batch["input_ids"].numel(), "position_ids" in batch))
        return batch

    with monkeypatch.context() as patch:
        patch.setattr(loop, "collate", counted)
        assert finetune(model_dir, long_tailed, tmp_path / "padded", *FLAGS, "--gradient-accumulation-steps", "2") == 0
        padded, slots[:] = list(slots), []
        out = tmp_path / "again"
        shutil.copytree(packed, out)
        shutil.rmtree(out / "checkpoint-8")
        assert cli.main(["finetune", "--resume", str(out)]) == 0
    assert losses(packed) == pytest.approx(losses(tmp_path / "padded"), **CLOSE)
    assert losses(out) == losses(packed)
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (packed / name).read_bytes()
    assert not any(shared for _, shared in padded) and all(shared for _, shared in slots)
    assert sum(count for count, _ in slots) < 0.7 * sum(count for count, _ in padded[-len(slots) :])


def test_two_ranks_train_packed_as_one_process(model_dir, long_tailed, packed, tmp_path):
    ranks.finetune("--model", model_dir, "--data", long_tailed, *COMMON, *FLAGS, "--packing", "--output-dir",
                   str(tmp_path / "two"), "--parallel", "ddp")  # fmt: skip
    assert losses(tmp_path / "two") == pytest.approx(losses(packed), **CLOSE)


def test_packing_a_model_that_mixes_rows_is_one_clear_line(model_dir, rows, tmp_path, capsys):
    place = tmp_path / "model"
    shutil.copytree(model_dir, place)
    model_with("falcon", "sdpa", vocab_size=45).save_pretrained(place)
    assert finetune(str(place), rows, tmp_path / "out", "--packing") == 2
    assert "--packing: FalconForCausalLM with sdpa attention" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("n, batch", [(103, 4), (7, 3), (400, 8), (5, 8)])
def test_grouped_epochs_hold_each_row_once(n, batch):
    lengths = np.random.default_rng(1).integers(2, 500, n)
    taken = [i for step in range(3 * n) for i in data.batch_indices(step, n, batch, 7, lengths)]
    for epoch in range(3 * batch):
        assert sorted(taken[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert taken != [i for step in range(3 * n) for i in data.batch_indices(step, n, batch, 7)] or n < batch


def test_grouped_batches_hold_rows_of_like_length():
    lengths = np.random.default_rng(1).integers(2, 500, 1003)

    def padding(lengths_given):
        batches = [lengths[data.batch_indices(step, 1003, 8, 7, lengths_given)] for step in range(500)]
        return 1 - sum(batch.sum() for batch in batches) / sum(8 * batch.max() for batch in batches)

    assert padding(None) > 0.4 and padding(lengths) < 0.05
    firsts = [lengths[data.batch_indices(step, 1003, 8, 7, lengths)].mean() for step in range(40)]
    assert abs(np.corrcoef(firsts, range(40))[0, 1]) < 0.5, "the batches are shuffled again"


def test_group_by_length_by_flag_resumes_to_the_bit(model_dir, long_tailed, tmp_path):
    out = tmp_path / "out"
    assert finetune(model_dir, long_tailed, out, *FLAGS, "--group-by-length", "--lora-dropout", "0.1") == 0
    seen = losses(out)
    shutil.rmtree(out / "checkpoint-8")
    assert cli.main(["finetune", "--resume", str(out)]) == 0 and losses(out) == seen


def test_long_rows_are_dropped_by_flag(model_dir, long_tailed, tmp_path, capsys):
    flags = ["--max-steps", "1", "--max-seq-length", "16", "--eval-fraction", "0"]
    assert finetune(model_dir, long_tailed, tmp_path / "cut", *flags) == 0
    cut = capsys.readouterr().out
    assert finetune(model_dir, long_tailed, tmp_path / "dropped", *flags, "--drop-long-rows") == 0
    told = capsys.readouterr().out
    truncated = int(re.search(r"rows truncated to max_seq_length 16 tokens: (\d+)", cut)[1])
    count = truncated + int(re.search(r"rows dropped, too long for max_seq_length 16 tokens: (\d+)", cut)[1])
    assert truncated and f"rows dropped, too long for max_seq_length 16 tokens: {count}\n" in told
    assert f"{24 - count} rows to learn from" in told and "truncated" not in told


def test_the_benchmark_times_each_layout_and_counts_its_empty_places(tmp_path, capsys):
    import packing as benchmark

    model = make_model(tmp_path / "model", max_position_embeddings=512)
    benchmark.main(["--model", model, "--turns", "1", "--out", str(tmp_path / "packing.md")])
    table = [line.split(" | ") for line in (tmp_path / "packing.md").read_text().splitlines() if " × |" in line]
    assert [cells[2] for cells in table] == [*benchmark.LAYOUTS] * 2
    empty = [float(cells[3].rstrip("%")) for cells in table]
    assert empty[3] > 40 and max(empty[4:]) < 10 and all(float(cells[4]) > 0 for cells in table)

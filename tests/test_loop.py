"""The step that `finetune` takes is the study documents' step, put right."""

import copy

import pytest
import torch
from handtuned.amp import GradScaler
from handtuned.nn import apply_lora_to_model, lora_parameters
from handtuned.optim import cosine_with_warmup
from tiny import make_model, write_rows

pytest.importorskip("transformers")

from handtuned.training import data, loop
from handtuned.training.evaluation import CausalLM
from handtuned.training.models import load_base

STEPS = 4


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    place = tmp_path_factory.mktemp("loop")
    model, tokenizer = load_base(make_model(place / "model"))
    apply_lora_to_model(model, 4, 8.0, "all-linear")
    chats = data.load_rows(write_rows(place / "rows.jsonl", count=STEPS * 6)).rows
    return model, data.encode_rows(chats, tokenizer, 64).examples


def micro_batches(examples, step):
    """Three of two rows each, with different numbers of answer tokens."""
    return [data.collate(examples[at : at + 2], pad_id=0) for at in range(6 * step, 6 * step + 6, 2)]


def trained(prepared, dtype, step_of):
    """(losses, adapter) after some steps; `step_of(model, optimizer, schedule, scaler)` returns what does a step."""
    model = copy.deepcopy(prepared[0]).train()
    optimizer = torch.optim.SGD(list(lora_parameters(model)), lr=0.5)  # AdamW would blow up errors of small gradients
    schedule = cosine_with_warmup(optimizer, STEPS, 0.5)
    scaler = GradScaler(init_scale=1024.0, enabled=dtype == torch.float16)
    do = step_of(model, optimizer, schedule, scaler)
    losses = [do(micro_batches(prepared[1], step)) for step in range(STEPS)]
    return torch.tensor(losses), torch.cat([p.detach().flatten() for p in lora_parameters(model)])


def ours(dtype):
    def step_of(model, optimizer, schedule, scaler):
        training = loop.Training(CausalLM(model, torch.arange(8)[None]), optimizer, schedule, scaler, dtype)

        def do(batches):
            tokens = int(sum((batch["labels"] != data.IGNORE_INDEX).sum() for batch in batches))
            pairs = [(batch, batch is batches[-1]) for batch in batches]
            return loop.train_step(training, pairs, tokens, max_grad_norm=0.3)[0]

        return do

    return step_of


def reference(dtype):
    def step_of(model, optimizer, schedule, scaler):
        def do(batches):
            pairs = [(batch["input_ids"], batch["labels"]) for batch in batches]
            loss = loop.train_step_reference(model, pairs, optimizer, scaler, 0.3, dtype)
            schedule.step()
            return loss

        return do

    return step_of


def moved(prepared, adapter):
    """The change from the first adapter."""
    return adapter - torch.cat([p.detach().flatten() for p in lora_parameters(prepared[0])])


def test_the_step_is_the_documents_put_right(prepared):
    """Only the order of sums differs (all tokens meet the vocabulary there, answer tokens here): 16 eps per step."""
    losses, adapter = trained(prepared, torch.float32, ours(torch.float32))
    expected_losses, expected = trained(prepared, torch.float32, reference(torch.float32))
    tolerance = 16 * STEPS * torch.finfo(torch.float32).eps
    torch.testing.assert_close(losses, expected_losses, rtol=tolerance, atol=0)
    assert moved(prepared, expected).norm() > 0.1
    assert (adapter - expected).norm() <= tolerance * moved(prepared, expected).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_low_precision_it_is_as_near_to_fp32_as_the_reference(prepared, dtype):
    _, exact = trained(prepared, torch.float32, reference(torch.float32))
    _, expected = trained(prepared, dtype, reference(dtype))
    _, adapter = trained(prepared, dtype, ours(dtype))
    rounding = torch.finfo(dtype).eps * moved(prepared, exact).norm()
    assert (adapter - exact).norm() <= 2 * (expected - exact).norm() + rounding


def test_the_head_knows_what_backward_multiplies_its_loss_by(prepared, monkeypatch):
    """The loss scale over the tokens of the step, to the bit: gradients are rounded but once."""
    from handtuned.training import evaluation

    plain, factors = evaluation.linear_cross_entropy, []

    def watched(*args, loss_scale, found_inf, **more):
        loss = plain(*args, loss_scale=loss_scale, found_inf=found_inf, **more)
        loss.register_hook(lambda gradient: factors.append((loss_scale.item(), gradient.item())))
        return loss

    monkeypatch.setattr(evaluation, "linear_cross_entropy", watched)
    trained(prepared, torch.float16, ours(torch.float16))
    assert len(factors) == 3 * STEPS and all(known == met for known, met in factors)


@pytest.mark.parametrize("found", [False, True])
def test_an_overflow_noted_by_a_kernel_skips_the_step(found):
    """Whatever gradients look like afterwards; the next step is taken."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer, scaler = torch.optim.SGD([weight], lr=1.0), GradScaler(init_scale=4.0)
    for step, moved in enumerate((not found, True)):
        before = weight.detach().clone()
        scaler.scale(weight.sum()).backward()
        scaler.overflow_flag(weight.device).fill_(float(found and step == 0))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(weight, before) != moved
    assert scaler.get_scale() == (2.0 if found else 4.0)


@pytest.mark.parametrize(("kind", "plain"), [("gemma2", False), ("llama", True), ("qwen3", True)])
def test_a_soft_cap_is_seen_before_the_logits_are_large(kind, plain):
    """A young model's logits pass it unchanged; those that it learns would not."""
    from tiny_architectures import config_of
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config_of(kind))
    assert (CausalLM(model, torch.arange(4, 12)[None]).head is not None) == plain


def test_a_mean_of_means_is_another_step(prepared):
    """What the documents do: with unequal counts of tokens the difference is far beyond rounding."""

    def mean_of_means(model, optimizer, schedule, scaler):
        def do(batches):
            for batch in batches:
                logits, target = model(batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]
                (torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()) / len(batches)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            return 0.0

        return do

    _, expected = trained(prepared, torch.float32, reference(torch.float32))
    _, other = trained(prepared, torch.float32, mean_of_means)
    assert (other - expected).norm() > 1e-2 * moved(prepared, expected).norm()

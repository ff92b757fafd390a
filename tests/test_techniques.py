"""The first law: each technique of the course is reached from a command. Run with the flag, it calls the library."""

import argparse
import importlib
import inspect
import re
import sys
import threading

import finetuned
import pytest
from source_tree import ROOT

from handtuned import cli

pytest.importorskip("transformers")

model_dir, rows = finetuned.model_dir, finetuned.rows
QLORA = "finetune --max-steps 1 --gradient-accumulation-steps 2 --lora-dropout 0.1"
HALF = "finetune --method lora --dtype float16 --max-steps 1"
FULL = "finetune --method full --dtype bfloat16 --max-steps 1 --optim adamw8bit --lr-scheduler linear"
ZERO = "finetune --method lora --parallel zero3 --offload --max-steps 1"
DORA = "finetune --method lora --use-dora --use-rslora --loraplus-lr-ratio 16 --packing --max-steps 1"
PISSA = "finetune --method lora --init-lora-weights pissa --lora-fa --max-steps 1"
LOFTQ = "finetune --init-lora-weights loftq --max-steps 1"
GAUSSIAN = "finetune --method lora --init-lora-weights gaussian --memory-budget 1GB --max-steps 1"
CHECKPOINTED = "finetune --method lora --gradient-checkpointing --max-steps 1"
MEMORY = "memory --method lora --measure --seq 16 --batch 1 --gpu 8GB"

TECHNIQUES = [  # lesson, technique, command ({adapter} is what QLORA leaves), what it calls in the library
    ("03", "autocast", HALF, "torch.amp.autocast_mode.autocast.__enter__"),
    ("03", "loss scaling", HALF, "amp.GradScaler._unscale_grads_"),
    ("03", "adapting the loss scale", HALF, "amp.grad_scaler.next_scale"),
    ("03", "a product that scales before it rounds", HALF, "kernels.matmul.scaled_matmul"),
    ("03", "FP32 masters: gradients", FULL, "amp.MasterWeights.collect_gradients"),
    ("03", "FP32 masters: weights", FULL, "amp.MasterWeights.write_back"),
    ("04", "memory on paper", MEMORY, "memory.estimate.estimate"),
    ("04", "memory measured", MEMORY, "memory.tracker.measure"),
    ("04", "AdamW", QLORA, "optim.AdamW.step"),
    ("04", "AdamW with 8-bit moments", FULL, "optim.AdamW8bit.step"),
    ("04", "block-wise 8-bit codes", FULL, "optim.adamw8bit.quantize_blocks"),
    ("04", "the loss in chunks", QLORA, "nn.loss.linear_cross_entropy"),
    ("06", "gradient accumulation", QLORA, "optim.accumulate.TokenMean.part"),
    ("06", "warmup and cosine", QLORA, "optim.schedule.warmup_cosine"),
    ("06", "warmup and a straight line", FULL, "optim.schedule.schedule_with_warmup"),
    ("07", "LoRA, fused forward", QLORA, "kernels.lora.lora_linear"),
    ("07", "LoRA, fused backward", QLORA, "kernels.lora._LoRALinear.backward"),
    ("07", "dropout from a seed", QLORA, "kernels.dropout.new_seed"),
    ("08", "LoRA in a model", QLORA, "nn.apply_lora_to_model"),
    ("08", "an adapter saved", QLORA, "nn.save_adapter"),
    ("08", "an adapter loaded", "generate --adapter {adapter} --device cpu --max-new-tokens 1 w1", "nn.load_adapter"),
    ("08", "merging", "merge --adapter {adapter} --out {new}", "nn.merge.merge_and_unload"),
    ("08", "DoRA", DORA, "nn.variants.DoRALinear.forward"),
    ("08", "rsLoRA", DORA, "nn.variants.use_rslora"),
    ("08", "LoRA+", DORA, "nn.variants.lora_plus_groups"),
    ("08", "PiSSA", PISSA, "nn.variants.pissa_init"),
    ("08", "LoRA-FA", PISSA, "nn.variants.freeze_A"),
    ("08", "A from a normal distribution", GAUSSIAN, "nn.variants.gaussian_init"),
    ("08", "LoftQ", LOFTQ, "nn.variants.loftq_init"),
    ("05", "checkpoints between layers", CHECKPOINTED, "nn.checkpoint.checkpoint"),
    ("06", "short rows share a sequence", DORA, "training.packing.pack"),
    ("09", "NF4 with double quantization", QLORA, "quant.quantize_nf4"),
    ("10", "a model in 4 bits, shard by shard", QLORA, "quant.load_quantized"),
    ("10", "products with NF4 weights", QLORA, "kernels.nf4_matmul.quantized_product"),
    ("10", "the gradient through 4 bits", QLORA, "kernels.nf4_matmul.quantized_product_dx"),
    ("10", "what 4 bits would lose", "merge --adapter {adapter} --out {new} --errors", "nn.merge.merge_errors"),
    ("11", "optimizer state in shards", ZERO, "optim.ZeroOptimizer.write_back"),
    ("11", "gradients in shards", ZERO, "optim.zero_collectives.Collectives.reduce_scatter"),
    ("11", "parameters in shards", ZERO, "optim.zero_parameters.Gathering.gather"),
    ("11", "offloading", ZERO, "optim.zero_collectives.Host.fetch"),
    ("12", "training within a budget of bytes", GAUSSIAN, "memory.fit.fit"),
    ("12", "what would make it fit", MEMORY, "memory.recommend.recommend"),
]


def code_of(dotted):
    """The code object of a function, by its path in the package (or in torch)."""
    dotted = dotted if dotted.startswith("torch.") else f"handtuned.{dotted}"
    module, names = dotted, []
    while True:
        try:
            found = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module, _, name = module.rpartition(".")
            names.insert(0, name)
    for name in names:
        found = getattr(found, name)
    return inspect.unwrap(found).__code__


@pytest.fixture(scope="module")
def called(model_dir, rows, tmp_path_factory):
    """Command → the code that it ran; each command is run once."""
    ran, places = {}, {}

    def run(command):
        if command not in ran:
            new = tmp_path_factory.mktemp("run") / "out"
            if "{adapter}" in command:
                run(QLORA)
            words = command.format(adapter=places.get(QLORA), new=new).split()
            words[1:1] = {"finetune": ["--data", rows, "--output-dir", str(new), *finetuned.COMMON]}.get(words[0], [])
            words[1:1] = ["--model", model_dir] if words[0] in ("finetune", "memory") else []
            ran[command], places[command] = set(), new

            def note(frame, event, argument):
                if event == "call":
                    ran[command].add(frame.f_code)

            threading.setprofile(note)
            sys.setprofile(note)
            try:
                assert cli.main(words) == 0
            finally:
                sys.setprofile(None)
                threading.setprofile(None)
        return ran[command]

    return run


@pytest.mark.parametrize("lesson, technique, command, symbol", TECHNIQUES, ids=[row[1] for row in TECHNIQUES])
def test_the_command_runs_on_it(called, lesson, technique, command, symbol):
    assert code_of(symbol) in called(command), f"{command} does not call {symbol}"


@pytest.mark.parametrize("command, symbol", [(QLORA, "kernels.matmul.scaled_matmul"), (FULL, "optim.AdamW.step"),
                                             (HALF, "quant.quantize_nf4"),
                                             (QLORA, "optim.ZeroOptimizer.write_back")])  # fmt: skip
def test_without_its_flag_it_is_not_run(called, command, symbol):
    assert code_of(symbol) not in called(command)


@pytest.mark.parametrize("lesson", sorted({row[0] for row in TECHNIQUES}))
def test_its_lesson_ends_with_a_command(lesson):
    """All flags in it are the command's own."""
    (path,) = (ROOT / "notebooks").glob(f"{lesson}_*.py")
    last = path.read_text(encoding="utf-8").rpartition("# ## What to remember")[2]
    commands = [words.split() for words in re.findall(r"`handtuned (\w+[^`]*)`", last)]
    assert {words[0] for words in commands} & {row[2].split()[0] for row in TECHNIQUES if row[0] == lesson}
    for name, *words in commands:
        parser = argparse.ArgumentParser()
        importlib.import_module(f"handtuned.{cli.COMMANDS[name][0]}").add_arguments(parser)
        known = {flag for action in parser._actions for flag in action.option_strings}
        assert known.issuperset(word for word in words if word.startswith("--")), words

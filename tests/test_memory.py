"""Memory: the documents' figures, bytes by hand, recommendations, and the command."""

import pytest
import torch
from handtuned.nn.live_memory import LiveMemory
from handtuned.quant import quantize_nf4
from handtuned.quant.nf4 import nf4_bytes
from torch import nn

from handtuned import cli
from handtuned.memory import analyze_lora_params, analyze_memory_savings, korthikanti, measure
from handtuned.memory.estimate import estimate
from handtuned.memory.fit import arguments
from handtuned.memory.model_shapes import PRESETS, Shape, shape_of
from handtuned.memory.recommend import fit, recommend
from handtuned.training.settings import FinetuneSettings, parse_size

transformers = pytest.importorskip("transformers")
GB, GIB = 10**9, 2**30


class TestTheDocumentsFigures:
    def test_001_a_7b_model_in_fp32(self):
        breakdown = estimate(7e9)
        assert (breakdown["weights"], breakdown["gradients"], breakdown["optimizer state"]) == (
            28 * GB,
            28 * GB,
            56 * GB,
        )

    def test_002_sixteen_bytes_per_parameter_in_mixed_precision(self):
        breakdown = estimate(7e9, dtype="bfloat16")
        parts = ("weights", "gradients", "master weights", "optimizer state")
        assert [breakdown[part] for part in parts] == [14 * GB, 14 * GB, 28 * GB, 56 * GB]
        assert breakdown.states == 16 * 7 * GB == 112 * GB

    @pytest.mark.parametrize(("stage", "expected"), [(0, 112), (1, 38.5), (2, 26.25), (3, 14)])
    def test_002_zero_over_eight_devices(self, stage, expected):
        assert estimate(7e9, dtype="bfloat16", zero=stage, world_size=8).states == expected * GB

    def test_002_zero_2_with_offload_leaves_as_much_as_zero_3_on_eight_devices(self):
        offloaded = estimate(7e9, dtype="bfloat16", zero=2, world_size=8, offload=True)
        assert offloaded.states == 14 * GB == estimate(7e9, dtype="bfloat16", zero=3, world_size=8).states
        assert offloaded.host == 98 * GB / 8

    def test_002_28_5_is_gib_of_activations_with_stored_scores(self):
        assert korthikanti(1, 2048, 4096, 32, 32) == 28.5 * GIB
        assert korthikanti(1, 2048, 4096, 32, 32, flash=True) == 8.5 * GIB

    def test_003_18_gb_leaves_out_the_masters(self):
        breakdown = estimate("qwen2.5-1.5b", dtype="bfloat16")
        assert (breakdown.states - breakdown["master weights"]) / GB == pytest.approx(18.5, abs=0.05)
        assert breakdown.states / GB == pytest.approx(24.7, abs=0.05)

    def test_003_1_gb_leaves_out_the_embeddings_and_more(self):
        assert estimate("qwen2.5-1.5b", "qlora", "bfloat16").states / GB == pytest.approx(1.29, abs=0.01)

    def test_002_logits_of_qwen(self):
        assert 2048 * PRESETS["qwen2.5-1.5b"].vocab * 4 / GB == pytest.approx(1.24, abs=0.01)
        full = estimate("qwen2.5-1.5b", "lora", "bfloat16", seq=2048, logits="full")
        assert full["logits"] == 3 * 2048 * 151936 * 4
        assert estimate("qwen2.5-1.5b", "lora", "bfloat16", seq=2048)["logits"] < full["logits"] / 10


class TestShapes:
    def test_presets_have_the_published_sizes(self):
        published = {
            "smollm2": 134_515_008,
            "qwen2.5-0.5b": 494_032_768,
            "qwen2.5-1.5b": 1_543_714_304,
            "llama-3.2-1b": 1_235_814_400,
            "llama-3-8b": 8_030_261_248,
            "llama-7b": 6_738_415_616,
            "llama-2-70b": 68_976_648_192,
            "tinyllama-1.1b": 1_100_048_384,
            "mistral-7b": 7_241_732_096,
        }
        assert {name: PRESETS[name].parameters for name in published} == published

    def test_a_config_a_model_and_a_directory_agree(self, tmp_path):
        config = transformers.Qwen2Config(
            vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True,
        )  # fmt: skip
        model = transformers.Qwen2ForCausalLM(config)
        config.save_pretrained(tmp_path)
        counted = sum(p.numel() for p in model.parameters())
        for source in (config, model, config.to_dict(), str(tmp_path)):
            assert estimate(source, batch=1, seq=8).parameters == counted

    def test_a_directory_comes_before_the_preset_of_its_name(self, tmp_path, monkeypatch):
        """As `finetune` takes it."""
        monkeypatch.chdir(tmp_path)
        transformers.LlamaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2).save_pretrained("mistral-7b")
        assert shape_of("mistral-7b") is None and shape_of("llama-7b").layers == 32

    def test_numbers_and_names(self):
        assert shape_of(3).parameters == 3 and shape_of("350m").parameters == 350_000_000
        assert shape_of("7b").parameters == 7 * 10**9 and shape_of("7b").layers == 32
        assert shape_of(shape := Shape("mine", rounded=5)) is shape

    @pytest.mark.parametrize(
        ("model", "error", "message"),
        [
            ("no-such-model", ValueError, "no preset is called 'no-such-model'"),
            ("~nobody-of-this-name/x", ValueError, "no such model directory"),
            ("./no-such-model", ValueError, "no such model directory"),
            (0, ValueError, "must be positive"),
            (float("nan"), ValueError, "must be positive"),
            (True, TypeError, "got bool"),
            (None, TypeError, "got NoneType"),
            ({"model_type": "no-such-type"}, ValueError, "no-such-type"),
        ],
    )
    def test_what_is_no_model_is_refused(self, model, error, message):
        with pytest.raises(error, match=message):
            estimate(model)


@pytest.mark.parametrize("sizes", [(64, 64), (33, 7), (576, 1536), (1, 1), (500, 129)])
@pytest.mark.parametrize("nested", [True, False])
def test_nf4_bytes_are_those_of_an_nf4_tensor(sizes, nested):
    q = quantize_nf4(torch.randn(sizes), double_quant=nested)
    assert sum(nf4_bytes(sizes[0] * sizes[1], double_quant=nested)) == q.nbytes


class TestEstimate:
    def test_a_checkpoint_in_every_layer_beats_root_n_groups(self):
        config = transformers.LlamaConfig(num_hidden_layers=16)  # of the sizes of llama-7b
        peaks = {k: estimate(config, "qlora", "bfloat16", batch=4, seq=2048, checkpoint=k).peak
                 for k in (False, True, 4)}  # fmt: skip
        assert peaks[True] < peaks[4] < peaks[False]

    def test_eager_attention_costs_the_scores(self):
        flash, eager = (estimate("llama-7b", "lora", "bfloat16", seq=2048, flash=f) for f in (True, False))
        assert eager["activations: attention scores"] == 32 * 32 * 2048 * 2048 * 6
        assert flash["activations: attention scores"] == 0 and eager.peak > flash.peak

    def test_lora_on_fewer_projections_keeps_fewer_activations(self):
        some = estimate("smollm2", "lora", target_modules=("q_proj", "v_proj"))
        assert some.activations < estimate("smollm2", "lora").activations
        assert some.trainable == 30 * 8 * (576 + 576 + 576 + 192)

    def test_the_peak_is_the_sum_of_its_lines(self):
        config = transformers.LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=192, num_hidden_layers=7)
        for method in ("full", "lora", "qlora"):
            for checkpoint in (False, True, 5):
                breakdown = estimate(config, method, batch=2, seq=100, checkpoint=checkpoint)
                assert (
                    sum(line.at_peak for line in breakdown.lines.values())
                    == breakdown.peak
                    == max(breakdown.moments.values())
                )
                assert all(0 <= line.at_peak <= line.full for line in breakdown.lines.values())

    def test_accumulation_keeps_gradients_during_forward(self):
        once, twice = (estimate("smollm2", batch=8, accumulation_steps=k) for k in (1, 2))
        assert twice.moments["loss"] - once.moments["loss"] == twice["gradients"]

    def test_the_text_names_its_units(self):
        text = str(estimate("7b", batch=1, seq=2048))
        for part in ("28.00 GB", "56.00 GB", "112.00 GB = 104.31 GiB", "16 bytes per parameter", "█", "optimizer step"):
            assert part in text

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"method": "dora"}, "method must be one of full, lora, qlora, got 'dora'"),
            ({"dtype": "int8"}, "dtype must be one of"),
            ({"optimizer": "lion"}, "optimizer must be one of"),
            ({"batch": 0}, "batch must be an integer of at least 1, got 0"),
            ({"seq": 1.5}, "seq must be an integer"),
            ({"zero": 4}, "zero must be 0, 1, 2 or 3, got 4"),
            ({"checkpoint": 31}, "number of segments from 1 to 30, got 31"),
            ({"logits": "none"}, "logits must be"),
            ({"method": "lora", "target_modules": ("q_prj",)}, "target_modules: 'q_prj' matches no linear"),
            ({"answer_tokens": 10**9}, "answer_tokens must be from 0"),
            ({"model": 7e9, "method": "lora"}, "more than a number of parameters"),
        ],
        ids=lambda v: str(v)[:40],
    )
    def test_bad_arguments_are_named(self, change, message):
        with pytest.raises(ValueError, match=message):
            estimate(**{"model": "smollm2", **change})


class TestMeasure:
    def test_counts_by_hand(self):
        x = torch.randn(1000)

        def work():
            a = x + 1  # 4,000 bytes
            b = a * 2  # 8,000 alive
            del a
            c = b.view(10, 100)[2:].t()  # views are free
            d = torch.cat((c.reshape(-1), c.reshape(-1)))  # 3,200 twice, and 6,400
            return d

        measured = measure(work)
        assert measured.added == 4_000 + 2 * 3_200 + 6_400
        assert measured.after - measured.before == 6_400 == measured.result.nbytes
        assert measured.before >= x.nbytes

    def test_backward_by_hand(self):
        """At the worst moment: the output, the gradient given, that of sin's result, cos x, and their product."""
        n = 4 * 1000
        x = torch.randn(1000, requires_grad=True)

        def work():
            x.sin().exp().backward(torch.ones(1000))

        first, second = measure(work), measure(work)
        assert first.added == second.added == 5 * n
        assert first.after - first.before == n, "the product stays, as x.grad"
        assert second.after == second.before, "and is added to"

    def test_tensors_without_a_python_name_were_there_before(self):
        x = torch.randn(1000, requires_grad=True)
        loss = x.sin().exp().cos().sum()
        with LiveMemory(scan=False) as counted:
            loss.backward()
        assert counted.before >= x.nbytes + 4_000, "exp's result is known to the graph alone"
        assert counted.added == x.grad.nbytes - 4_000

    def test_history_and_resized_storage(self):
        def work():
            t = torch.empty(0)
            t.resize_(100)
            return t + 1

        measured = measure(work, keep_history=True)
        assert max(measured.history) == measured.peak and measured.added == 800

    def test_meta_tensors_are_no_memory(self):
        assert measure(lambda: torch.empty(10**9, device="meta") * 2).added == 0

    def test_arguments_pass_and_errors_too(self):
        assert measure(lambda a, b=0: a + b, 1, b=2).result == 3
        with pytest.raises(ZeroDivisionError):
            measure(lambda: 1 / 0)
        with pytest.raises(ValueError, match="device must be"):
            measure(lambda: 1, device="tpu")

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_on_a_gpu_the_allocator_counts(self):
        measured = measure(lambda: torch.empty(2**20, device="cuda") + 1, device="cuda")
        assert measured.added == 2 * 4 * 2**20


class TestAnalyses:
    def test_lora_parameters(self, capsys):
        found = analyze_lora_params(4096, 4096, 8)
        assert found == {"original": 16_777_216, "lora": 65_536, "ratio": 0.390625, "reduction": 99.609375}
        printed = capsys.readouterr().out
        assert "16,777,216" in printed and "65,536" in printed and "0.39 %" in printed

    def test_memory_savings(self, capsys):
        found = analyze_memory_savings(num_layers=32, hidden_size=4096, seq_len=2048, batch_size=4)
        assert found["standard"] == 114 * GIB
        assert found["every layer"] / GIB == pytest.approx(5.56, abs=0.01)
        assert found["every layer"] < found["sqrt"] < found["standard"]
        assert "114.00 GiB" in capsys.readouterr().out

    def test_sizes_below_one_are_refused(self):
        with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
            analyze_lora_params(4, 4, 0)
        with pytest.raises(ValueError, match="seq_len must be at least 1"):
            analyze_memory_savings(1, 8, 0, 1)


SETTINGS = {"model": "7b", "method": "full", "dtype": "float32", "batch": 4, "seq": 512, "checkpoint": False, "zero": 0,
            "world_size": 1, "flash": True, "logits": "chunked", "accumulation_steps": 1, "offload": False}  # fmt: skip


class TestRecommend:
    def test_the_order_is_the_documents(self):
        tried, _, _ = fit(SETTINGS, 1)
        names = [name for name, _ in tried]
        assert names == ["mixed precision (bfloat16)", "gradient checkpointing", "batch 1, 4 times accumulated",
                         "optimizer offload", "LoRA", "QLoRA"]  # fmt: skip

    def test_what_is_not_needed_is_left_out(self):
        _, needed, breakdown = fit(SETTINGS, 12 * GB, host=False)
        assert needed[-1] == "QLoRA" and breakdown.peak <= 12 * GB
        for name in needed[:-1]:
            assert name != "batch 1, 4 times accumulated", "checkpointing alone is enough beside QLoRA"

    def test_zero_where_there_are_devices(self):
        tried, needed, breakdown = fit({**SETTINGS, "world_size": 8}, 40 * GB)
        assert needed[-1] == "ZeRO-2" and "ZeRO-1" not in needed and breakdown.peak <= 40 * GB
        assert [name for name, _ in tried][-2:] == ["ZeRO-1", "ZeRO-2"]

    def test_nothing_is_enough(self):
        assert "nothing of this is enough" in recommend(SETTINGS, GB)

    def test_a_bare_number_of_parameters(self):
        assert "LoRA" not in str(fit({**SETTINGS, "model": 7e9}, GB)[1])


def test_the_command(capsys):
    flags = ["--model", "7b", "--method", "full", "--max_seq_length=2048", "--batch-size", "1", "--gpu", "24GB"]
    assert cli.main(["memory", *flags]) == 0
    said = capsys.readouterr().out
    for part in ("master weights", "model states 112.00 GB", "does not fit into 24.00 GB = 22.35 GiB", "on the host",
                 "the cheapest set that fits", "without the host's memory: "):  # fmt: skip
        assert part in said
    assert "30.60 GB = 28.50 GiB with attention scores, 9.13 GB = 8.50 GiB without" in said  # 002's "28.5 G"
    assert cli.main(["memory", "--gpu", "much"]) == 2
    assert capsys.readouterr().err.strip().endswith("a size such as 24GB, 500MB or 80GiB, got 'much'")


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_adapters_priced_in_place_of_full_training(method):
    """What is advised to a run of `--method full` has the bytes of a run with that method."""
    asked, own = (arguments(FinetuneSettings(method=start), torch.bfloat16) for start in ("full", method))
    advised = estimate(**asked | {"model": "smollm2", "method": method, "seq": 64})
    assert 0 < advised.trainable < 0.1 * advised.parameters
    assert advised.lines == estimate(**own | {"model": "smollm2", "seq": 64}).lines


def test_sizes_of_devices():
    assert parse_size("gpu", "24GB") == parse_size("gpu", "24") == parse_size("gpu", "24 g") == 24 * GB
    assert parse_size("gpu", "80GiB") == 80 * GIB and parse_size("gpu", "0.5gb") == GB // 2
    for bad in ("", "GB", "-1GB", "24 parsecs", "0GB"):
        with pytest.raises(ValueError, match="--gpu must be a size"):
            parse_size("gpu", bad)


def test_measuring_leaves_modules_alone():
    net = nn.Linear(4, 4)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    measure(net, torch.randn(2, 4))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())

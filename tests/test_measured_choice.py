"""The measured choice among ways: timed once for a kind of size on a card, kept for later runs; fixed elsewhere."""

import json
from types import SimpleNamespace

import pytest
import torch
from handtuned.kernels import lora_gemms, matmul, runtime
from handtuned.kernels.lora_gemms import lora_down, lora_down_grad, lora_up_grads
from handtuned.kernels.matmul import lora_product, scaled_matmul
from handtuned.kernels.nf4_matmul import nf4_matmul, plan
from handtuned.quant import quantize_nf4
from lora_layers import operands


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A card that is none: what `_seconds` would measure stands in a dict by the name of a way, others take 1 s."""
    times, timed = {}, []

    def seconds(way, args):
        name = next(name for name, other in card.ways.items() if other is way)
        timed.append(name)
        return times.get(name, 1.0)

    card = SimpleNamespace(times=times, timed=timed, path=tmp_path / "handtuned", ways={})
    monkeypatch.setattr(runtime, "_chosen", {})
    monkeypatch.setattr(runtime, "_card", lambda x: "Some Card (16 GB)")
    monkeypatch.setattr(runtime, "_seconds", seconds)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(runtime.FIXED, "sum", "slow")
    return card


@pytest.fixture
def kernel_products(kernel_backend):
    if not runtime.runs_product(torch.zeros(1, dtype=torch.float16)):
        pytest.skip("products before sm_80 are the vendor's library's alone")


def ways(card):
    card.ways = {"slow": lambda x: x + 1, "fast": lambda x: x + 2}
    return card.ways


def test_the_fastest_runs_and_is_measured_once(card):
    card.times["fast"] = 0.5
    x = torch.zeros(2)
    for _ in range(3):
        assert runtime.run_fastest("sum", (16, 4), ways(card), x).tolist() == [2, 2]
    assert card.timed == ["slow", "fast"]
    runtime.run_fastest("sum", (32, 4), ways(card), x)
    runtime.run_fastest("sum", (16, 4), ways(card), x.half())
    assert len(card.timed) == 6


def test_a_later_run_chooses_alike_whatever_it_would_measure(card):
    card.times["fast"] = 0.5
    x = torch.zeros(2)
    runtime.run_fastest("sum", (16, 4), ways(card), x)
    [file] = card.path.glob("*.json")
    assert json.loads(file.read_text()) == {"sum, float32, 16, 4": "fast"}
    for part in ("Some-Card-16-GB", torch.__version__, runtime.triton.__version__):
        assert part in file.name
    runtime._chosen.clear()
    card.times["fast"] = 2.0
    assert runtime.run_fastest("sum", (16, 4), ways(card), x).tolist() == [2, 2]
    assert len(card.timed) == 2


def test_of_two_processes_the_first_decides(card):
    """Both measure at the same time; the second finds the first's answer when it comes to write its own."""
    card.times["fast"] = 0.5
    x, measure = torch.zeros(2), runtime._seconds

    def meanwhile(way, args):
        card.path.mkdir(exist_ok=True)
        runtime._kept(card.file, "sum, float32, 16, 4", "slow", card.ways)
        return measure(way, args)

    runtime.run_fastest("sum", (1,), ways(card), x)
    [card.file] = card.path.glob("*.json")
    runtime._seconds = meanwhile
    assert runtime.run_fastest("sum", (16, 4), ways(card), x).tolist() == [1, 1]


@pytest.mark.parametrize("content", ["", "{", '{"sum, float32, 16, 4": "gone"}', None], ids=repr)
def test_a_file_that_says_nothing_is_written_anew(card, content):
    x = torch.zeros(2)
    runtime.run_fastest("sum", (16, 4), ways(card), x)
    [file] = card.path.glob("*.json")
    runtime._chosen.clear()
    file.unlink() if content is None else file.write_text(content)
    card.times["fast"] = 0.5
    assert runtime.run_fastest("sum", (16, 4), ways(card), x).tolist() == [2, 2]
    assert json.loads(file.read_text())["sum, float32, 16, 4"] == "fast"


def test_where_nothing_can_be_written_a_warning_says_so(card, monkeypatch, tmp_path):
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    card.times["fast"] = 0.5
    with pytest.warns(UserWarning, match="is not kept"):
        assert runtime.run_fastest("sum", (16, 4), ways(card), torch.zeros(2)).tolist() == [2, 2]


def test_what_does_not_fit_is_not_chosen():
    def too_large(x):
        raise torch.OutOfMemoryError

    assert runtime._seconds(too_large, (torch.zeros(1),)) == float("inf")


def test_without_a_card_the_choice_stands_in_the_table(monkeypatch):
    monkeypatch.setitem(runtime.FIXED, "sum", "slow")
    two = {"slow": lambda x: x + 1, "fast": lambda x: x + 2}
    assert runtime._card(torch.zeros(1)) is None
    assert runtime.run_fastest("sum", (), two, torch.zeros(1)).item() == 1
    assert not runtime._chosen


def test_the_table_names_ways_that_exist():
    assert runtime.FIXED["lora_product"] in matmul.LORA_WAYS_WITH_DROPOUT
    assert runtime.FIXED["scaled_matmul"] in matmul.SCALED_WAYS
    assert runtime.FIXED["lora_product, descriptors"] in matmul.LORA_WAYS_TMA
    assert runtime.FIXED["scaled_matmul, descriptors"] in matmul.SCALED_WAYS_TMA


@pytest.mark.parametrize("operation", ["lora_down", "lora_up_grads", "lora_down_grad", "lora_product"])
def test_the_vendors_library_is_always_among_the_ways(kernel_products, card, monkeypatch, operation):
    """Where it is the fastest, no kernel is launched, and the result is torch's."""
    x, W, _, A, B, dy = operands((20, 48, 64, 4), torch.float16)
    calls = {
        "lora_down": lambda: lora_down(x, A),
        "lora_up_grads": lambda: lora_up_grads(dy, S, B, 0.5)[0],
        "lora_down_grad": lambda: lora_down_grad(S, x, torch.float32),
        "lora_product": lambda: lora_product(x, W, None, S, B, 0.5),
    }
    torchs = lora_gemms._down_by_torch, lora_gemms.lora_up_grads_addmm, lora_gemms._down_grad_by_torch, matmul._by_torch
    measured, launched = [], []
    monkeypatch.setattr(runtime, "_seconds", lambda way, args: measured.append(way) or float(way not in torchs))
    monkeypatch.setattr(runtime.Launch, "__call__", lambda *tensors: launched.append(tensors))
    S = x[:, :4]
    chosen = calls[operation]()
    assert len(measured) >= 2 and not launched
    monkeypatch.setenv("HANDTUNED_BACKEND", "torch")
    assert torch.equal(chosen, calls[operation]())


@pytest.mark.parametrize("inner", [16, 15])
def test_scaled_matmul_measures_its_tiles(kernel_products, card, inner):
    """With those of descriptors where they can describe the operands."""
    card.times["32 x 64, 4 warps, 5 stages"] = 0.5
    a, b = torch.randn(8, inner).half(), torch.randn(inner, 8).half()
    card.ways = matmul.SCALED_WAYS_TMA if matmul.tma_fits(8, a, b) else matmul.SCALED_WAYS
    scaled_matmul(a, b)
    assert set(card.timed) == set(card.ways)
    assert list(runtime._chosen.values()) == ["32 x 64, 4 warps, 5 stages"]


@pytest.mark.parametrize("rows", [0, 3, 40])
def test_a_product_with_w_itself_chooses_by_the_same_products(kernel_products, card, monkeypatch, rows):
    """Experts that lie as (in, out) come by it in their forward pass, when nothing has been chosen yet."""
    weight, dy, measured = quantize_nf4(torch.randn(64, 128)), torch.randn(rows, 64).half(), []
    monkeypatch.setattr(runtime, "_seconds", lambda way, args: measured.append(way(*args)) or 1.0)
    assert nf4_matmul(dy, weight, None, False).shape == (rows, 128)
    assert bool(measured) == bool(rows)


@pytest.mark.parametrize("faster", ["exact", "merged", "stream", "fused"])
@pytest.mark.parametrize(
    ("rows", "dropout", "possible"),
    [
        (5, False, {"exact", "stream", "fused", "merged"}),
        (100, False, {"exact", "fused", "merged"}),
        (100, True, {"exact", "fused"}),
    ],
)
def test_ways_of_an_nf4_product(kernel_products, card, monkeypatch, faster, rows, dropout, possible):
    """What is possible is measured with an adapter, also where the table has another answer."""
    weight, x, measured = quantize_nf4(torch.randn(64, 128)), torch.randn(rows, 128).half(), []

    def seconds(way, args):
        measured.append(*way.args)
        assert way(*args).shape == (rows, 64)
        return float(way.args != (faster,))

    # what a way calls is measured as well, when it is called
    inner = lambda way, args: seconds(way, args) if str(getattr(way, "args", "?")[0]) in possible else 1.0  # noqa: E731
    monkeypatch.setattr(runtime, "_seconds", inner)
    chosen = plan(x, weight, dropout, 8)
    assert set(measured) == possible and chosen == (faster if faster in possible else "exact")

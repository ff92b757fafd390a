"""Settings for the whole suite.

Without a GPU the real kernels run under Triton's interpreter, which must be chosen
before `handtuned` is imported. On a GPU, plain `pytest` runs the compiled kernels.
`HANDTUNED_BACKEND=sm_90 pytest` runs the tests that launch kernels on compiled code, in the emulator.
"""

import os
import re
import sys

import torch

os.environ.setdefault("TESTED_BACKEND", os.environ.get("HANDTUNED_BACKEND", ""))  # pytest's workers inherit it
if os.environ["TESTED_BACKEND"].startswith("sm_"):
    os.environ["HANDTUNED_BACKEND"] = os.environ["TESTED_BACKEND"]
    os.environ.pop("TRITON_INTERPRET", None)
elif not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("WITHOUT_C"):
    sys.modules["handtuned.kernels._nf4_cpu"] = None  # cannot be imported, as after an installation without a compiler

import pytest
from handtuned.kernels import runtime

EMULATED = runtime.emulated_arch  # importing handtuned began it
# Tests run the torch references unless they ask for `kernel_backend` or `each_backend`.
os.environ["HANDTUNED_BACKEND"] = "torch"

# Files whose outcome depends on the CPU: on its vector library, on the order of a sum, or on what a rival computes in.
# `pytest -m numerical` runs them.
NUMERICAL = {
    "adamw", "adamw8bit", "adamw_kernel", "amp_autocast", "dora", "helpers", "lora", "lora_against_peft",
    "lora_gemms", "lora_merge", "loss", "matmul", "multi_adapters", "nf4", "nf4_cpu", "nf4_experts", "nf4_matmul",
    "nf4_product_cpu", "nf4_quantize", "quant_experts", "quant_linear", "transformer", "unscale", "variants",
}  # fmt: skip
# What stands in these files, takes long, and is not about numbers.
NOT_NUMERICAL = ("machine_code", "wgmma", "twelve_layers", "when_it_runs", "smollm2", "the_benchmark_runs",
                 "peak_memory", "obeys_the_variable")  # fmt: skip


# In the emulator all tests that launch kernels run on sm_90; on the other architectures, without --slow, these alone.
STREAMING = (
    "test_kernel_follows_torch", "test_kernel_equals_reference_bit_by_bit",
    "test_every_gradient_is_multiplied_and_rounded_once", "test_shapes_layouts_and_originals_are_kept",
    "test_double_quantized_states_of_bitsandbytes_decode_to_its_bits",
)  # fmt: skip
# In 16 bits. Triton has no tensor cores for sm_75: there a product compiles for minutes.
PRODUCTS = (
    "test_forward", "test_each_product_is_within_the_budget", "test_streaming_a_few_rows",
    "test_merging_while_dequantizing",
)  # fmt: skip


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_ignore_collect(collection_path, config):
    """`pytest -m numerical` does not import the files that have no such test."""
    if config.option.markexpr == "numerical" and collection_path.suffix == ".py":
        return collection_path.stem.removeprefix("test_") not in NUMERICAL or None
    return None


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.path.stem.removeprefix("test_") in NUMERICAL and not any(part in item.name for part in NOT_NUMERICAL):
            item.add_marker("numerical")
    if EMULATED:
        _keep_kernel_tests(config, items)
    if os.environ.get("WITHOUT_C") and config.option.markexpr == "numerical":
        _keep_callers_of_c(config, items)
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="takes minutes; run with --slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


def _launches(item):
    """Whether a test runs on a kernel."""
    each = "each_backend" in item.fixturenames and item.callspec.params["each_backend"] == "kernel"
    return each or "kernel_backend" in item.fixturenames


def _keep_kernel_tests(config, items):
    """In the emulator only what launches kernels is new."""

    def wanted(item):
        if not _launches(item):
            return False
        if EMULATED == "sm_90" or config.getoption("--slow"):
            return True
        product = item.name.startswith(PRODUCTS) and "float16" in item.name and EMULATED != "sm_75"
        return product or item.name.startswith(STREAMING)

    _keep(config, items, wanted)


def _keep_callers_of_c(config, items):
    """Without the compiled C only what meets NF4 on a CPU computes otherwise, and no Triton kernel does."""
    meets_nf4 = {path: re.search("nf4|quantize", path.read_text(encoding="utf-8"), re.I)
                 for path in {item.path for item in items}}  # fmt: skip

    def wanted(item):
        return meets_nf4[item.path] and not _launches(item)

    _keep(config, items, wanted)


def _keep(config, items, wanted):
    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = [item for item in items if wanted(item)]


@pytest.fixture(params=["torch", "kernel"])
def each_backend(request, monkeypatch):
    """Run a test twice: on the reference and on the real kernel (interpreted, or on the GPU)."""
    if request.param == "kernel":
        _use_kernels(monkeypatch)
    return request.param


@pytest.fixture
def kernel_backend(monkeypatch):
    """Run a test on the real kernel (interpreted, or on the GPU)."""
    _use_kernels(monkeypatch)


def _use_kernels(monkeypatch):
    if not runtime.HAS_TRITON:
        pytest.skip("Triton is not installed")
    monkeypatch.delenv("HANDTUNED_BACKEND")


@pytest.fixture
def device():
    """Where kernel tests put their tensors: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty hands out NaN (or the largest integer), so that a hole in an output shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def pictures_are_drawn_once():
    """To draw the loss takes as long as the steps of a tiny run: another picture of as many rows is a copy."""
    from handtuned.training import logging

    draw, drawn = logging.draw_loss, {}

    def draw_once(rows, path, title):
        kind = len(rows), sum(row["loss"] is None for row in rows)
        if kind not in drawn:
            draw(rows, path, title)
            drawn[kind] = path.read_bytes()
        path.write_bytes(drawn[kind])

    logging.draw_loss = draw_once
    yield
    logging.draw_loss = draw

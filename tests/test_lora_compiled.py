"""The LoRA and NF4 product kernels compiled ahead of time, without a GPU: no spills, and tensor cores in use."""

import json

import pytest
from handtuned.kernels import runtime
from helpers import run_uninterpreted

pytestmark = pytest.mark.skipif(not runtime.HAS_TRITON, reason="Triton is not installed")

MODULES = ("matmul", "lora_gemms", "nf4_matmul")
SCRIPT = """
import importlib, json, sys
from handtuned.gpu.machine_code import xray
modules, wanted, archs = json.loads(sys.argv[1])
found = []
for module in modules:
    for spec in importlib.import_module("handtuned.kernels." + module).xray_specs():
        if not wanted or spec.name in wanted:
            for arch in archs:
                ray = xray(spec, arch)
                tensor_core = dict(ray.code.tensor_core) if ray.code else {}
                found.append([spec.name, arch, ray.error, ray.spill_bytes, tensor_core])
print(json.dumps(found))
"""


def compiled(wanted, archs):
    """What became of each kernel: name, architecture, error, bytes spilled, tensor-core instructions."""
    told = run_uninterpreted(SCRIPT, json.dumps([MODULES, wanted, archs]))
    return json.loads(told.splitlines()[-1])


def check(found):
    for name, arch, error, spilled, tensor_core in found:
        assert not error, f"{name} on {arch}: {error}"
        assert spilled == 0, f"{name} on {arch} spills {spilled} bytes"
        if not name.startswith("nf4_one_row"):  # sums of products: nothing for a tensor core
            assert sum(tensor_core.values()) > 0, f"{name} on {arch} does not use the tensor cores"
        large = "128x" in name or "64x128" in name
        if arch == "sm_90" and large:
            assert tensor_core.get("wgmma"), f"{name} on {arch} has no wgmma but {tensor_core}"


def test_the_main_kernels_on_hopper():
    names = ["lora_product[bf16,y,128x256,8 warps]", "lora_down[fp16]", "nf4_one_row[bf16]"]
    found = compiled(names, ["sm_90"])
    assert sorted(name for name, *_ in found) == sorted(names)
    check(found)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_every_kernel_on_every_architecture(arch):
    found = compiled([], [arch])
    families = {name.partition("[")[0] for name, *_ in found}
    assert families == {
        "scaled_matmul", "lora_down", "lora_product", "lora_up_grads", "lora_down_grad", "nf4_one_row", "nf4_few_rows",
        "nf4_merge",
    }  # fmt: skip
    check(found)

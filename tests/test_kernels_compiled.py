"""What the compiler makes of our kernels, without a GPU: no spills, wide accesses, tensor cores, and LoRA's price."""

import json

import pytest
from handtuned.kernels import runtime
from helpers import run_uninterpreted

pytestmark = pytest.mark.skipif(not runtime.HAS_TRITON, reason="Triton is not installed")

COMPILE = """
import json, sys
from handtuned.gpu.examine import examine
from handtuned.gpu.operations import OPERATIONS, Size
wanted, archs, every_tile = json.loads(sys.argv[1])
found = []
for operation in OPERATIONS.values():
    if not wanted or operation.name in wanted:
        for arch in archs:
            for ray in examine(operation, arch, Size(), 0, every_tile):
                assert not ray.error, (ray.name, arch, ray.error)
                launch = ray.launches[-1]
                code = launch.code
                found.append({
                    "name": ray.name, "arch": arch, "spilled": ray.spill_bytes, "tensor cores": code.tensor_core,
                    "loads": code.widths("load global"), "stores": code.widths("store global"),
                    "per unit": code.instructions * launch.threads * launch.programs / operation.units(Size()),
                    "opcodes": list(code.opcodes),
                })
print(json.dumps(found))
"""


def compiled(wanted, archs=("sm_90",), every_tile=False):
    """What became of the last kernel of each operation."""
    found = json.loads(run_uninterpreted(COMPILE, json.dumps([wanted, archs, every_tile])).splitlines()[-1])
    assert all(one["spilled"] == 0 for one in found), [one["name"] for one in found if one["spilled"]]
    return found


def check_nf4(found):
    """Dequantize: 16-byte stores, 6 instructions per value, no fused multiply and add; quantize: 22."""
    for one in found:
        if one["name"].startswith("nf4_dequantize"):
            assert list(one["stores"]) == ["128"] and 0 < one["per unit"] <= 6, one
            assert "FFMA" not in one["opcodes"], one
        if one["name"].startswith("nf4_quantize"):
            assert one["stores"] == {"128": 1, "32": 1} and one["per unit"] <= 22, one  # codes, and one absmax


def check_tensor_cores(found):
    for one in found:
        if one["name"].startswith(("lora", "scaled", "nf4_few_rows", "nf4_fused", "nf4_experts", "nf4_merge")):
            assert sum(one["tensor cores"].values()) > 0, one
        if one["arch"] == "sm_90" and any(tile in one["name"] for tile in ("128 x", "64 x 128")):
            assert one["tensor cores"].get("wgmma"), one
        if one["arch"] == "sm_100" and "128 x 256" in one["name"]:
            assert one["tensor cores"].get("tcgen05"), one


def test_the_nf4_kernels():
    found = compiled(["nf4_dequantize[fp16, nested]", "nf4_dequantize[fp32]", "nf4_quantize[fp16]"])
    assert len(found) == 3
    check_nf4(found)


COUNTS = """
import json
from handtuned.gpu.examine import examine
from handtuned.gpu.operations import OPERATIONS, Size
found = {}
for name, operation in OPERATIONS.items():
    if name.startswith("nf4_"):
        [ray] = examine(operation, "sm_90", Size(), 2)
        [launch] = ray.launches
        c = launch.counters
        found[name] = {
            "per unit": 32 * launch.warp_instructions / operation.units(Size()),
            "warps": launch.programs // 132 * launch.threads // 32, "spilled": ray.spill_bytes,
            "shared": [c.shared.cost, c.shared.least], "stores": [c.global_stores.cost, c.global_stores.least],
        }
print(json.dumps(found))
"""


def test_what_the_nf4_kernels_cost_at_4096():
    """Counted: few instructions, no bank conflicts where values stream through, whole sectors, warps everywhere."""
    found = json.loads(run_uninterpreted(COUNTS).splitlines()[-1])
    for name, one in found.items():
        assert one["stores"][0] == one["stores"][1] and not one["spilled"], (name, one)
        if name.startswith(("nf4_dequantize", "nf4_merge", "nf4_fused", "nf4_experts")):
            assert one["shared"][0] == one["shared"][1], (name, one)
        if name.startswith("nf4_dequantize"):
            assert one["per unit"] <= 6, (name, one)
        if name.startswith(("nf4_one_row", "nf4_few_rows")):
            assert one["per unit"] <= 5.5 and one["warps"] >= 12, (name, one)


def test_the_optimizers_move_16_bytes_at_a_time():
    """Addresses come from a table, and still whole blocks are read and written 128 bits wide."""
    found = compiled(["adamw[fp32]", "adamw[fp32, fp16 copy]", "unscale[fp32]", "unscale[bf16, fp32]"])
    assert len(found) == 4
    for one in found:
        # p, g, m, v in and p, m, v out (or g in and out), two instructions per tensor at least
        reads, writes = (7, 6) if one["name"].startswith("adamw") else (2, 2)
        assert one["loads"]["128"] >= reads and one["stores"]["128"] >= writes, one


def test_the_products_use_tensor_cores():
    """Every tile of one product: all that a tuner may choose spills nothing."""
    found = compiled(["scaled_matmul[fp16, nn]", "lora_down[fp16]"], every_tile=True)
    assert len(found) > 4
    check_tensor_cores(found)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_every_kernel_on_every_architecture(arch):
    found = compiled([], [arch], every_tile=arch == "sm_90")
    check_nf4(found)
    check_tensor_cores(found)


PRICE = """
import json
from handtuned.gpu.examine import examine
from handtuned.gpu.operations import OPERATIONS, Size
from handtuned.kernels import matmul_tma, runtime
for name in ("lora_product, descriptors", "scaled_matmul, descriptors"):
    runtime.FIXED[name] = "persistent 128 x 256, 8 warps, 3 stages"
matmul_tma._multiprocessors = lambda device: 128  # divides the tiles: the programs that run stand for all

def work(*names):
    flops = requested = 0
    for name in names:
        [ray] = examine(OPERATIONS[name], "sm_90", Size(), 1)
        for launch in ray.launches:
            c = launch.counters
            flops += c.tensor_flops * launch.scale
            requested += 32 * (c.global_loads.cost + c.global_stores.cost) * launch.scale
    return flops, requested

print(json.dumps([
    work("scaled_matmul[fp16, nt]"), work("lora_down[fp16]", "lora_product[fp16, y]"),
    work("scaled_matmul[fp16, nn]"), work("lora_up_grads[fp16]", "lora_down_grad[fp16]", "lora_product[fp16, dx]"),
]))
"""


def test_what_lora_adds_at_4096():
    """M = N = K = 4096, r = 16, on sm_90: at most 3 % more FLOPs than the base product, and 10 % more sectors."""
    counted = json.loads(run_uninterpreted(PRICE).splitlines()[-1])
    for base, full in (counted[:2], counted[2:]):
        assert base[0] == 2 * 4096**3
        assert base[0] < full[0] <= 1.03 * base[0], (base, full)
        assert base[1] < full[1] <= 1.10 * base[1], (base, full)

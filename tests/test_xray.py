"""Reading machine code, what the NF4 kernels must be in it, and what it lets one expect of a GPU."""

import json
import math
import os
import subprocess
import sys
from collections import Counter

import pytest
from handtuned.kernels import runtime
from handtuned.kernels.nf4 import xray_specs

from handtuned import cli
from handtuned.gpu.cards import ARCHS, GPUS, occupancy
from handtuned.gpu.machine_code import Loop, MachineCode, Xray, all_specs, read_machine_code, xray
from handtuned.gpu.roofline import Size, instructions_per_warp, measurements, predict, predictions, work_of
from handtuned.xray import describe, write_page

STRAIGHT = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0020*/                   LDG.E.U8.CONSTANT R5, desc[UR6][R8.64] ;
        /*0030*/                   LDS.64 R10, [R9+UR4] ;
        /*0040*/                   LDS.U.64 R10, [R9+UR4] ;
        /*0050*/               @P1 EXIT ;
        /*0060*/                   STL [R1], R4 ;
        /*0070*/                   STG.E desc[UR6][R2.64], R4 ;
        /*0080*/                   EXIT ;
.L_x_0:
        /*0090*/                   BRA `(.L_x_0);
        /*00a0*/                   NOP;
"""

LOOPING = """
.text.kernel:
        /*0000*/                   MOV R1, R2 ;
.L_x_2:
        /*0010*/                   IADD3 R1, R1, 0x1, RZ ;
.L_x_1:
        /*0020*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
        /*0030*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
        /*0040*/              @!P0 BRA `(.L_x_1) ;
        /*0050*/               @P1 BRA `(.L_x_3) ;
        /*0060*/              @!P2 BRA `(.L_x_2) ;
.L_x_3:
        /*0070*/                   CALL.REL.NOINC `($__internal_0_$__cuda_div) ;
        /*0080*/                   HGMMA.64x64x16.F32 R24, gdesc[UR4], R24 ;
        /*0090*/                   EXIT ;
$__internal_0_$__cuda_div:
        /*00a0*/                   FFMA R1, R2, R3, R4 ;
        /*00b0*/                   RET.REL.NODEC R1 `(kernel) ;
"""


def test_straight_code_is_counted_to_its_last_exit():
    code = read_machine_code(STRAIGHT)
    assert code.instructions == 9 and code.loops == ()
    assert code.memory == {
        ("load global", 128): 1,
        ("load global", 8): 1,
        ("load shared", 64): 2,
        ("store local", 32): 1,
        ("store global", 32): 1,
    }
    assert code.opcodes["EXIT"] == 2 and "NOP" not in code.opcodes


def test_loops_and_tensor_cores_are_found_and_subroutines_left_out():
    code = read_machine_code(LOOPING)
    assert [(loop.instructions, loop.tensor_core) for loop in code.loops] == [(6, 2), (3, 2)]
    assert [loop.depth for loop in code.loops] == [0, 1]
    assert code.tensor_core == {"mma.sync": 2, "wgmma": 1}
    assert code.instructions == 10 and "FFMA" not in code.opcodes


@pytest.mark.skipif(not runtime.INTERPRETED, reason="kernels are compiled in this process")
def test_an_interpreted_process_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"TRITON_INTERPRET=0 handtuned xray"):
        xray(xray_specs()[0])


def _compiled(arguments, **options):
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, **options)


FACTS = """
import json
from dataclasses import replace
from handtuned.gpu.machine_code import xray
from handtuned.kernels import nf4, nf4_quantize
specs = [s for s in nf4.xray_specs() if "nested" in s.name or "fp16" in s.name]
first = specs[0]
specs += [replace(first, constexprs={**first.constexprs, "BLOCK_SIZE": 4096}, name="nf4_dequantize[4096]")]
specs += nf4_quantize.xray_specs()
for spec in specs:
    for arch in ("sm_80", "sm_90", "sm_100"):
        ray = xray(spec, arch)
        assert not ray.error, ray.error
        stores = ray.widths("store global")
        facts = [spec.name, arch, ray.spill_bytes, ray.instructions_per_element or 0, stores, list(ray.code.opcodes)]
        print(json.dumps(facts))
"""


@pytest.mark.skipif(not runtime.HAS_TRITON, reason="needs Triton")
def test_machine_code_of_the_nf4_kernels():
    """No spills anywhere; dequantize: 16-byte stores, 6 instructions a value, no fused multiply and add."""
    done = _compiled(["-c", FACTS], check=True)
    facts = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(facts) == 8 * 3
    for name, arch, spilled, instructions, stores, opcodes in facts:
        assert spilled == 0, (name, arch)
        if name.startswith("nf4_dequantize"):
            assert list(stores) == ["128"], (name, arch)
            assert 0 < instructions <= 6, (name, arch, instructions)
            assert "FFMA" not in opcodes, (name, arch)
        else:
            assert stores == {"128": 1, "32": 1}, (name, arch)  # codes, and one absmax
            assert instructions <= 22, (name, arch, instructions)


# what fits on a multiprocessor, by hand from the limits


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks", "limit"),
    [
        ("sm_90", 128, 32, 0, 16, "warps"),  # 64 warps / 4
        ("sm_90", 32, 16, 0, 32, "blocks"),
        ("sm_80", 128, 128, 0, 4, "registers"),  # 65,536 / (128 · 128)
        ("sm_90", 256, 186, 147456, 1, "registers"),  # 192 · 32 a warp: 2 a scheduler, 8 warps
        ("sm_90", 128, 32, 112 * 1024, 2, "shared memory"),  # 113 KiB with the reserved one, 228 in all
        ("sm_90", 128, 32, 114 * 1024, 1, "shared memory"),
        ("sm_75", 128, 32, 32 * 1024, 2, "shared memory"),  # nothing reserved on Turing
        ("sm_89", 256, 40, 0, 6, "warps"),  # 48 warps / 8
        ("sm_80", 1024, 80, 0, 0, "registers"),
    ],
)
def test_occupancy(arch, threads, registers, shared, blocks, limit):
    held = occupancy(arch, threads, registers, shared)
    assert (held.blocks, held.limit) == (blocks, limit)
    assert held.warps == blocks * threads // 32 <= held.of_warps


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_published_figures_agree_with_one_another(gpu):
    """Rate = multiprocessors × FLOPs a clock × clock, to the digits that datasheets give; every card has a source."""
    assert gpu.multiprocessors * gpu.tensor_per_clock * gpu.clock == pytest.approx(gpu.tensor, rel=0.01)
    assert gpu.arch in ARCHS and "NVIDIA" in gpu.source


# predictions, on made-up machine code


def ray_of(name, arch="sm_90", loops=(), instructions=100, threads=128, tensor_core=None):
    code = MachineCode(instructions, Counter(), Counter(tensor_core or {}), Counter(), tuple(loops))
    return Xray(name, arch, registers=32, threads=threads, code=code)


def spec_of(name, elements=8192, **constexprs):
    return runtime.KernelSpec(name, None, {}, constexprs, elements)


H100 = next(gpu for gpu in GPUS if gpu.name == "H100")
H200 = next(gpu for gpu in GPUS if gpu.name == "H200")


def test_a_kernel_without_flops_is_bound_by_memory_or_issue():
    spec = spec_of("nf4_dequantize[fp16, nested]")
    made = predict(spec, ray_of(spec.name), H200, Size())
    n = 4096 * 4096
    assert made.memory == made.floor == pytest.approx(n * (2.5 + 1 / 64 + 4 / 16384) / 4.8e12)
    busiest = math.ceil(n / 8192 / 132) * 132
    assert made.issue == pytest.approx(busiest * 4 * 100 / (132 * 4 * 1.83e9))
    assert made.bound == "memory" and made.seconds == made.memory and made.tensor == 0
    slow = predict(spec, ray_of(spec.name, instructions=2000), H200, Size())
    assert slow.bound == "issue" and slow.seconds > slow.floor


def test_a_product_is_bound_by_its_tensor_cores_and_mma_sync_is_slower_on_hopper():
    spec = spec_of("scaled_matmul[fp16,nn,128x256x64]", BLOCK_M=128, BLOCK_N=256, BLOCK_K=64)
    loop = Loop(50, 4)
    wgmma = predict(spec, ray_of(spec.name, loops=[loop], tensor_core={"wgmma": 4}), H100, Size())
    assert wgmma.bound == "tensor" and wgmma.floor == pytest.approx(2 * 4096**3 / 989.4e12)
    assert wgmma.tensor == pytest.approx(wgmma.floor * 528 / 512)  # 512 tiles on 132 multiprocessors: 4 rounds of them
    mma = predict(spec, ray_of(spec.name, loops=[loop], tensor_core={"mma.sync": 4}), H100, Size())
    assert mma.tensor == pytest.approx(wgmma.tensor / 0.63)
    ragged = predict(spec, ray_of(spec.name, tensor_core={"wgmma": 4}), H100, Size(M=4225))
    assert ragged.tensor == pytest.approx(wgmma.tensor * 5 / 4), "34 × 16 tiles: a fifth round for the busiest"


def test_the_largest_loop_runs_once_a_step_and_inner_loops_are_part_of_theirs():
    loops = (Loop(8, 0), Loop(60, 0), Loop(40, 0, depth=1))
    code = ray_of("x", loops=loops).code
    assert instructions_per_warp(code, 1) == 100 and instructions_per_warp(code, 64) == 100 + 63 * 60


def test_every_kernel_has_its_work_counted():
    size = Size()
    for spec in all_specs():
        work = work_of(spec, size)
        assert work is not None, spec.name
        assert work.programs > 0 and work.steps > 0 and work.bytes > 0 and work.padded >= work.flops, spec.name
    assert work_of(spec_of("no_such_kernel[fp16]"), size) is None


def test_floors_are_those_of_the_formulas():
    specs = {spec.name: spec for spec in all_specs()}
    n = 4096 * 4096
    assert work_of(specs["nf4_quantize[fp32]"], Size()).bytes == n * 4 + n // 2 + n // 64 * 4
    assert work_of(specs["adamw[fp32]"], Size(parameters=10**6)).bytes == 28 * 10**6
    product = work_of(specs["lora_product[fp16,y,128x256,8 warps]"], Size())
    assert product.flops == 2 * 4096**2 * (4096 + 16)
    assert product.bytes == 2 * (3 * n + 4096 * 16) + 4 * 4096 * 16


def results_file(folder, device="NVIDIA H200", kind="cuda", multiprocessors=132):
    """What `handtuned bench --json` leaves: a record of one kernel, one of several, one not timed, one left out."""
    record = {"name": "x", "kernel": "nf4_dequantize[fp16, nested]", "size": {"N": 4096, "K": 14336},
              "contestants": {"handtuned": {"median": 41e-6}}, "skipped": {}, "failed": {}}  # fmt: skip
    out = {"name": "x", "bytes": 0, "flops": 0, "contestants": {}, "skipped": {"all": "the time was up"}, "failed": {}}
    records = [record, {**record, "kernel": ""}, {**record, "contestants": {}, "failed": {"handtuned": "x"}}, out]
    device = {"name": device, "kind": kind, "multiprocessors": multiprocessors}
    content = {"device": device, "results": {"nf4": records, "lora": []}}
    (folder / "gpu.json").write_text(json.dumps(content))
    (folder / "other.json").write_text("[1, 2]")
    return measurements(folder)


def test_measured_times_stand_beside_their_predictions(tmp_path):
    spec = spec_of("nf4_dequantize[fp16, nested]")
    ray, known = ray_of(spec.name), results_file(tmp_path)
    made = {(p.gpu.name, p.size.K): p for p in predictions(spec, ray, Size(), known)}
    assert set(made) == {("H100", 4096), ("H200", 4096), ("H200", 14336)}
    there = made["H200", 14336]
    assert there.measured == 41e-6 and made["H200", 4096].measured is None
    assert there.memory == pytest.approx(made["H200", 4096].memory * 3.5)
    said = describe(ray, [there])
    assert f"measured 41.0 µs, {41e-6 / there.seconds:.2f} × predicted, at M 4096, N 4096, K 14336" in said
    other = spec_of("nf4_dequantize[bf16, nested]")
    assert all(p.measured is None for p in predictions(other, ray_of(other.name), Size(), known))


def test_results_of_a_cpu_or_another_card_are_no_measurement(tmp_path):
    assert results_file(tmp_path, kind="cpu") == []
    spec = spec_of("nf4_dequantize[fp16, nested]", elements=8192)
    l40 = results_file(tmp_path, device="NVIDIA L40S")
    ray = ray_of(spec.name, arch="sm_89")
    assert all(p.measured is None for p in predictions(spec, ray, Size(), l40)), "L4 is not L40S"
    ray = ray_of(spec.name)
    for device, multiprocessors in (("NVIDIA H100 PCIe", 114), ("NVIDIA H200 MIG 1g.18gb", 16), ("NVIDIA GH200", 132)):
        other = results_file(tmp_path, device=device, multiprocessors=multiprocessors)
        assert all(p.measured is None for p in predictions(spec, ray, Size(), other)), device


def test_the_page_shows_every_kernel_and_escapes(tmp_path):
    spec = spec_of("nf4_dequantize[fp16, nested]")
    ray = ray_of(spec.name)
    expected = list(predictions(spec, ray, Size(), results_file(tmp_path)))
    write_page(tmp_path / "x.html", [(ray, expected), (Xray("b", "sm_75", error="<no bf16>"), [])], Size())
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert "nf4_dequantize[fp16, nested]" in text and "&lt;no bf16&gt;" in text and "<no bf16>" not in text
    assert text.count('class="row"') == 3 and text.count("mark measured") == 1
    assert "not measurements" in text and "<script" not in text


@pytest.mark.skipif(not runtime.HAS_TRITON, reason="needs Triton")
def test_the_command_prints_a_report(tmp_path):
    """End to end, with results of an H200 at hand: its measurement stands beside the prediction, in text and HTML."""
    results_file(tmp_path)
    words = ["nf4_dequantize[fp16, nested]", "--arch", "sm_90", "--html", str(tmp_path / "x.html")]
    done = _compiled(["-m", "handtuned", "xray", *words, "--results", str(tmp_path)])
    assert done.returncode == 0, done.stderr
    size, first, second, third, fourth, h100, h200, measured, *model = done.stdout.splitlines()
    assert size.startswith("problem: M 4096, N 4096, K 4096, r 16")
    assert first.startswith("nf4_dequantize[fp16, nested]  sm_90") and ", 0 B spilled" in first
    assert "warps; no more for" in second
    assert "for each element" in third and "8 × store global 128 bit" in fourth
    assert "H100: predicted" in h100 and "H200: predicted 8.8 µs, memory bound" in h200
    assert "Predictions are a model, not measurements" in " ".join(model) and "datasheet" in model[-1]
    assert "measured" not in h100 + h200 and "H200: predicted 30." in measured
    assert measured.endswith("; measured 41.0 µs, 1.33 × predicted, at M 4096, N 4096, K 14336, r 16, 40 M parameters")
    page = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert page.count("mark measured") == 1 and "measured 41.0 µs at M 4096, N 4096, K 14336" in page


def test_unknown_names_and_failures(capsys):
    assert cli.main(["xray", "no_such_kernel"]) == 2
    assert "no kernel's name contains" in capsys.readouterr().err
    assert describe(Xray("k", "sm_75", error="no bf16")) == "k  sm_75  does not compile: no bf16"
    assert cli.main(["xray", "nf4", "--rank", "0"]) == 2
    assert "--rank must be at least 1" in capsys.readouterr().err

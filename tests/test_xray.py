"""Reading machine code, what an operation is said to launch, and what that lets one expect of a GPU."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
from handtuned.kernels import runtime

from handtuned import cli
from handtuned.gpu.cards import ARCHS, GPUS, occupancy
from handtuned.gpu.emulator.counters import Counters, Traffic
from handtuned.gpu.examine import Xray, examine
from handtuned.gpu.machine_code import MachineCode, read_machine_code
from handtuned.gpu.operations import OPERATIONS, Size
from handtuned.gpu.published import PUBLISHED, SHARES, share
from handtuned.gpu.roofline import measurements, predict, predictions, tensor_kind
from handtuned.gpu.session import LaunchRecord
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
    with pytest.raises(ValueError, match=r"TRITON_INTERPRET=0 handtuned xray"):
        examine(OPERATIONS["adamw[fp32]"], "sm_90", Size())


@pytest.mark.skipif(not runtime.HAS_TRITON, reason="needs Triton")
def test_the_command_in_a_process_that_cannot_compile(capsys):
    """conftest.py has set HANDTUNED_BACKEND, and TRITON_INTERPRET where there is no GPU."""
    assert cli.main(["xray", "adamw", "--check", "--arch", "sm_90"]) == 2
    assert " is set" in capsys.readouterr().err


# what fits on a multiprocessor, by hand from the limits


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks", "limit"),
    [
        ("sm_90", 128, 32, 0, 16, "warps"),  # 64 warps / 4
        ("sm_90", 32, 16, 0, 32, "blocks"),
        ("sm_80", 128, 128, 0, 4, "registers"),  # 65,536 / (128 · 128)
        ("sm_90", 256, 186, 147456, 1, "registers"),  # 192 · 32 per warp: 2 per scheduler, 8 warps
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
    """Rate = multiprocessors × FLOPs per clock × clock, to the digits that datasheets give; every card has a source."""
    assert gpu.multiprocessors * gpu.tensor_per_clock * gpu.clock == pytest.approx(gpu.tensor, rel=0.01)
    assert gpu.arch in ARCHS and "NVIDIA" in gpu.source


# predictions, on made-up counts

H100, H200 = (next(gpu for gpu in GPUS if gpu.name == name) for name in ("H100", "H200"))


def launched(programs=2048, executed=4, threads=128, registers=32, instructions=400, flops=0, waves=0, cores=None):
    """`instructions` of PTX for each warp, half as many of machine code; flops and waves of each program."""
    code = MachineCode(50, Counter(), Counter(cores or {}), Counter(), ())
    counters = Counters(tensor_flops=flops * executed, shared=Traffic(1, waves * executed, 1, "wavefronts"))
    counters.instructions["int"] = instructions * executed * threads // 32
    launch = LaunchRecord("kernel", "sm_90", (programs, 1, 1), executed, threads // 32, 0, counters, None, "", {}, None)
    vars(launch).update(_assigned=(registers, 0, ""), code=code, ptx_instructions=100)
    return launch


def ray_of(name="nf4_dequantize[fp16, nested]", arch="sm_90", size=None, **counted):
    return Xray(OPERATIONS[name], arch, size or Size(), (launched(**counted),))


def test_memory_bounds_what_does_little_else():
    made = predict(ray_of(), H200)
    moved = 4096 * 4096 * (2.5 + 1 / 64 + 4 / 16384) + 4
    assert made.floor == pytest.approx(moved / 4.8e12) and made.bound == "memory"
    low, high = SHARES["", "memory"]
    assert made.seconds == made.memory == pytest.approx((made.floor / high, made.floor / low))
    assert made.tensor == (0, 0)


def test_few_warps_issue_slowly():
    """128 programs of 4 warps, one on a multiprocessor: a warp issues every 2 to 5 clocks, 200 times here."""
    made = predict(ray_of(programs=128, instructions=400_000), H200)
    assert made.bound == "issue"
    # 4 warps of 200,000 machine instructions; 4 / 2 or 4 / 5 per clock
    assert made.issue == pytest.approx((400_000 / 1.83e9, 1_000_000 / 1.83e9))
    full = predict(ray_of(programs=132 * 16, instructions=400_000), H200)
    assert full.issue[0] == full.issue[1] == pytest.approx(16 * 4 * 200_000 / (4 * 1.83e9)), "64 warps: four per clock"


def test_a_wavefront_is_a_clock_of_shared_memory():
    made = predict(ray_of(programs=264, waves=1000_000), H200)
    assert made.bound == "shared" and made.shared == pytest.approx([2_000_000 / 1.83e9] * 2)


def test_a_kernel_takes_two_microseconds_at_least():
    small = predict(ray_of(size=Size(N=64, K=64), programs=1, executed=1, instructions=10), H200)
    assert small.seconds == (2e-6, 3e-6) and small.bound == "launch"


def test_a_product_reaches_the_published_share_of_its_tensor_cores():
    name, flops = "scaled_matmul[fp16, nn]", 2 * 128 * 256 * 4096
    wgmma = predict(ray_of(name, programs=512, flops=flops, cores={"wgmma": 4}), H100)
    assert wgmma.bound == "tensor" and wgmma.floor == pytest.approx(2 * 4096**3 / 989.4e12)
    low, high = SHARES["sm_90", "wgmma"]
    busiest = wgmma.floor * 528 / 512  # 512 tiles on 132 multiprocessors: 4 rounds of them
    assert wgmma.tensor == pytest.approx((busiest / high, busiest / low))
    mma = predict(ray_of(name, programs=512, flops=flops, cores={"mma.sync": 4}), H100)
    assert mma.tensor[0] > wgmma.tensor[1]
    b200 = next(gpu for gpu in GPUS if gpu.name == "B200")
    blackwell = predict(ray_of(name, "sm_100", programs=512, executed=0, cores={"tcgen05": 4}), b200)
    assert blackwell.bound == "tensor" and blackwell.tensor[0] >= 2 * 4096**3 / 2250e12 / 0.55


def test_shares_lie_around_what_was_published():
    for key, (low, high) in SHARES.items():
        assert 0 < low < high < 1
        figures = [one.share for one in PUBLISHED if (one.arch, one.kind) == key]
        assert not figures or (low <= max(figures) and min(figures) <= high), key
    assert all(one.source and (one.arch, one.kind) in SHARES for one in PUBLISHED)
    for gpu in GPUS:
        assert share(gpu.arch, "memory") == SHARES["", "memory"]
        assert share(gpu.arch, "mma.sync")
    assert tensor_kind(launched()) == ""


def test_every_operation_has_its_work_counted():
    for operation in OPERATIONS.values():
        assert operation.units(Size()) > 0 and operation.bytes(Size()) > 0
    n = 4096 * 4096
    assert OPERATIONS["nf4_quantize[fp32]"].bytes(Size()) == n * 4 + n // 2 + n // 64 * 4
    assert OPERATIONS["adamw[fp32]"].bytes(Size(parameters=10**6)) == 28 * 10**6
    product = OPERATIONS["lora_product[fp16, y]"]
    assert product.flops(Size()) == 2 * 4096**2 * (4096 + 16)
    assert product.bytes(Size()) == 2 * (3 * n + 4096 * 16) + 4 * 4096 * 16


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
    (folder / "cut_short.json").write_text(json.dumps(content)[:40])
    (folder / "no_text.json").write_bytes(b"\xff\xfe\xfd")
    return measurements(folder)


def test_measured_times_stand_beside_their_predictions(tmp_path):
    known, there = results_file(tmp_path), Size(K=14336)
    made = {p.gpu.name: p for p in predictions(ray_of(size=there), known)}
    assert set(made) == {"H100", "H200"}
    assert made["H200"].measured == 41e-6 and made["H100"].measured is None
    middle = sum(made["H200"].seconds) / 2
    said = describe(ray_of(size=there), [made["H200"]])
    assert f"measured 41.0 µs, {41e-6 / middle:.2f} × the middle" in said and "K 14336" in said
    for other in (ray_of(), ray_of("nf4_dequantize[bf16, nested]", size=there)):
        assert all(p.measured is None for p in predictions(other, known))


def test_results_of_a_cpu_or_another_card_are_no_measurement(tmp_path):
    assert results_file(tmp_path, kind="cpu") == []
    l40, ray = results_file(tmp_path, device="NVIDIA L40S"), ray_of(arch="sm_89", size=Size(K=14336))
    assert all(p.measured is None for p in predictions(ray, l40)), "L4 is not L40S"
    ray = ray_of(size=Size(K=14336))
    for device, multiprocessors in (("NVIDIA H100 PCIe", 114), ("NVIDIA H200 MIG 1g.18gb", 16), ("NVIDIA GH200", 132)):
        other = results_file(tmp_path, device=device, multiprocessors=multiprocessors)
        assert all(p.measured is None for p in predictions(ray, other)), device


def test_the_page_shows_every_kernel_and_escapes(tmp_path):
    ray = ray_of(size=Size(K=14336))
    failed = Xray(OPERATIONS["unscale[fp16]"], "sm_75", Size(), error="<no bf16>")
    expected = list(predictions(ray, results_file(tmp_path)))
    write_page(tmp_path / "x.html", [(ray, expected), (failed, [])], Size())
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert "nf4_dequantize[fp16, nested]" in text and "&lt;no bf16&gt;" in text and "<no bf16>" not in text
    assert text.count('class="row"') == 2 and text.count("mark measured") == 1
    assert "not measurements" in text and "<script" not in text


def xray_command(*words):
    return python("-m", "handtuned", "xray", *words)


def python(*arguments):
    environment = os.environ | {"TRITON_INTERPRET": "0", "HANDTUNED_BACKEND": ""}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.skipif(not runtime.HAS_TRITON, reason="needs Triton")
def test_the_command_prints_a_report(tmp_path):
    """End to end, with results of an H200 at hand: its measurement stands beside the prediction, in text and HTML."""
    results_file(tmp_path)
    words = ["nf4_dequantize[fp16, nested]", "--arch", "sm_90", "--html", str(tmp_path / "x.html")]
    done = xray_command(*words, "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert text.startswith("problem: M 4096, N 4096, K 4096, r 16")
    assert text.count("nf4_dequantize[fp16, nested]  sm_90  at") == 3, "counted whole, at the size asked for, measured"
    assert ", 0 B spilled" in text and "warps; no more for" in text and "instructions for each value; of PTX" in text
    assert "16.0 sectors per store (16.0 at least)" in text and "wavefronts per shared access" in text
    # beside its floor the kernel reads 16 levels, 256 steps of scales, and the rest of the offset's sector
    assert f"DRAM {659_524 + 64 + 1024 + 28:,} B from a cold L2, floor 659,524 B: 1.00 ×" in text
    assert text.count("H100: predicted") == text.count("H200: predicted") == 2
    assert "Predictions are a model, not measurements" in text
    assert "NVIDIA H200 datasheet" in text and "wgmma: 6" in text
    assert text.count("; measured 41.0 µs, ") == 1
    page = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert page.count("mark measured") == 1 and "measured 41.0 µs" in page


TOO_MUCH = """
import sys
from handtuned.kernels import adamw
from handtuned import cli
adamw.BLOCK = 2**14
sys.exit(cli.main(["xray", "adamw[fp32]", "--check", "--arch", "sm_89"]))
"""


@pytest.mark.skipif(not runtime.HAS_TRITON, reason="needs Triton")
def test_the_check_fails_where_registers_spill():
    done = python("-c", TOO_MUCH)
    assert done.returncode == 1, done.stderr
    assert " 0 B spilled" not in done.stdout.splitlines()[2] and "1 fail" in done.stdout


TOO_LARGE = """
import sys
from functools import partial
from handtuned.kernels import matmul, runtime
from handtuned import cli
name = runtime.FIXED["lora_product"]
matmul.LORA_WAYS[name] = partial(matmul._lora, matmul._launch, matmul.LORA_TILES[name]._replace(num_stages=9))
sys.exit(cli.main(["xray", "lora_product[fp16, y]", "--check", "--arch", "sm_89"]))
"""


@pytest.mark.skipif(not runtime.HAS_TRITON, reason="needs Triton")
def test_the_check_fails_where_a_program_does_not_fit_on_its_card():
    done = python("-c", TOO_LARGE)
    assert done.returncode == 1, done.stderr
    assert "fails: OutOfResources" in done.stdout


def test_unknown_names_and_failures(capsys):
    assert cli.main(["xray", "no_such_kernel"]) == 2
    assert "no operation's name contains" in capsys.readouterr().err
    failed = Xray(OPERATIONS["unscale[fp16]"], "sm_75", Size(), error="no bf16")
    assert describe(failed) == "unscale[fp16]  sm_75  fails: no bf16"
    assert cli.main(["xray", "nf4", "--rank", "0"]) == 2
    assert "--rank must be at least 1" in capsys.readouterr().err

"""Reading machine code, and what the NF4 kernels must be in it."""

import json
import os
import subprocess
import sys

import pytest
from handtuned.kernels import runtime
from handtuned.kernels.nf4 import xray_specs

from handtuned.xray import main, read_machine_code, report, xray

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
    assert code.tensor_core == {"mma.sync": 2, "wgmma": 1}
    assert code.instructions == 10 and "FFMA" not in code.opcodes


@pytest.mark.skipif(not runtime.INTERPRETED, reason="kernels are compiled in this process")
def test_an_interpreted_process_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"TRITON_INTERPRET=0 python -m handtuned\.xray"):
        xray(xray_specs()[0])


def _compiled(arguments, **options):
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, **options)


FACTS = """
import json
from dataclasses import replace
from handtuned.xray import xray
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


@pytest.mark.skipif(not runtime.HAS_TRITON, reason="needs Triton")
def test_the_command_prints_a_report():
    done = _compiled(["-m", "handtuned.xray", "nf4_dequantize[fp16, nested]", "--arch", "sm_90"])
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert first.startswith("nf4_dequantize[fp16, nested]  sm_90") and ", 0 B spilled" in first
    assert "for each element" in second and "8 × store global 128 bit" in third


def test_unknown_names_and_failures(monkeypatch, capsys):
    from handtuned.xray import Xray

    monkeypatch.setattr(sys, "argv", ["xray", "no_such_kernel"])
    with pytest.raises(ValueError, match="no kernel's name contains"):
        main()
    assert report([Xray("k", "sm_75", error="no bf16")]) == "k  sm_75  does not compile: no bf16"

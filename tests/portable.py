"""Runs the numerical tests again as other CPUs would compute them: `make test-portable`.

Each setting holds torch, MKL or oneDNN to fewer instructions than this CPU has, changes the number of threads, or
takes the compiled C away. A setting that this machine cannot follow (an instruction set that it lacks, a library that
takes no orders) is named instead of being counted as a pass.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
# Bits of what torch leaves to vector libraries: two settings that agree on all of them compute alike.
PROBE = """
import torch, zlib
from torch.nn import functional as F
torch.manual_seed(0)
a, b = (torch.rand(300, 700, dtype=torch.float64).float() for _ in range(2))
products = [a @ b.t(), a @ b[0], a.bfloat16() @ b.bfloat16().t(), torch.linalg.svdvals(a)]
results = [*products, a.sqrt(), a**0.3, a.softmax(1), F.silu(a), F.layer_norm(a, (700,))]
print(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(),
      *(zlib.crc32(result.float().numpy().tobytes()) for result in results))
"""
PRODUCTS = "AVX2 for the products of MKL and oneDNN"
SETTINGS = {
    "as it is, 1 thread": {"OMP_NUM_THREADS": "1"},
    # two processes run at a time: a thread that waits leaves its core to the other process
    "as it is, 2 threads": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
    "torch without vector instructions": {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "default"},
    "torch held to AVX2": {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "avx2"},
    PRODUCTS: {
        "OMP_NUM_THREADS": "1",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",  # Intel CPUs follow this one,
        "MKL_CBWR": "AVX2",  # and all of them this one
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
    "without the compiled C": {"OMP_NUM_THREADS": "1", "WITHOUT_C": "1"},
}


def probe(setting: dict) -> tuple[str, str, tuple]:
    """(capability, threads, bits) of torch in a process under `setting`."""
    done = subprocess.run([sys.executable, "-c", PROBE], env=os.environ | setting, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"the probe failed under {setting}:\n{done.stderr}")
    capability, threads, *bits = done.stdout.split()
    return capability, threads, tuple(bits)


def not_followed(setting: dict, plain: tuple) -> str:
    """Why a run under `setting` shows nothing new on this machine; empty if it does."""
    capability, threads, bits = probe(setting)
    wanted = setting.get("ATEN_CPU_CAPABILITY", "").upper()
    if wanted and capability != wanted:
        return f"this CPU runs torch with {capability}, not {wanted}"
    if threads != setting["OMP_NUM_THREADS"]:
        return f"torch runs with {threads} threads"
    if wanted and bits == plain:
        return "no bit changed of the products, roots, powers and softmaxes that were probed"
    return ""


def main() -> int:
    begin, failed = time.monotonic(), []
    plain = probe({"OMP_NUM_THREADS": "1"})[2]
    for name, setting in SETTINGS.items():
        reason = not_followed(setting, plain)
        print(f"\n== {name}" + (f"\n   cannot be switched here: {reason}" if reason else ""), flush=True)
        command = [sys.executable, "-m", "pytest", "-m", "numerical", "-n", "2", "--dist", "worksteal", str(HERE)]
        if subprocess.run(command, cwd=HERE.parent, env=os.environ | setting).returncode != 0:
            failed.append(name)
    print(f"\n{len(SETTINGS)} settings in {time.monotonic() - begin:.0f} s" + (f"; failed: {failed}" if failed else ""))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())

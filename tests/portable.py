"""Runs the numerical tests again as other CPUs would compute them: `make test-portable`.

`make test` has run them as this CPU computes with one thread. Each setting here holds torch, MKL and oneDNN to fewer
instructions than this CPU has, gives them a second thread, or takes the compiled C away. Settings run side by side,
one process each. A setting that this machine cannot follow (an instruction set that it lacks, a library that takes no
orders) is named instead of being counted as a pass.
"""

import ast
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
# Bits of what torch leaves to vector libraries: two settings that agree on all of them compute alike.
PROBE = """
import torch, zlib
from torch.nn import functional as F
torch.manual_seed(0)
a, b = (torch.rand(300, 700, dtype=torch.float64).float() for _ in range(2))
products = [a @ b.t(), a @ b[0], a.bfloat16() @ b.bfloat16().t(), torch.linalg.svdvals(a)]
others = [a.sqrt(), a**0.3, a.softmax(1), F.silu(a), F.layer_norm(a, (700,))]
bits = [[zlib.crc32(result.float().numpy().tobytes()) for result in results] for results in (products, others)]
print([torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), *bits])
"""
ONE = {"OMP_NUM_THREADS": "1"}
SETTINGS = {
    "torch without vector instructions": ONE | {"ATEN_CPU_CAPABILITY": "default"},
    "torch, MKL and oneDNN held to AVX2": ONE | {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",  # Intel CPUs follow this one,
        "MKL_CBWR": "AVX2",  # and all of them this one
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
    # a thread that waits leaves its core to the process beside it
    "as it is, 2 threads": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
    "without the compiled C": ONE | {"WITHOUT_C": "1"},  # only what calls it: see conftest.py
}  # fmt: skip


def probe(setting: dict) -> list:
    """[capability, threads, bits of products, bits of the rest] of torch in a process under `setting`."""
    done = subprocess.run([sys.executable, "-c", PROBE], env=os.environ | setting, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"the probe failed under {setting}:\n{done.stderr}")
    return ast.literal_eval(done.stdout)


def not_followed(setting: dict, plain: list) -> list[str]:
    """What of `setting` shows nothing new on this machine."""
    capability, threads, products, others = probe(setting)
    wanted, found = setting.get("ATEN_CPU_CAPABILITY", "").upper(), []
    if wanted and capability != wanted:
        found.append(f"this CPU runs torch with {capability}, not {wanted}")
    if threads != int(setting["OMP_NUM_THREADS"]):
        found.append(f"torch runs with {threads} threads")
    if wanted and others == plain[3]:
        found.append("no bit changed of the roots, powers and softmaxes that were probed")
    if "MKL_CBWR" in setting and products == plain[2]:
        found.append("no bit changed of the products that were probed")
    return found


def run(name: str, plain: list) -> bool:
    """Whether the tests pass; what they print comes when they have ended."""
    setting, begin = SETTINGS[name], time.monotonic()
    reasons = [f"   cannot be switched here: {reason}" for reason in not_followed(setting, plain)]
    command = [sys.executable, "-m", "pytest", "-m", "numerical", "-p", "no:cacheprovider", str(HERE)]
    done = subprocess.run(command, cwd=HERE.parent, env=os.environ | setting, capture_output=True, text=True)
    took = f"\n== {name}: {time.monotonic() - begin:.0f} s"
    print("\n".join([took, *reasons, done.stdout + done.stderr]), end="", flush=True)
    return done.returncode == 0


def main() -> int:
    begin, plain = time.monotonic(), probe(ONE)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        passed = dict(zip(SETTINGS, pool.map(lambda name: run(name, plain), SETTINGS), strict=True))
    failed = [name for name, well in passed.items() if not well]
    print(f"\n{len(SETTINGS)} settings in {time.monotonic() - begin:.0f} s" + (f"; failed: {failed}" if failed else ""))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())

"""What a benchmark's report says beside its times: the machine, versions, and each record as a small table."""

import platform
import subprocess
from pathlib import Path

import torch

from ..training import logging
from .timing import OURS, cut_short


def nvidia_smi(device: torch.device) -> dict[str, str]:
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)  # CUDA_VISIBLE_DEVICES renumbers GPUs
    gpu = f"GPU-{uuid}" if uuid else device.index or 0
    fields = ["driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.draw"]
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", f"--id={gpu}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = done.stdout.strip().split(", ")
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


def describe(device: torch.device) -> dict:
    """The device in words and numbers."""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        about = {"kind": "cuda", "name": gpu.name, "arch": f"sm_{gpu.major}{gpu.minor}",
                 "multiprocessors": gpu.multi_processor_count, "memory": gpu.total_memory}  # fmt: skip
        return about | {"before": nvidia_smi(device), "after": {}}  # after: each benchmark, while clocks are still up
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    return {"kind": "cpu", "name": name, "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability()}  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of everything that a time may depend on, other providers included."""
    found = logging.versions("peft", "bitsandbytes", "liger_kernel", "unsloth")
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def _unit(seconds: float) -> tuple[float, str]:
    return (1e6, "µs") if seconds < 1e-3 else (1e3, "ms") if seconds < 1 else (1, "s")


def text(record: dict) -> str:
    """One record as a small table."""
    times = record["contestants"]
    head = record["name"]
    if "floor" in record:
        factor, unit = _unit(record["floor"])
        head += f"   floor {record['floor'] * factor:.3g} {unit} ({record['bound']})"
    notes = cut_short(record) + ([] if record.get("cold", True) else ["inputs fit in the cache"])
    lines = [head + "".join(f"   [{note}]" for note in notes)]
    if times:
        factor, unit = _unit(times[OURS]["median"])
        width = max(map(len, times))
        lines.append(f"  {'':{width}} {'median ' + unit:>10} {'p20 – p80':>17} {'speed':>15} {'of ceiling':>11}"
                     f" {'host ' + unit:>9} {'ratio':>7}")  # fmt: skip
    for name, taken in times.items():
        spread = f"{taken['p20'] * factor:.4g} – {taken['p80'] * factor:.4g}"
        if "tokens_per_second" in taken:
            speed = f"{taken['tokens_per_second']:.0f} tokens/s"
        elif record.get("bound") == "arithmetic":
            speed = f"{taken['flops_per_second'] / 1e12:.3g} TFLOP/s"
        else:
            speed = f"{taken['bytes_per_second'] / 1e9:.4g} GB/s" if "bytes_per_second" in taken else ""
        share = f"{taken['of_ceiling']:.0%}" if "of_ceiling" in taken else ""
        lines.append(f"  {name:{width}} {taken['median'] * factor:10.4g} {spread:>17} {speed:>15} {share:>11}"
                     f" {taken['host'] * factor:9.3g} {taken['ratio']:6.2f}x"
                     + (f"  peak {taken['peak_bytes'] / 1e6:.0f} MB" if "peak_bytes" in taken else ""))  # fmt: skip
    lines += [f"  {name}: skipped, {why}" for name, why in record["skipped"].items()]
    lines += [f"  {name}: NOT TIMED, {why}" for name, why in record["failed"].items()]
    return "\n".join(lines)

"""`handtuned doctor`: what is installed, and what will run where."""

import platform

import torch

from .kernels import backend, runtime
from .kernels.nf4_cpu import has_native
from .training.logging import versions
from .training.models import choose_device, choose_dtype
from .training.sources import cache_directory

KERNELS = {
    "cuda": "the compiled Triton kernel",
    "interpreter": "the Triton kernel under the interpreter (slow: for checking, not for work)",
    "torch": "the torch reference",
}


def add_arguments(parser) -> None:
    """`doctor` takes no flags."""


def report() -> str:
    """Versions, backends, GPUs and the choices that follow from them, as text."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    lines = [f"{name:13} {version}" for name, version in versions().items()]
    lines += ["", f"machine       {platform.system()} {platform.machine()}, {torch.get_num_threads()} CPU threads"]
    for index in gpus:
        gpu, low = torch.cuda.get_device_properties(index), choose_dtype("auto", torch.device("cuda", index))
        lines.append(f"cuda:{index}        {gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.1f} GiB, "
                     f"computes in {str(low).removeprefix('torch.')}")  # fmt: skip
    device = choose_device("auto")
    dtype, cpu = choose_dtype("auto", device), backend(torch.empty(0))
    lines += [] if gpus else ["GPU           none that CUDA can use"]
    lines += [
        f"Triton        {'installed' if runtime.HAS_TRITON else 'not installed: GPU kernels cannot run'}"
        + (", interpreting kernels (TRITON_INTERPRET=1)" if runtime.INTERPRETED else ""),
        f"model cache   {cache_directory()}",
        "",
        "what runs where",
        f"  a CPU tensor   {KERNELS.get(cpu, f'the compiled Triton kernel, in the emulator of {cpu}')}"
        + (", with NF4 decoded by compiled C" if cpu == "torch" and has_native() else ""),
    ]
    if gpus and runtime.HAS_TRITON:
        lines.append(f"  a CUDA tensor  {KERNELS[backend(torch.empty(0, device='cuda'))]}")
    scaling = ", with loss scaling" if dtype == torch.float16 else ""
    lines.append(f"  finetune       on {device}, computing in {str(dtype).removeprefix('torch.')}{scaling}")
    return "\n".join(lines)


def run(args) -> int:
    print(report())
    return 0

"""GPU code without a GPU: an emulator for the machine code of Triton kernels.

    import handtuned.gpu

    with handtuned.gpu.emulate("sm_90") as gpu:
        my_kernel[grid](x, y, n, BLOCK=1024)  # CPU tensors
    print(gpu)

`HANDTUNED_BACKEND=sm_90` does the same for a whole process. What a GPU would hide is an error here: `KernelFault`.
"""

from .emulator import KernelFault
from .session import Emulator, LaunchRecord, emulate, emulate_process

__all__ = ["Emulator", "KernelFault", "LaunchRecord", "emulate", "emulate_process"]

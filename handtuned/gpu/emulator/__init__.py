"""An emulator of NVIDIA GPUs that runs PTX, in numpy. To be read in this order, each file about one part of a GPU:

parse       the assembly language                    types, registers   what a register holds
integers, floats, convert, alu                       arithmetic
batch, schedule                                      programs, warps, branches, barriers, deadlock
warp        what lanes of a warp tell each other     move
memory      tensors, sectors, DRAM                   shared, order      banks, races, who knows whom
access      loads and stores                         atomics            copies   cp.async
calls       device_print, device_assert
tensor      mma.sync, ldmatrix                       wgmma              tma      mbarriers, tensor copies
counters    what a profiler counts                   machine            everything together
fault       what goes wrong
"""

from .fault import KernelFault

__all__ = ["KernelFault"]

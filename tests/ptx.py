"""Runs a few lines of PTX in the emulator, without Triton: one program, arrays in, arrays out."""

import numpy as np
import torch

from handtuned.gpu.emulator.machine import Launch, Machine
from handtuned.gpu.emulator.memory import Global
from handtuned.gpu.emulator.parse import parse

_HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
{params}
)
.reqntid {threads}
{{
    .reg .pred %p<64>;
    .reg .b16 %h<64>;
    .reg .b32 %r<256>;
    .reg .b64 %d<128>;
    .file 1 "kernel.py"
    .loc 1 1 0
{body}
    ret;
}}
"""


def run(body, tensors, threads=32, programs=1, shared_bytes=0, unwritten=None):
    """Launch `body` over the tensors, whose addresses are in parameters kernel_param_0, …; gives the Counters.

    Registers %p (predicates), %h (16 bits), %r (32 bits) and %d (64 bits) are declared. Line n of the body is source
    line n of kernel.py.
    """
    lines = body.strip("\n").splitlines()
    body = "\n".join(f"    .loc 1 {n} 0\n    {line.strip()}" for n, line in enumerate(lines, 1))
    params = ",\n".join(f".param .u64 kernel_param_{n}" for n in range(len(tensors)))
    machine = Machine(parse(_HEAD.format(params=params, threads=threads, body=body)))
    addresses = {f"kernel_param_{n}": np.array([[t.data_ptr()]], np.uint64) for n, t in enumerate(tensors)}
    memory = Global(tensors, unwritten, machine.global_piece)
    return Launch(machine, addresses, (programs, 1, 1), memory, shared_bytes).run(np.arange(programs))


def element_address(parameter, register, bytes_each):
    """PTX that puts the address of this thread's element of a tensor into `register`."""
    return f"""ld.param.b64 {register}, [kernel_param_{parameter}];
    mov.u32 %r255, %tid.x;
    mul.wide.u32 %d127, %r255, {bytes_each};
    add.s64 {register}, {register}, %d127;"""


_FILE = {1: "%r", 2: "%h", 4: "%r", 8: "%d"}


def apply(instruction, inputs, out, predicate=False):
    """One instruction on arrays, element by element: `d` is its destination, `a`, `b`, `c` its sources.

    Args:
        instruction: "add.s32 d, a, b;"
        inputs: numpy arrays of one length; a bool array is passed as a predicate.
        out: dtype of the result.
        predicate: the result is a predicate; it comes back as 0 or 1.
    """
    n = len(inputs[0])
    threads = -(-n // 32) * 32
    body, text, tensors = [], instruction, []
    for k, (name, array) in enumerate(zip("abc", inputs, strict=False)):
        padded = np.zeros(threads, np.int32 if array.dtype == bool else array.dtype)
        padded[:n] = array
        tensors.append(torch.from_numpy(padded.view(f"i{padded.itemsize}")))
        register = f"{_FILE[padded.itemsize]}{10 + k}"
        body += [element_address(k, f"%d{k}", padded.itemsize),
                 f"ld.global.b{8 * padded.itemsize} {register}, [%d{k}];"]  # fmt: skip
        if array.dtype == bool:
            body.append(f"setp.ne.s32 %p{10 + k}, {register}, 0;")
            register = f"%p{10 + k}"
        text = text.replace(f" {name},", f" {register},").replace(f" {name};", f" {register};")
    size = 4 if predicate else np.dtype(out).itemsize
    destination = "%p20" if predicate else f"{_FILE[size]}20"
    body.append(text.replace(" d,", f" {destination},"))
    if predicate:
        body.append("selp.b32 %r20, 1, 0, %p20;")
    tensors.append(torch.zeros(threads, dtype={1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]))
    body += [element_address(len(tensors) - 1, "%d9", size), f"st.global.b{8 * size} [%d9], {_FILE[size]}20;"]
    run("\n".join(body), tensors, threads)
    return tensors[-1].numpy()[:n].view(np.int32 if predicate else out)

"""How the emulator takes the place of a GPU under Triton. Everything that leans on Triton's insides is in this file.

Triton asks its active driver for the target to compile for, for a launcher, and to load the machine code. This driver
names an architecture that need not exist here, takes PTX as the machine code (`ptxas` is called only when somebody
asks for registers), and its launcher runs it on CPU tensors. Specialization, pruning of tuned lists, the check of
shared memory and Triton's own cache work as on a card.

Private interfaces used, the same in Triton 3.6 and 3.7: `triton.runtime.driver`, what a driver, its `utils` and its
launcher are called with, `knobs.runtime.add_stages_inspection_hook`, `CompiledKernel.metadata`, the fields `cache`,
`cache_results` and `do_bench` and the method `run` of an Autotuner, `InterpretedFunction.run`, how a TensorDescriptor
is passed.
"""

import contextlib
import hashlib
import inspect
import json
import math
import re
import subprocess
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.autotuner import Autotuner
from triton.runtime.cache import get_cache_manager
from triton.runtime.interpreter import InterpretedFunction

from . import cards
from .emulator.counters import Counters
from .emulator.machine import Launch, Machine
from .emulator.memory import Global
from .emulator.parse import parse
from .emulator.tma import encoded
from .emulator.types import f32_to_bf16

WRITTEN_FOR = ("3.6", "3.7")
_SCALARS = {"i1": np.uint8, "i8": np.int8, "i16": np.int16, "i32": np.int32, "i64": np.int64, "u1": np.uint8,
            "u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64, "fp16": np.float16,
            "fp32": np.float32, "f32": np.float32, "fp64": np.float64}  # fmt: skip


def check_version():
    if not triton.__version__.startswith(WRITTEN_FOR):
        raise RuntimeError("the emulator takes Triton's own interfaces and is written for versions "
                           f"{' and '.join(WRITTEN_FOR)}; this is {triton.__version__}. handtuned/gpu/driver.py holds "
                           "all that may have changed")  # fmt: skip


def _flat(signature, values, maps):
    """(Triton type, value) of each argument that is passed at run time; tuples are passed element by element. `maps`:
    what the compiler says of each TensorDescriptor, where it becomes a tensor map."""
    for kind, value in zip(signature, values, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(kind, value, maps)
        elif kind.startswith("tensordesc"):
            yield from _descriptor(kind, value, next(maps, None))
        elif kind != "constexpr":
            yield kind, value


def _descriptor(kind, value, meta):
    """The arguments that a TensorDescriptor of the host becomes; "reached": a tensor that is none, but touched."""
    shape, strides = list(value.shape), list(value.strides)
    nan, rounds = value.padding == "nan", getattr(value, "round_f32_to_tf32", None)  # None: Triton 3.6
    if meta is None:  # an architecture without TMA
        yield "*" + kind, value.base
        yield from [("i64", n) for n in shape + strides]
        yield from [("i1", flag) for flag in (nan, rounds) if flag is not None]
    elif meta["fp4_padded"] or rounds:
        raise NotImplementedError("the emulator knows no TensorDescriptor of 4 bits and none that rounds to TF32")
    else:
        raw = torch.empty(256, dtype=torch.uint8)
        at = -raw.data_ptr() % 128
        tensor_map = raw[at : at + 128]
        tensor_map.numpy()[:] = encoded(value.base.data_ptr(), shape, strides, list(meta["block_size"]),
                                        meta["elem_type"], meta["swizzle"], nan)  # fmt: skip
        yield "*map", tensor_map
        yield "reached", value.base
    yield from [("i32", n) for n in shape]
    yield from [("i64", n) for n in strides]


def _bits(kind, value):
    """An argument as an unsigned array (1, 1), as the kernel finds it in its parameters."""
    if kind.startswith("*"):
        return np.array([[0 if value is None else value.data_ptr()]], np.uint64)
    if kind == "bf16":
        return f32_to_bf16(np.array([[value]], np.float32))
    value = np.array([[value]]).astype(_SCALARS[kind])
    return value.view(f"u{value.dtype.itemsize}")


class _Launcher:
    """Runs one compiled kernel; `src` and `metadata` are what Triton's compiler left."""

    def __init__(self, src, metadata):
        if getattr(metadata, "num_ctas", 1) > 1:
            raise NotImplementedError(f"the emulator knows no clusters; {metadata.name} has num_ctas = "
                                      f"{metadata.num_ctas}")  # fmt: skip
        self.src, self.metadata = src, metadata

    @property
    def driver(self):
        """Triton keeps a launcher longer than one emulator lives."""
        return triton.runtime.driver.active

    def __call__(self, x, y, z, stream, machine, packed, launch_metadata, enter, leave, *args):
        if self.driver.only_compile:
            return
        if enter is not None:
            enter(launch_metadata)
        maps = iter(getattr(self.metadata, "tensordesc_meta", None) or ())
        self._run(machine, (x, y, z), list(_flat(self.src.signature.values(), args, maps)))
        if leave is not None:
            leave(launch_metadata)

    def _run(self, machine, grid, arguments):
        meta = self.metadata
        machine.kernel.name_files(inspect.getsourcefile(self.src.fn.fn))
        values, tensors = [], []
        for kind, value in arguments:
            if kind != "reached":
                values.append(_bits(kind, value))
            if kind.startswith(("*", "reached")) and value is not None:
                tensors.append(getattr(value, "base", value) if not isinstance(value, torch.Tensor) else value)
        programs = math.prod(grid)
        for size in (meta.global_scratch_size, meta.profile_scratch_size):
            scratch = torch.empty(programs * size + 128, dtype=torch.uint8)  # 128: TMA descriptors are aligned so
            values.append(np.array([[scratch.data_ptr() + -scratch.data_ptr() % 128]], np.uint64))
            if size:
                tensors.append(scratch)
        names = [name for _, name, _ in machine.kernel.params]
        memory = Global(tensors, self.driver.unwritten, machine.global_piece)
        launch = Launch(machine, dict(zip(names, values, strict=True)), grid, memory, meta.shared)
        ids = self.driver.chosen(programs if machine.executes else 0)
        if not machine.executes:
            warnings.warn(f"{meta.name} uses tcgen05, the tensor cores of {self.driver.arch}, which are not emulated: "
                          "it was compiled and counted, each instruction once, but not run, and its outputs were not "
                          "written", stacklevel=2)  # fmt: skip
            counters = launch.count_statically()
        else:
            counters = launch.run(ids) if len(ids) else Counters()
        self.driver.ran(launch, self.src, meta, len(ids), counters)


class EmulatedDriver(DriverBase):
    """What Triton takes for the GPU. The "machine code" that it loads is PTX.

    Args:
        arch: "sm_90".
        unwritten: who remembers the storages of torch.empty.
        ran: called with (Launch, source, metadata, programs executed, Counters) after each launch.
        programs: execute no more than so many of each launch; None: all.
        every_tile: launch all configurations of an Autotuner that fit.
    """

    def __init__(self, arch, unwritten, ran, programs=None, every_tile=False):
        self.arch, self.unwritten, self.programs, self.every_tile = arch, unwritten, programs, every_tile
        self.launched, self.only_compile, self._ran = 0, False, ran
        self.utils, self.launcher_cls, self.machines = self, _Launcher, {}  # machine code → Machine

    def ran(self, *launch):
        self.launched += 1
        self._ran(*launch)

    def chosen(self, programs):
        """Numbers of the programs to execute, spread over the grid."""
        some = programs if self.programs is None else min(self.programs, programs)
        return np.linspace(0, programs - 1, some).astype(np.int64) if some else np.empty(0, np.int64)

    def load_binary(self, name, code, shared, device):
        machine = self.machines.get(code)
        if machine is None:
            # Triton 3.6 leaves the fence between cp.async and wgmma away, on every kernel; 3.7 writes it
            strict = not triton.__version__.startswith("3.6")
            machine = self.machines[code] = Machine(parse(code.decode()), copies_need_fence=strict)
            machine.ptx = code.decode()
        return machine, machine, 0, 0, 1024  # registers, spills, most threads

    def get_device_properties(self, device):
        return {"max_shared_mem": cards.shared_per_program(self.arch), "multiprocessor_count": 1, "warpSize": 32,
                "max_num_regs": cards.ARCHS[self.arch].registers}  # fmt: skip

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_current_target(self):
        return GPUTarget("cuda", cards.number(self.arch), 32)

    def get_current_device(self):
        return f"emulated {self.arch}"  # Triton keeps compiled kernels, and the limit of shared memory, by device

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu

    def get_benchmarker(self):
        return _Tuning(self)

    def get_empty_cache_for_benchmark(self):
        return torch.empty(0)

    def clear_cache(self, cache):
        pass


class _Tuning:
    """Stands in for timing in an Autotuner: the first configuration that compiles and fits wins.

    None is run for that, unless the driver is to launch every one.
    """

    def __init__(self, driver):
        self.driver, self.found_at = driver, None

    def __call__(self, kernel_call, quantiles=None, **kwargs):
        if self.driver.every_tile:
            kernel_call()
            return [1.0] * 3
        if self.found_at == self.driver.launched:  # no launch since: still the same list
            return [float("inf")] * 3
        self.driver.only_compile = True
        try:
            kernel_call()
        finally:
            self.driver.only_compile = False
        self.found_at = self.driver.launched
        return [1.0] * 3


def _take_ptx(*args):
    """Triton's hook into compilation: PTX is the last stage."""
    if not args:  # asked for a name of what this does, for the key of the cache
        return "handtuned emulator", "handtuned emulator"
    _, stages, *_ = args
    stages["cubin"] = lambda src, metadata: src.encode()
    return None


def _refuse(self, *args, **kwargs):
    raise RuntimeError(f"the kernel {self.fn.__name__} was decorated while TRITON_INTERPRET=1 was set, so it cannot be "
                       "compiled. Unset TRITON_INTERPRET before the module that holds it is imported")  # fmt: skip


def _tuned_afresh(run, had):
    """`Autotuner.run` for the emulator: each tuner chooses anew. `had` gets what it had before, by its id."""

    def tuned(self, *args, **kwargs):
        if id(self) not in had:
            had[id(self)] = self, self.cache, self.cache_results, self.__dict__.pop("do_bench", None)
            self.cache, self.cache_results = {}, False  # on disk the choice would be taken for one measured on a card
        return run(self, *args, **kwargs)

    tuned.untouched = run
    return tuned


def _give_back(had):
    for tuner, cache, cache_results, bench in had.values():
        tuner.cache, tuner.cache_results = cache, cache_results
        tuner.__dict__.pop("do_bench", None)
        if bench is not None:
            tuner.__dict__["do_bench"] = bench


@contextlib.contextmanager
def installed(driver: EmulatedDriver):
    """Triton runs on `driver` inside."""
    check_version()
    config, runtime = triton.runtime.driver, knobs.runtime
    before, hook, run = config._active, runtime.add_stages_inspection_hook, InterpretedFunction.run
    tuned, had = Autotuner.run, {}
    config.set_active(driver)
    runtime.add_stages_inspection_hook, InterpretedFunction.run = _take_ptx, _refuse
    # an emulator inside another one does not run through the outer one's, which would save the inner one's choices
    Autotuner.run = _tuned_afresh(getattr(tuned, "untouched", tuned), had)
    try:
        yield
    finally:
        config._active = before
        runtime.add_stages_inspection_hook, InterpretedFunction.run = hook, run
        Autotuner.run = tuned
        _give_back(had)


def assembled(ptx: str, metadata) -> tuple[int, int, str]:
    """(registers and bytes spilled of a thread, disassembly) that ptxas makes of PTX; kept in Triton's cache."""
    tool = knobs.nvidia.ptxas_blackwell if metadata.target.arch >= 100 else knobs.nvidia.ptxas
    options = ["-v", f"--gpu-name={re.search(r'[.]target (sm_[0-9]+[af]?)', _target(ptx, metadata))[1]}"]
    options += [] if metadata.enable_fp_fusion else ["--fmad=false"]
    cache = get_cache_manager(hashlib.sha256(json.dumps([ptx, options, tool.version]).encode()).hexdigest())
    kept = cache.get_file("assembled.json")
    if kept is None:
        with tempfile.TemporaryDirectory() as folder:
            source, cubin = Path(folder) / "kernel.ptx", str(Path(folder) / "kernel.cubin")
            source.write_text(ptx, encoding="utf-8")
            said = _tool(tool.path, metadata, *options, str(source), "-o", cubin).stderr
            sass = _tool(knobs.nvidia.nvdisasm.path, metadata, "-c", cubin).stdout
        registers = int(re.search(r"Used (\d+) registers", said)[1])
        spilled = max(map(int, re.findall(r"(\d+) bytes spill", said)), default=0)
        kept = cache.put(json.dumps([registers, spilled, sass]), "assembled.json", binary=False)
    return tuple(json.loads(Path(kept).read_text(encoding="utf-8")))


def _tool(path, metadata, *arguments):
    done = subprocess.run([path, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(path).name} failed on {metadata.name}:\n{done.stderr}")
    return done


def _target(ptx, metadata):
    """The .target line; Triton leaves the letter away that sm_90 and later need for their own instructions."""
    line = re.search(r"^\.target.*$", ptx, re.M)[0]
    return re.sub(r"sm_(\d+)(?![\daf])", lambda m: m[0] + ("a" if int(m[1]) >= 90 else ""), line)

"""PTX text → instructions. Knows the grammar, not what an instruction means.

PTX is the assembly language that Triton emits. A line of it reads

    @%p1  ld.global.v4.b32  {%r1, %r2, %r3, %r4}, [%rd1+16];
    guard opcode            destination           source

Only threads whose guard is true take part. The parts of an opcode after the first name the memory (`global`,
`shared`), how many (`v4`) and what (`b32`: 32 bits of anything; `s32`, `u32`, `f32`: read as a number). Registers are
as many as one likes: `ptxas` assigns the real ones later.

`.loc` lines say which source line the code comes from. Where Triton inlined a function, a comment names the caller,
and the line reported is the innermost one that is not in Triton's own library.
"""

import os
import re
from dataclasses import dataclass, field

from .inline import block, inlined

_STATEMENT = re.compile(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_LABEL = re.compile(r"(\$?[A-Za-z_][\w$]*):(?!:)\s*")
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)\s*([^{]*)\{", re.S)
_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.ptr\s+\.\w+\s+\.align\s+\d+\s+)?(\w+)(?:\[(\d+)\])?"
)
_SHARED = re.compile(r"\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[(\d*)\]")
_LOCAL = re.compile(r"\.local\s+\.align\s+\d+\s+\.b8\s+(\w+)\[(\d+)\]")
_DATA = re.compile(r"\.(?:global|const)\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[\d+\]\s*=\s*\{([\d,\s]*)\}")
_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?')
_LOC = re.compile(r"\s*\.loc\s+(\d+)\s+(\d+)\s+\d+[^/]*(?://.*?(@.*))?")
_CALLER = re.compile(r"([^\s\[\]@:]+):(\d+):\d+")
_LIBRARY = os.path.join("triton", "language") + os.sep


@dataclass
class Address:
    """[base + offset], of a tensor [base, {coordinates}]."""

    base: str
    offset: int = 0
    coordinates: list = field(default_factory=list)


@dataclass(frozen=True)
class FloatBits:
    """A float constant, written in PTX by its bits."""

    bits: int
    size: int  # bytes


@dataclass
class Instruction:
    """One machine instruction.

    Attributes:
        op: "ld.global.v4.b32".
        args: register or symbol names (str), ints, FloatBits, Address, lists ({…}) and tuples (a|b).
        guard: predicate register or None; `negated`: it must be false.
        file, line: in the source.
    """

    op: str
    args: list
    guard: str | None
    negated: bool
    file: str
    line: int
    text: str

    @property
    def parts(self) -> list[str]:
        return self.op.split(".")


@dataclass
class Kernel:
    """A parsed kernel.

    Attributes:
        params: (type, name, bytes) of each parameter.
        threads: of a program.
        labels: name → index into `code`.
        widths: register name, or its prefix before the number → bytes (a predicate counts 1).
        shared: (name, bytes) of shared arrays; 0 bytes is the one whose size the launch gives.
        local: (name, bytes) of the arrays that each thread has for itself.
        texts: of the messages that it prints, in the order of `text_names`.
        tables: name → bytes of the constants that it reads from memory.
        file: its source.
    """

    name: str
    params: list
    threads: int
    code: list
    labels: dict
    widths: dict
    shared: list
    local: list
    text_names: list
    texts: list
    tables: dict
    file: str

    def name_files(self, file):
        """Name files as they are here: Triton's cache knows a kernel by its text, so its code may come from another.

        Args:
            file: that the kernel stands in.
        """
        old, new, self.file = self.file, file, file
        if not old or old == new:
            return
        while os.path.basename(old) and os.path.basename(old) == os.path.basename(new):
            old, new = os.path.dirname(old), os.path.dirname(new)
        old, new = old.rstrip("/"), new.rstrip("/")  # the root: one checkout may lie in /a, the other in /b/a
        for i in self.code:
            here = new + i.file[len(old) :]
            if i.file.startswith(old) and (i.file == old or os.path.exists(here)):
                i.file = here

    def width(self, name) -> int | None:
        """Bytes of a register; None if `name` is none."""
        return self.widths.get(name) or self.widths.get(name.rstrip("0123456789"))


def _split(text):
    """Split at commas outside of brackets."""
    out, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            out.append(text[start:i])
            start = i + 1
    return [part.strip() for part in (*out, text[start:]) if part.strip()]


def operand(text, rename=lambda name: name):
    text = text.strip()
    if text.startswith("{"):
        return [operand(part, rename) for part in _split(text[1:-1])]
    if text.startswith("["):
        first, *more = _split(text[1:-1])
        if first.startswith("["):
            raise ValueError(f"operand {text}")
        base, _, offset = first.replace(" ", "").partition("+")
        if not offset and (m := re.fullmatch(r"(.+?)(-\d+)", base)):
            base, offset = m.groups()
        coordinates = operand(more[0], rename) if more else []
        return Address(rename(base), int(offset, 0) if offset else 0, coordinates)
    if m := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", text):
        return FloatBits(int(m[1] or m[2], 16), 4 if m[1] else 8)
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        return int(text.rstrip("U"), 0)
    if "|" in text:
        return tuple(rename(part.strip()) for part in text.split("|"))
    return "!" + rename(text[1:].strip()) if text.startswith("!") else rename(text)


class _Files:
    def __init__(self, ptx):
        self.by_index, self.by_name = {}, {}
        for index, folder, name in _FILE.findall(ptx):
            path = os.path.join(folder, name) if name else folder
            self.by_index[index] = self.by_name[os.path.basename(path)] = path

    def place(self, line):
        """(file, line) of a .loc."""
        index, number, callers = _LOC.match(line).groups()
        chain = [(self.by_index.get(index, "?"), int(number))]
        chain += [(self.by_name.get(name, name), int(n)) for name, n in _CALLER.findall(callers or "")]
        return next((place for place in chain if _LIBRARY not in place[0]), chain[0])


class _Scopes:
    """Names declared inside { } are their own: inline assembly uses the same ones again and again."""

    def __init__(self):
        self.stack, self.numbers, self.count = [{}], [0], 0

    def open(self):
        self.count += 1
        self.stack.append({})
        self.numbers.append(self.count)

    def close(self):
        if len(self.stack) > 1:
            self.stack.pop()
            self.numbers.pop()

    def declare(self, name):
        self.stack[-1][name] = name if len(self.stack) == 1 else f"{name}@{self.numbers[-1]}@"
        return self.stack[-1][name]

    def find(self, name):
        return next((scope[name] for scope in reversed(self.stack) if name in scope), name)


def _register_widths(statement, scopes, widths):
    kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S).groups()
    for name in _split(names):
        name, _, numbered = name.partition("<")
        size = 1 if kind == "pred" else int(kind[1:]) // 8
        if numbered and len(scopes.stack) > 1:  # p<2> inside a scope: p0, p1
            for i in range(int(numbered.rstrip(">"))):
                widths[scopes.declare(f"{name}{i}")] = size
        else:
            widths[name if numbered else scopes.declare(name)] = size


def _body(body, files):
    """(code, labels, widths) of the text between the outermost braces, with .loc lines already statements."""
    code, labels, widths, place = [], {}, {"%cc": 1}, ("?", 0)
    scopes, jumps = _Scopes(), []
    for statement in body.split(";"):
        statement = statement.strip()
        while statement:
            if statement[0] in "{}":
                (scopes.open if statement[0] == "{" else scopes.close)()
                statement = statement[1:].lstrip()
            elif m := _LABEL.match(statement):
                labels[scopes.declare(m[1])] = len(code)
                statement = statement[m.end() :]
            else:
                break
        if statement.startswith(".reg"):
            _register_widths(statement, scopes, widths)
        elif statement.startswith("\x00"):
            place = files.place(statement[1:])
        elif statement and not statement.startswith("."):
            negated, guard, op, args = _STATEMENT.match(statement).groups()
            args = [operand(arg, scopes.find) for arg in _split(args)]
            if op.startswith("bra"):
                jumps.append((len(code), dict(scopes.stack[-1]), scopes.stack[-1]))
            guard = scopes.find(guard) if guard else None
            code.append(Instruction(op, args, guard, negated == "!", *place, " ".join(statement.split())))
    for index, _, scope in jumps:  # a label may stand after the jump to it
        code[index].args[0] = scope.get(code[index].args[0], code[index].args[0])
    return code, labels, widths


def parse(ptx: str) -> Kernel:
    """Read the one kernel of a PTX file."""
    files = _Files(ptx)
    lines = []
    for line in ptx.split("\t.section")[0].splitlines():
        if _LOC.match(line):
            # keep it as a statement of its own, its comment included
            line = "\x00" + line.replace(";", " ").replace("{", " ").replace("}", " ") + ";"
        elif line.lstrip().startswith(".file"):
            line = ""
        else:
            line = line.split("//")[0]
        lines.append(line)
    text = "\n".join(lines)
    entry = _ENTRY.search(text)
    if not entry:
        raise ValueError("PTX without an .entry")
    name, params, directives = entry.groups()
    body = inlined(text[entry.end() : block(text, entry.end() - 1) - 1], text)
    threads = int(re.search(r"\.(?:req|max)ntid\s+(\d+)", directives)[1])
    code, labels, widths = _body(body, files)
    params = [(kind, param, int(size or 0)) for kind, param, size in _PARAM.findall(params)]
    shared = [(array, int(size or 0)) for array, size in _SHARED.findall(text)]
    data = {name: (align, bytes(map(int, codes.split(",")))) for align, name, codes in _DATA.findall(text)}
    texts = {name: codes.rstrip(b"\0").decode() for name, (align, codes) in data.items() if align == "1"}
    tables = {name: codes for name, (align, codes) in data.items() if align != "1"}
    local = [(array, int(size)) for array, size in _LOCAL.findall(text)]
    return Kernel(name, params, threads, code, labels, widths, shared, local, list(texts), list(texts.values()),
                  tables, files.by_index.get("1", ""))  # fmt: skip

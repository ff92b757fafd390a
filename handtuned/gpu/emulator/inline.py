"""Calls of functions whose code stands in the same file: the text of the function takes the place of the call.

Triton inlines nearly everything itself; `@triton.jit(noinline=True)` and a few functions of libdevice in fp64 are left.
A function is a scope of its own, so its registers and labels get names of their own at each call. Parameters become
registers, and `ret` a jump to the end.
"""

import re

_FUNCTION = re.compile(r"\.func\s+(?:\(([^()]*)\)\s*)?([\w$]+)\s*\(([^()]*)\)[^;{}]*\{")
_CALL = re.compile(r"call(?:\.uni)?\s+(?:\(([\w$]+)\)\s*,\s*)?([\w$]+)\s*,\s*\(([^()]*)\)\s*;")
_SCALAR = re.compile(r"\.param\s+\.b(\d+)\s+([\w$]+)$")


def block(text, start):
    """Index behind the brace that closes the one at `start`."""
    depth = 0
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return start + brace.end()
    raise ValueError("PTX whose braces do not match")


def _functions(text):
    """name → (names of its parameters, name of its result, text), of those that take and give numbers only."""
    found = {}
    for m in _FUNCTION.finditer(text):
        declared = [part.strip() for group in (m[3], m[1]) for part in (group or "").split(",") if part.strip()]
        scalars = [_SCALAR.match(part) for part in declared]
        if all(scalars):
            names = [scalar[2] for scalar in scalars]
            results = names[-1:] if m[1] else []
            found[m[2]] = names[: len(names) - len(results)], results, text[m.end() - 1 : block(text, m.end() - 1)]
    return found


def _moves(body, names):
    """Accesses of the parameters `names` (old → new) as moves of registers."""
    for old, new in names.items():
        at = rf"\[\s*{re.escape(old)}\s*\]"
        body = re.sub(rf"ld\.param\.b(\d+)\s+(%?[\w$]+)\s*,\s*{at}", rf"mov.b\1 \2, {new}", body)
        body = re.sub(rf"st\.param\.b(\d+)\s+{at}\s*,", rf"mov.b\1 {new},", body)
    return re.sub(r"mov\.b8\b", "mov.b16", body)


def inlined(body, text):
    """The text of a kernel, with the functions in `text` in place of their calls."""
    functions = _functions(text)
    while True:
        call = next((m for m in _CALL.finditer(body) if m[2] in functions), None)
        if call is None:
            return body
        given, returned = [name.strip() for name in call[3].split(",") if name.strip()], [call[1]] if call[1] else []
        parameters, results, code = functions[call[2]]
        code = _moves(code, dict(zip([*parameters, *results], [*given, *returned], strict=True)))
        code = re.sub(r"\bret\s*;", "bra $returned;", code[:-1]) + "$returned: }"
        start = body.rindex("{", 0, call.start())  # the call stands in a scope that declares what it passes
        end = block(body, start)
        passed = _moves(body[start : call.start()] + "\x01" + body[call.end() : end],
                        {name: name for name in [*given, *returned]})  # fmt: skip
        passed = re.sub(r"\.param\s+\.b(\d+)(\s)", lambda m: f".reg .b{max(16, int(m[1]))}{m[2]}", passed)
        body = body[:start] + passed.replace("\x01", code) + body[end:]

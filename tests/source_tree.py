"""The package's source, read and not imported: which modules there are, what they import, what reaches what."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"handtuned": "handtuned", "notebooks/lessons": "handtuned.lessons"} | {
    floor: f"handtuned.{floor}" for floor in ("kernels", "quant", "optim", "amp", "nn")
}


@dataclass(frozen=True)
class Module:
    """One file. `name` is dotted, "handtuned.kernels.nf4"; a script's is its path."""

    name: str
    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @cached_property
    def imports(self) -> list[tuple[int, str, str]]:
        """(dots, dotted name of what is imported, its name here) of every import, those inside functions too."""
        found = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    first = alias.name.split(".")[0]
                    found.append((0, alias.name if alias.asname else first, alias.asname or first))
            elif isinstance(node, ast.ImportFrom):
                parts = self.name.split(".")
                base = parts[: len(parts) - node.level + self.is_package] if node.level else []
                base += [node.module] if node.module else []
                for alias in node.names:
                    found.append((node.level, ".".join([*base, alias.name]), alias.asname or alias.name))
        return found

    @cached_property
    def names(self) -> dict[str, str]:
        """Name here → dotted name of what was imported under it."""
        return {here: there for _, there, here in self.imports}

    @cached_property
    def definitions(self) -> dict[str, list[ast.stmt]]:
        """Top-level functions, classes and constants, in the branches of an `if` or `try` too."""
        found: dict[str, list[ast.stmt]] = {}
        for node in _statements(self.tree.body):
            for name in _defined(node):
                found.setdefault(name, []).append(node)
        return found

    @property
    def top_level_code(self) -> Iterator[ast.AST]:
        """What runs on import and defines nothing: calls that register something, the conditions of an `if`."""
        for node in _statements(self.tree.body):
            if isinstance(node, ast.If):
                yield node.test
            elif not _defined(node) and not isinstance(node, (ast.Import, ast.ImportFrom, ast.Try)):
                yield node


def _statements(body):
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try)):
            for part in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from _statements(handler.body)


def _defined(node) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
        return [node.name]
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    if not isinstance(node, (ast.Assign, ast.AnnAssign)):
        return []
    names = [name for target in targets for name in ast.walk(target)]
    return [name.id for name in names if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)]


def package() -> dict[str, Module]:
    """Every module of the package by its dotted name."""
    found = {}
    for folder, prefix in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [prefix, *path.relative_to(ROOT / folder).with_suffix("").parts]
            name = ".".join(part for part in parts if part != "__init__")
            found[name] = Module(name, path)
    return found


def scripts(pattern: str) -> list[Module]:
    """Files outside of the package."""
    return [Module(str(path.relative_to(ROOT)), path) for path in sorted(ROOT.glob(pattern))]


class References:
    """What a piece of code refers to, as (module, top-level name) of the package."""

    def __init__(self, modules: dict[str, Module]):
        self.modules = modules

    def find(self, dotted: str):
        """A module's name, a (module, name), or None for what is not the package's; re-exports are followed."""
        for _ in range(10):
            module, _, name = dotted.rpartition(".")
            offered = self.modules.get(module)
            if offered and name in offered.definitions:
                return module, name
            # What a package's __init__ imports hides a submodule of that name: `handtuned.nn.checkpoint`.
            elsewhere = offered.names if offered else {}
            if elsewhere.get(name, dotted) == dotted:
                return dotted if dotted in self.modules else None
            dotted = elsewhere[name]
        return None

    def target(self, module: Module, expression: ast.AST):
        """What `find` gives for a name or `a.b.c` in a module's code."""
        if isinstance(expression, ast.Name):
            if expression.id in module.definitions and module.name in self.modules:
                return module.name, expression.id
            return self.find(module.names[expression.id]) if expression.id in module.names else None
        if isinstance(expression, ast.Attribute):
            owner = self.target(module, expression.value)
            return self.find(f"{owner}.{expression.attr}") if isinstance(owner, str) else None
        return None

    def of(self, module: Module, node: ast.AST) -> set[tuple[str, str]]:
        """Every top-level name of the package that stands in `node`, a part of `module`."""
        return {found for part in ast.walk(node) if isinstance(found := self.target(module, part), tuple)}

    def missing(self, module: Module) -> list[str]:
        """What `module` imports, or takes as `imported_module.name`, and is not there."""
        imported = [name for dots, name, _ in module.imports if dots or name.split(".")[0] == "handtuned"]
        missing = [name for name in imported if self.find(name) is None]
        for part in ast.walk(module.tree):
            owner = self.target(module, part.value) if isinstance(part, ast.Attribute) else None
            if isinstance(owner, str) and not part.attr.startswith("__"):
                offered, name = self.modules[owner], f"{owner}.{part.attr}"
                lazy = "__getattr__" in offered.definitions
                if not lazy and part.attr not in {*offered.definitions, *offered.names} and name not in self.modules:
                    missing.append(name)
        return missing

    def reached(self, roots: set[tuple[str, str]]) -> set[tuple[str, str]]:
        """`roots` and whatever they refer to, at any distance."""
        attached: dict[tuple[str, str], set[tuple[str, str]]] = {}
        for module in self.modules.values():
            for name, nodes in module.definitions.items():
                # `@op.register_fake` makes a function part of `op`.
                for node in nodes:
                    for decorator in getattr(node, "decorator_list", []):
                        for owner in self.of(module, decorator):
                            attached.setdefault(owner, set()).add((module.name, name))
        done, waiting = set(), set(roots)
        while waiting:
            place = waiting.pop()
            done.add(place)
            module = self.modules[place[0]]
            found = set(attached.get(place, ()))
            for node in module.definitions[place[1]]:
                found |= self.of(module, node)
            waiting |= found - done
        return done

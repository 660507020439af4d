"""Which code a result is of: the meaning of the definitions it reaches, not how and where they are written.

A definition is a statement at a module's top: a function, a class, an assignment. It reaches the definitions
whose names it uses, through imports, too, and what is registered with these when their module is imported.
Its meaning is its syntax tree without docstrings, annotations and imports; names that it takes from cemb
stand without their module. So comments, formatting, and moved or renamed modules change nothing, and a
constant, a default argument or another callee does. A method counts with its class.
"""

import ast
import functools
import gc
import hashlib
import io
import subprocess
import tarfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# What the rule is called in records. Those without it are keyed by whole files.
RULE = "meaning"
# Modules that no result depends on, and those below them: this one, what draws, the other device's kernels.
# Some are names in commits before there were folders.
_KEYING = ("cemb.study.identity",)
_DRAWING = ("cemb.report", "cemb.plots")
_OF_CUDA = (
    "cemb.kernels.triton",
    "cemb.kernels.cuda",
    "cemb.study.bandwidths_gpu",
    "cemb.kernels.cuda_floors",
)
_OF_CPU = (
    "cemb.kernels.cpu",
    *("cemb.kernels.buckets", "cemb.kernels.lanes", "cemb.kernels.overlaps"),
    *("cemb.kernels.rowwise", "cemb.kernels.rules", "cemb.kernels.sparse", "cemb.kernels.updates"),
    *("cemb.study.bandwidths", "cemb.kernels.floors"),
)
# Annotations that dataclasses and Triton act on.
_ACTING = {"ClassVar", "InitVar", "KW_ONLY", "constexpr"}

_AT_IMPORT = "(at import)"  # stands for a statement that binds no name

_lock = threading.RLock()


def parse(source: str) -> ast.Module:
    """`ast.parse`, which in CPython 3.11 fails if a collection starts other Python code meanwhile."""
    with _lock:
        collecting = gc.isenabled()
        gc.disable()
        try:
            return ast.parse(source)
        finally:
            if collecting:
                gc.enable()


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(eq=False)
class _Unit:
    """A statement at a module's top."""

    module: str
    name: str
    node: ast.stmt
    meaning: str = ""
    # Definitions it uses, as module and name; a name of None is all of a module.
    uses: set[tuple[str, str | None]] = field(default_factory=set)

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class _Module:
    """A module's definitions by name, and what else happens when it is imported."""

    units: list[_Unit] = field(default_factory=list)
    binding: dict[str, list[_Unit]] = field(default_factory=dict)
    imports: dict[str, str] = field(default_factory=dict)  # of a name: the dotted name of what it is
    at_import: list[_Unit] = field(default_factory=list)


def _imports(nodes: Sequence[ast.AST]) -> dict[str, str]:
    """Names that imports bind, with what they stand for."""
    found = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.split(".")[0]
                found[alias.asname or root] = alias.name if alias.asname else root
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return found


def _is_named(node: ast.stmt, name: str) -> bool:
    """Whether a statement is a condition on a name, such as ``TYPE_CHECKING`` or ``__name__``."""
    return isinstance(node, ast.If) and any(
        name in (getattr(part, "id", None), getattr(part, "attr", None)) for part in ast.walk(node.test)
    )


def _root(node: ast.AST) -> str | None:
    """The name that ``a.b[c](d)`` begins with."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def _bound(node: ast.stmt) -> list[str]:
    """Names that a statement at the top binds."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    found = [
        part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
    ]
    return found + [part.name for part in ast.walk(node) if isinstance(part, ast.FunctionDef | ast.ClassDef)]


def _acted_on(node: ast.stmt) -> set[str]:
    """Names of what a statement registers with or writes into when it runs."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {
            part.id
            for decorator in node.decorator_list
            if isinstance(decorator, ast.Call | ast.Attribute)
            for part in ast.walk(decorator)
            if isinstance(part, ast.Name)
        }
    written = [
        part
        for part in ast.walk(node)
        if isinstance(part, ast.Attribute | ast.Subscript) and isinstance(part.ctx, ast.Store)
    ]
    called = [part.value for part in ast.walk(node) if isinstance(part, ast.Expr)]
    return {name for part in (*written, *called) if (name := _root(part))}


_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class _Meaning(ast.NodeTransformer):
    """Rewrites a statement to its meaning, and notes which definitions it uses."""

    def __init__(self, code: "Code", unit: _Unit, module: _Module):
        self._code, self._unit, self._module = code, unit, module
        self._local: list[set[str]] = []
        self._imports = {**module.imports, **_imports(list(ast.walk(unit.node)))}

    def _stands_for(self, name: str) -> str | None:
        """The dotted name of what a name is, if it is not a local one."""
        if any(name in names for names in self._local):
            return None
        if name in self._module.binding:
            return f"{self._unit.module}.{name}" if self._unit.module else None
        return self._imports.get(name)

    def _resolved(self, dotted: str) -> ast.expr:
        """The expression for a dotted name; notes the definition, if it is one of ours."""
        found = self._code.find(dotted)
        if found is None:
            head, *rest = dotted.split(".")
            return _chain(head, rest)
        module, name, rest = found
        self._unit.uses.add((module, name))
        return _chain(f"cemb:{name or ''}", rest)

    def visit_Name(self, node: ast.Name) -> ast.expr:
        dotted = self._stands_for(node.id) if isinstance(node.ctx, ast.Load) else None
        return self._resolved(dotted) if dotted else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        parts, inner = [], node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value  # type: ignore[assignment]
        if isinstance(inner, ast.Name) and (dotted := self._stands_for(inner.id)):
            chain = self._resolved(".".join([dotted, *reversed(parts)]))
            if isinstance(chain, ast.Attribute):
                chain.ctx = node.ctx
            return chain
        return self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        return None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        return None

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = self._annotation(node.annotation) or ast.Constant(None)
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = self._annotation(node.annotation)
        return node

    @staticmethod
    def _annotation(node: ast.expr | None) -> ast.expr | None:
        parts = ast.walk(node) if node is not None else ()
        acts = any({getattr(part, "id", None), getattr(part, "attr", None)} & _ACTING for part in parts)
        return node if acts else None

    def generic_visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, _SCOPES):
            every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            every += [extra for extra in (node.args.vararg, node.args.kwarg) if extra]
            if not isinstance(node, ast.Lambda):
                node.returns = None
                node.decorator_list = [self.visit(part) for part in node.decorator_list]
            node.args.defaults = [self.visit(part) for part in node.args.defaults]
            node.args.kw_defaults = [part and self.visit(part) for part in node.args.kw_defaults]
            body = node.body if isinstance(node.body, list) else [node.body]
            self._local.append({argument.arg for argument in every} | _stored(body))
            for argument in every:
                self.visit(argument)
            if isinstance(node, ast.Lambda):
                node.body = self.visit(node.body)
            else:
                node.body = [part for old in node.body if (part := self.visit(old))] or [ast.Pass()]
            self._local.pop()
            return node
        if isinstance(node, _COMPREHENSIONS):
            self._local.append(_stored([node]))
            super().generic_visit(node)
            self._local.pop()
            return node
        super().generic_visit(node)
        for part in ("body", "handlers"):
            if getattr(node, part, None) == []:
                setattr(node, part, [ast.Pass()])
        return node


def _stored(body: Sequence[ast.AST]) -> set[str]:
    """Names that statements bind, but for imports and those declared global."""
    parts = [part for statement in body for part in ast.walk(statement)]
    found = {part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    found |= {part.name for part in parts if isinstance(part, ast.FunctionDef | ast.ClassDef)}
    shared = [part.names for part in parts if isinstance(part, ast.Global)]
    return found - {name for names in shared for name in names}


def _chain(head: str, rest: Sequence[str]) -> ast.expr:
    node: ast.expr = ast.Name(head, ast.Load())
    for part in rest:
        node = ast.Attribute(node, part, ast.Load())
    return node


class Code:
    """The package's source: of a folder, or of a commit.

    Args:
        sources: Python source by module, as ``cemb.ops``.
    """

    def __init__(self, sources: Mapping[str, str]):
        self._sources = sources
        self._modules: dict[str, _Module] = {}
        self._reached: dict[tuple[str, str], Reached] = {}

    @classmethod
    def of_folder(cls, package: Path) -> "Code":
        """That of a folder ``cemb`` as it is now; what has not changed since is not read again."""
        files = ((path, path.stat()) for path in sorted(package.rglob("*.py")))
        return _of_files(package, tuple((path, stat.st_mtime_ns, stat.st_size) for path, stat in files))

    @classmethod
    def of_commit(cls, root: Path, commit: str) -> "Code":
        """That of a commit of a repository, its notebooks too. LookupError if git does not have it."""
        return _of_commit(root, commit)

    def text(self, path: str) -> str | None:
        """A file of the commit that is no module, by its path in the repository."""
        return self._sources.get(path)

    def modules_named(self, last: str) -> list[str]:
        """Modules whose name ends so, wherever they lie."""
        return [name for name in self._sources if name.split(".")[-1] == last and "/" not in name]

    def find(self, dotted: str) -> tuple[str, str | None, list[str]] | None:
        """Module and name of what a dotted name is, and the attributes that follow; None if not in cemb."""
        parts = dotted.split(".")
        if parts[0] != "cemb":
            return None
        for length in range(len(parts), 0, -1):
            module = ".".join(parts[:length])
            if module not in self._sources:
                continue
            if length == len(parts):
                return module, None, []
            name, rest = parts[length], parts[length + 1 :]
            own = self._module(module)
            if name not in own.binding and name in own.imports:  # of another module, imported there
                return self.find(".".join([own.imports[name], *rest]))
            return module, name, rest
        return None

    def _module(self, name: str) -> _Module:
        if name not in self._modules:
            self._modules[name] = _read(name, parse(self._sources[name]))
        return self._modules[name]

    def _meaning(self, unit: _Unit, module: _Module) -> str:
        if not unit.meaning:
            changed = _Meaning(self, unit, module).visit(unit.node)
            unit.meaning = _sha(ast.dump(changed)) if changed else "nothing"
        return unit.meaning

    def _units(self, module: str, name: str | None) -> list[_Unit]:
        own = self._module(module)
        return [*(own.units if name is None else own.binding.get(name, [])), *own.at_import]

    def reach(self, source: str, device: str = "cpu") -> "Reached":
        """All definitions that Python source reaches on a device, ``"cpu"`` or ``"cuda"``."""
        with _lock:
            key = source, device
            if key not in self._reached:
                self._reached[key] = self._reach(source, device)
            return self._reached[key]

    def _reach(self, source: str, device: str) -> "Reached":
        left_out = (*_KEYING, *_DRAWING, *(_OF_CPU if device.startswith("cuda") else _OF_CUDA))

        def counts(module: str) -> bool:
            return not any(module == name or module.startswith(f"{name}.") for name in left_out)

        entry = _read("", parse(source))
        found: dict[_Unit, _Unit | None] = dict.fromkeys(entry.units)
        todo = list(entry.units)
        while todo:
            unit = todo.pop()
            self._meaning(unit, entry if unit.module == "" else self._module(unit.module))
            for home, name in sorted(unit.uses, key=str):
                for used in self._units(home, name) if counts(home) else ():
                    if used not in found:
                        found[used] = unit
                        todo.append(used)
        return Reached(self, found)


@functools.lru_cache(maxsize=4)
def _of_files(package: Path, files: tuple[tuple[Path, int, int], ...]) -> Code:
    return Code(dict(_sources((path.relative_to(package.parent), path.read_bytes()) for path, *_ in files)))


@functools.lru_cache(maxsize=16)
def _of_commit(root: Path, commit: str) -> Code:
    command = ["git", "archive", "--format=tar", commit, "cemb", "notebooks"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise LookupError(f"git does not know commit {commit[:10]} here") from None
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        held = [(Path(entry.name), archive.extractfile(entry)) for entry in archive if entry.isfile()]
        return Code(dict(_sources((path, file.read()) for path, file in held if file)))


def _sources(files: Iterator[tuple[Path, bytes]]) -> Iterator[tuple[str, str]]:
    for path, content in files:
        if path.suffix == ".py" and path.parts[0] == "cemb":
            parts = path.with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), content.decode()
        elif path.suffix == ".ipynb":
            yield str(path), content.decode()


def _read(name: str, tree: ast.Module) -> _Module:
    """A module's statements, by what they bind."""
    module = _Module(imports=_imports(list(ast.walk(tree))))
    acting = []
    for node in tree.body:
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text or isinstance(node, ast.Import | ast.ImportFrom):
            continue
        if _is_named(node, "TYPE_CHECKING") or _is_named(node, "__name__"):
            continue
        names = _bound(node)
        unit = _Unit(name, names[0] if names else _AT_IMPORT, node)
        module.units.append(unit)
        for bound in dict.fromkeys(names):
            module.binding.setdefault(bound, []).append(unit)
        acting.append((unit, names, _acted_on(node)))
    for unit, names, acted_on in acting:
        own = [held for held in acted_on if held in module.binding and held not in names]
        for held in own:
            module.binding[held].append(unit)
        if not own and not names:
            module.at_import.append(unit)
    return module


class Reached:
    """The definitions that a source reaches, each with the one it was first reached from."""

    def __init__(self, code: Code, found: Mapping[Any, Any]):
        self._found: Mapping[_Unit, _Unit | None] = found
        shallow = {unit: unit.meaning for unit in found}
        lines = []
        for unit, meaning in shallow.items():
            used = sorted(
                f"{name} {held.meaning}"
                for home, name in unit.uses
                for held in code._units(home, name)
                if held in shallow
            )
            # Whose name is another's, too, is told apart by its meaning.
            lines.append(" ".join((unit.name, meaning, *used)))
        self.hash: str = _sha("\n".join(sorted(lines)))

    def definitions(self) -> dict[str, str]:
        """Each definition's meaning, by its module and name."""
        found: dict[str, list[str]] = {}
        for unit, meaning in sorted((str(unit), unit.meaning) for unit in self._found):
            found.setdefault(unit, []).append(meaning)
        return {name: " ".join(meanings) for name, meanings in found.items()}

    def way_to(self, definition: str) -> str:
        """How a definition is reached, from the source on: ``measure → pair_scores → mix``."""
        unit = next((unit for unit in self._found if str(unit) == definition), None)
        names = []
        while unit is not None:
            if unit.name != _AT_IMPORT:
                names.append(unit.name)
            unit = self._found[unit]
        return " → ".join(reversed(names))

    def changes(self, before: Mapping[str, str], *, with_ways: bool = True) -> list[str]:
        """What is another than in earlier `definitions`, and what reaches it; modules do not count."""

        def by_name(definitions: Mapping[str, str]) -> dict[tuple[str, str], str]:
            return {(name.split(".")[-1], meaning): name for name, meaning in definitions.items()}

        then, now = by_name(before), by_name(self.definitions())
        added = [now[key] for key in now.keys() - then.keys()]
        removed = {then[key].split(".")[-1]: then[key] for key in sorted(then.keys() - now.keys())}
        found = []
        for name in sorted(added):
            changed = removed.pop(name.split(".")[-1], None)
            text = f"{name.lstrip('.')} {'changed' if changed else 'is new'}"
            way = self.way_to(name) if with_ways else ""
            found.append(f"{text} ({way})" if " → " in way else text)
        return [*found, *(f"{name.lstrip('.')} is not reached any more" for name in sorted(removed.values()))]

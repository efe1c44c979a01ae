"""A name that is imported from the wrong module: the error says from which one to import it."""

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

PACKAGE = Path(__file__).parents[1]


def says_where(module: str) -> Callable[[str], NoReturn]:
    """Return a `__getattr__` for a module: it says where a name is that is not in this one."""

    def get_attribute(name: str) -> NoReturn:
        places = _modules_with(name)
        if not places:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        instead = " or ".join(f"'from {place} import {name}'" for place in places)
        # Of an AttributeError, an import would make an ImportError in words of its own.
        raise ImportError(f"{name} is not in {module}: write {instead}", name=module)

    return get_attribute


def names_of(file: Path) -> set[str]:
    """Return the public names of a module, which is read and not imported: it may need more."""
    import ast  # only for an error

    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        match node:
            case ast.Assign(targets=[ast.Name(id="__all__")], value=value):
                return set(ast.literal_eval(value))
            case ast.AsyncFunctionDef(name=name) | ast.FunctionDef(name=name):
                names.add(name)
            case ast.ClassDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
            case ast.ImportFrom(names=aliases):
                names |= {alias.name for alias in aliases if alias.asname == alias.name}
    return {name for name in names if not name.startswith("_")}


def _modules_with(name: str) -> list[str]:
    # An import asks for a module of the package before it imports it.
    if name.startswith("_") or (PACKAGE / f"{name}.py").exists():
        return []
    core, *doors = PACKAGE / "__init__.py", *sorted(PACKAGE.glob("[!_]*.py"))
    if not core.exists():  # there is no source, only bytecode
        return []
    if name in names_of(core):
        return [PACKAGE.name]
    return [f"{PACKAGE.name}.{door.stem}" for door in doors if name in names_of(door)]

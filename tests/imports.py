"""Who imports whom, read from the source: ``python -m tests.imports`` prints the picture.

A room is a folder of the library, a file beside them, or one of the two folders of commands.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GROUND = {
    "refiner_ds",
    *(
        f"refiner_ds.{name}"
        for name in (
            "amounts",
            "cache",
            "command_line",
            "errors",
            "exit_codes",
            "files",
            "garbage",
            "gpus",
            "page",
            "memory",
            "output",
            "run_folder",
            "seeds",
            "shipped",
            "subcommands",
            "versions",
        )
    ),
}


def module_files(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the product by its dotted name."""
    found = {}
    for top in ("refiner_ds", "launch", "data_tools"):
        for file in (root / top).rglob("*.py"):
            parts = file.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports_of(module: str, files: dict[str, Path]) -> set[str]:
    """Modules of the product that a module imports anywhere in it, inside functions and for types too."""
    return {name for name in _named(module, files) if name in files and name != module}


def _named(module: str, files: dict[str, Path]) -> Iterator[str]:
    package = module.split(".") if files[module].name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(files[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            submodules = {f"{source}.{alias.name}" for alias in node.names} & files.keys()
            yield from submodules or {source}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            literal = "".join(_literal(argument) for argument in node.args[:1])
            if not f"{module}.".startswith(f"{literal}."):  # a module of its own package, chosen by name
                yield literal


def _literal(argument: ast.expr) -> str:
    """A module's name as it is written, or the part of it before what is filled in."""
    if isinstance(argument, ast.JoinedStr) and argument.values:
        return _literal(argument.values[0]).rstrip(".")
    return argument.value if isinstance(argument, ast.Constant) and isinstance(argument.value, str) else ""


def room_of(module: str) -> str:
    """The room a module lies in."""
    if module in GROUND:
        return "ground"
    top, _, rest = module.partition(".")
    return rest.partition(".")[0] if top == "refiner_ds" else top


def import_graph(root: Path = ROOT) -> dict[str, set[str]]:
    """Modules and what each imports."""
    files = module_files(root)
    return {module: imports_of(module, files) for module in sorted(files)}


def rooms(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Rooms and the other rooms each imports."""
    between: dict[str, set[str]] = {}
    for module, imported in graph.items():
        room = room_of(module)
        between.setdefault(room, set()).update(room_of(name) for name in imported if room_of(name) != room)
    return between


if __name__ == "__main__":
    graph = import_graph()
    for room, imported in sorted(rooms(graph).items(), key=lambda item: len(item[1])):
        modules = [module for module in graph if room_of(module) == room]
        print(f"{room:<12} {len(modules):>3} modules   ← {', '.join(sorted(imported)) or 'nothing'}")

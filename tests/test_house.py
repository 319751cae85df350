"""The house: rooms on floors, imports that go down, no circle, no crowded room, plain docstrings.

docs/explain/architecture.md says what lies in each room.
"""

import ast
import re
import statistics
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "mvlm": ROOT / "mvlm",
    "mvlm_kernels": ROOT / "kernels" / "mvlm_kernels",
    "mvlm_dataloading": ROOT / "dataloading" / "mvlm_dataloading",
    "mvlm_benchmarks": ROOT / "benchmarks" / "mvlm_benchmarks",
}
FLOORS: dict[str, list[set[str]]] = {  # top to bottom; rooms of one floor do not know each other
    "mvlm": [
        {"__main__"},
        {"cli"},
        {"commands"},
        {"studies", "speedrun", "app"},
        {"tasks"},
        {"training", "report", "portable"},
        {"costs", "runs", "evaluation", "search"},
        {"distributed", "weights", "inference"},
        {"model"},
        {"objectives"},
        {"config"},
        {"files", "device", "machine", "progress", "statistics"},
        {"errors"},
    ],
    "mvlm_dataloading": [
        {"loader", "tools", "scenes"},
        {"build"},
        {"tokenizer"},
        {"dataset", "sources", "options"},
        {"captions", "randomness"},
        {"batch"},
        {"errors"},
    ],
    "mvlm_benchmarks": [
        {"cli", "gpu"},
        {"kernels", "step", "data", "run", "search"},
        {
            "clock",
            "ceilings",
            "machine",
            "gpu_state",
            "results",
            "intervals",
            "budget",
            "captions",
            "choices",
            "unavailable",
        },
    ],
}
MAY_NAME = {  # other packages of ours that a package may import
    "mvlm": {"mvlm_kernels", "mvlm_dataloading"},
    "mvlm_kernels": set(),
    "mvlm_dataloading": set(),
    "mvlm_benchmarks": {"mvlm", "mvlm_kernels", "mvlm_dataloading"},
}
MOST_MODULES, MOST_LINES, MEDIAN_LINES = 16, 300, 200
FILES = [(package, file) for package, folder in PACKAGES.items() for file in sorted(folder.rglob("*.py"))]


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def module_of(package: str, file: Path) -> str:
    """The dotted name of a file's module; that of a package for its __init__.py."""
    parts = (package, *file.relative_to(PACKAGES[package]).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(package, file) for package, file in FILES}


@cache
def imports(file: Path, lazy: bool = True) -> set[str]:
    """Our modules that a file imports. Without `lazy`, not those of its functions, nor those for types alone."""
    left_out: set[int] = set()
    for block in () if lazy else ast.walk(tree(file)):
        for_types = isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        if for_types or isinstance(block, ast.FunctionDef | ast.AsyncFunctionDef):
            left_out |= {id(node) for node in ast.walk(block)}
    found = set()
    for node in ast.walk(tree(file)):
        if id(node) in left_out:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES
            found |= inside or {node.module}
    return {name for name in found if name.split(".")[0] in PACKAGES}


def room_of(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("package", FLOORS)
def test_every_room_has_a_floor(package: str) -> None:
    rooms = {
        path.stem for path in PACKAGES[package].iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert rooms - {"__init__"} <= set().union(*FLOORS[package])


@pytest.mark.parametrize("package", FLOORS)
def test_imports_go_down(package: str) -> None:
    """Lazy imports and those for types count too."""
    floors = {room: number for number, rooms in enumerate(FLOORS[package]) for room in rooms}
    for of, file in FILES:
        module = module_of(of, file)
        if of != package or module == package:  # the face of a package imports on first use
            continue
        room = room_of(module)
        for other in imports(file):
            if other.startswith(f"{package}.") and room_of(other) != room:
                assert floors[room_of(other)] > floors[room], f"{file}: {room}/ may not import {other}"


def test_packages_know_only_what_they_may() -> None:
    for package, file in FILES:
        others = {name.split(".")[0] for name in imports(file)} - {package}
        assert others <= MAY_NAME[package], file


@pytest.mark.slow
def test_no_circle_among_modules() -> None:
    arrows = {
        module_of(package, file): {name for name in imports(file, lazy=False) if name in MODULES}
        for package, file in FILES
        if file.name != "__init__.py"  # a face names the modules of its room
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' -> '.join([*path[path.index(module) :], module])}"
        if module not in done:
            for other in sorted(arrows.get(module, ())):
                visit(other, (*path, module))
            done.add(module)

    for module in sorted(arrows):
        visit(module, ())


def test_rooms_are_not_crowded_and_files_are_not_long() -> None:
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for _, file in FILES}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}
    assert statistics.median(lengths.values()) < MEDIAN_LINES
    for folder in {file.parent for _, file in FILES}:
        modules = [file for file in folder.glob("*.py") if file.name != "__init__.py"]
        assert len(modules) <= MOST_MODULES, f"{folder}: {len(modules)} modules"


RIDDLE = re.compile(r"(What|How|Which|Where|Whether|Why|When|Of those|So|Also|That|This is)\b")


@pytest.mark.slow
def test_docstrings_begin_with_the_thing() -> None:
    """A noun phrase or an imperative, not a clause that leans on its surroundings."""
    for _, file in FILES:
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                first = (ast.get_docstring(node) or "").split("\n")[0]
                assert not RIDDLE.match(first), f"{file}: {first}"


def test_the_architecture_page_and_its_picture_name_every_room() -> None:
    page = (ROOT / "docs" / "explain" / "architecture.md").read_text()
    picture = (ROOT / "docs" / "images" / "floors.svg").read_text()
    for path in PACKAGES["mvlm"].iterdir():
        if (path / "__init__.py").is_file():
            assert f"`{path.name}/`" in page
            assert f">{path.name}/<" in picture
    for path in re.findall(r"`((?:mvlm|kernels|dataloading|benchmarks|tests|docs)/[\w/.]+)`", page):
        assert (ROOT / path).exists(), f"{path} is not there"


FOLDERS = ("mvlm", "kernels", "dataloading", "benchmarks", "tests")


def silenced_attributes(text: str) -> list[int]:
    """The lines of Python `text` that assign to an attribute and silence the type checker, from 1.

    Such a line sets an attribute that may not exist. Declare the attribute, or use `unittest.mock.patch.object`, which
    raises AttributeError for a wrong name.
    """
    lines, found = text.splitlines(), set()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if any(isinstance(part, ast.Attribute) for target in targets for part in ast.walk(target)):
            numbers = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            found |= {n for n in numbers if re.search(r"#\s*(pyright|type):\s*ignore", lines[n - 1])}
    return sorted(found)


@pytest.mark.slow
def test_no_assignment_to_an_attribute_is_hidden_from_the_type_checker():
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 100
    hidden = {str(file.relative_to(ROOT)): silenced_attributes(file.read_text()) for file in files}
    assert {name: numbers for name, numbers in hidden.items() if numbers} == {}


def test_hidden_assignments_are_found():
    bad = "x = 1\nm.backend = 1  # pyright: ignore[reportAttributeAccessIssue]\na, m.b = (\n  1, 2)  # type: ignore\n"
    good = "m.backend = 1\nx = m.y  # pyright: ignore[reportAttributeAccessIssue]\n"
    assert silenced_attributes(bad) == [2, 4]
    assert silenced_attributes(good) == []


OF_OTHERS = {"_replace", "_asdict", "_fields", "_from_config", "_pipe", "_version", "_patch_lang", "_LangPatchScope"}
"""Private by spelling, and not ours: named tuples, transformers, DALI, tensors, Triton's interpreter."""


def private_names(text: str) -> list[str]:
    """Private names of our packages that the Python `text` of a test imports, reads or replaces."""

    def private(name: object) -> bool:
        return isinstance(name, str) and name.startswith("_") and not name.startswith("__") and name not in OF_OTHERS

    def root(node: ast.AST) -> str:
        while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
            node = node.func if isinstance(node, ast.Call) else node.value
        return node.id if isinstance(node, ast.Name) else ""

    nodes, found, foreign = list(ast.walk(ast.parse(text))), [], {"self", "cls"}
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    defined |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    for node in nodes:
        if isinstance(node, ast.Import):
            foreign |= {alias.asname or alias.name.split(".")[0] for alias in node.names} - set(PACKAGES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
            found += [alias.name for alias in node.names if private(alias.name)]
        elif isinstance(node, ast.ImportFrom):
            foreign |= {alias.asname or alias.name for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in defined:
            found += [node.attr] if root(node) not in foreign else []
        elif isinstance(node, ast.Call) and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            replaced = node.args[1].value  # patch.object(owner, "name"), monkeypatch.setattr(owner, "name", ...)
            found += [replaced] if private(replaced) and root(node.args[0]) not in foreign else []
    return found


@pytest.mark.slow
def test_tests_reach_into_no_private_name() -> None:
    for file in sorted((ROOT / "tests").rglob("*.py")):
        assert private_names(file.read_text()) == [], file


def test_private_names_are_found() -> None:
    text = """
from mvlm.model.fast import _encode
import torch
from unittest.mock import patch
class Own:
    def _helper(self): return self._x
def test_it(monkeypatch, loader):
    loader._source._ids
    torch._foreach_norm([])
    monkeypatch.setattr(loader, "_rank", 3)
    Own()._helper()
"""
    assert sorted(private_names(text)) == ["_encode", "_ids", "_rank", "_source"]

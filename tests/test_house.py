"""The house: rooms on floors, imports that go down, no circle.

docs/explain/architecture.md says what lies in each room.
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "mvlm": ROOT / "mvlm",
    "mvlm_kernels": ROOT / "kernels" / "mvlm_kernels",
    "triton_proof": ROOT / "kernels" / "triton_proof",
    "mvlm_dataloading": ROOT / "dataloading" / "mvlm_dataloading",
    "mvlm_benchmarks": ROOT / "benchmarks" / "mvlm_benchmarks",
}
FLOORS: dict[str, list[set[str]]] = {  # top to bottom
    "mvlm": [
        {"__main__", "cli", "commands"},
        {"studies", "verify", "app", "report"},
        {"tasks"},
        {"training", "search"},
        {"runs", "inference", "evaluation", "portable", "costs"},
        {"distributed", "weights", "model"},
        {"objectives", "config"},
        {"files", "device", "machine", "progress", "statistics", "errors"},
    ],
    "mvlm_dataloading": [
        {"loader", "tools", "scenes"},
        {"build"},
        {"tokenizer"},
        {"dataset", "sources", "options", "masking"},
        {"captions", "randomness", "images", "tar_walk"},
        {"batch", "files"},
        {"errors"},
    ],
    "mvlm_kernels": [
        {"aot", "aot_cases"},
        {"integrations", "layers"},
        {
            "add_layer_norm",
            "cross_attention",
            "gather_patches",
            "gelu_linear",
            "pixel_loss",
            "place_tokens",
            "split_linear",
        },
        {"language", "arguments"},
        {"dispatch", "registration"},
        {"hardware"},
    ],
    "triton_proof": [
        {"__main__", "plugin"},
        {"driver", "autotune"},
        {"program"},
        {"machine"},
        {"report", "scalar", "arguments"},
        {"ptx", "ptxas", "allocations"},
    ],
    "mvlm_benchmarks": [
        {"cli", "gpu"},
        {"kernels", "step", "data", "run"},
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
    "triton_proof": set(),
    "mvlm_dataloading": set(),
    "mvlm_benchmarks": {"mvlm", "mvlm_kernels", "mvlm_dataloading"},
}
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
def imports(package: str, file: Path) -> set[str]:
    """Our modules that a file imports: relatively or not, also in its functions and for types alone."""
    parents = module_of(package, file).split(".")[: None if file.name == "__init__.py" else -1]
    found = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = parents[: len(parents) + 1 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else module for name in names}
    return {name for name in found if name.split(".")[0] in PACKAGES}


def room_of(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("package", FLOORS)
def test_every_room_has_a_floor(package: str) -> None:
    rooms = {
        path.stem for path in PACKAGES[package].iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert rooms - {"__init__"} <= set().union(*FLOORS[package])


@pytest.mark.slow
@pytest.mark.parametrize("package", FLOORS)
def test_imports_go_down(package: str) -> None:
    """Or stay on a floor. Lazy and relative imports count too."""
    floors = {room: number for number, rooms in enumerate(FLOORS[package]) for room in rooms}
    for of, file in FILES:
        module = module_of(of, file)
        if of != package or module == package:  # the face of a package imports on first use
            continue
        room = room_of(module)
        for other in imports(package, file):
            if other.startswith(f"{package}.") and room_of(other) != room:
                assert floors[room_of(other)] >= floors[room], f"{file}: {room}/ may not import {other}"


def test_packages_know_only_what_they_may() -> None:
    for package, file in FILES:
        others = {name.split(".")[0] for name in imports(package, file)} - {package}
        assert others <= MAY_NAME[package], file


def test_no_circle_among_modules() -> None:
    """Lazy and relative imports count too."""
    arrows = {module_of(package, file): imports(package, file) & MODULES for package, file in FILES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' -> '.join([*path[path.index(module) :], module])}"
        if module not in done:
            for other in sorted(arrows[module]):
                visit(other, (*path, module))
            done.add(module)

    for module in sorted(arrows):
        visit(module, ())


def test_the_architecture_page_names_every_room() -> None:
    page = (ROOT / "docs" / "explain" / "architecture.md").read_text()
    for path in PACKAGES["mvlm"].iterdir():
        if (path / "__init__.py").is_file():
            assert f"`{path.name}/`" in page
    for path in re.findall(r"`((?:mvlm|kernels|dataloading|benchmarks|tests|docs)/[\w/.]+)`", page):
        assert (ROOT / path).exists(), f"{path} is not there"

"""The house: rooms on floors, imports that go down, no circle, nothing patched at run time, and tests that are found.

docs/explain/architecture.md says what lies in each room, tests/README.md where its tests are.
"""

import ast
import re
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from mvlm.cli import COMMANDS

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
        {"runs", "inference", "evaluation", "portable", "costs", "weights"},
        {"distributed", "objectives", "model"},
        {"config"},
        {
            "files",
            "untrusted",
            "schemas",
            "terminal",
            "device",
            "machine",
            "progress",
            "statistics",
            "errors",
            "waiting",
        },
    ],
    "mvlm_dataloading": [
        {"loader", "tools", "scenes"},
        {"build"},
        {"tokenizer"},
        {"dataset", "links", "sources", "options", "masking"},
        {"captions", "randomness", "images", "tar_walk"},
        {"batch", "files", "untrusted", "urls"},
        {"errors"},
    ],
    "mvlm_kernels": [
        {"aot"},
        {"cases"},
        {"integrations", "layers"},
        {path.parent.name for path in PACKAGES["mvlm_kernels"].glob("*/cases.py")},  # the ops
        {"case", "language", "arguments", "linear", "shadows"},
        {"dispatch", "registration"},
        {"hardware", "launch_cache", "machine_code"},
    ],
    "triton_proof": [
        {"__main__", "plugin"},
        {"driver", "autotune"},
        {"coverage", "variants"},
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
SWITCHES = {  # attributes of other modules that product code may set, for want of a function that sets them
    "torch._dynamo.config.recompile_limit",  # torch's documented setting
    "torch._dynamo.config.optimize_ddp",  # the same
    "gradio.processing_utils.hash_seed",  # salt of file names; Gradio reads it from a file that all containers share
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


def test_what_is_printed_passes_one_function() -> None:
    """A bare `print` or a write to a stream would pass by `mvlm.terminal`, which escapes control characters."""
    may = {"mvlm/terminal.py", "loader/decoder_check.py"}  # the latter answers its own parent process in JSON
    for package, file in FILES:
        if package in ("mvlm", "mvlm_dataloading") and not any(file.as_posix().endswith(one) for one in may):
            called = [ast.unparse(node.func) for node in ast.walk(tree(file)) if isinstance(node, ast.Call)]
            assert "print" not in called, file


OPENED_BY_THEMSELVES = {
    "mvlm/runs/object_store.py": "a new file in a folder that the caller has made",
    "dataloading/mvlm_dataloading/untrusted.py": "the one reader",
    "dataloading/mvlm_dataloading/files.py": "the one writer",
    "dataloading/mvlm_dataloading/images/decode.py": "images, with limits of their own",
    "mvlm/app/uploads.py": "uploads, under names that the page draws",
    "mvlm/cli.py": "/dev/null",
    "mvlm/progress.py": "/dev/null",
    "mvlm/commands/machine_check.py": "/proc, and a shard of a data set that is open",
    "mvlm/machine.py": "/proc",
    "mvlm/files.py": "a file that this process has just written",
    "mvlm/training/metrics.py": "/proc",
    "mvlm/evaluation/workspace.py": "arrays of an evaluation, in a folder that it has locked",
    "mvlm/inference/trained_model.py": "a folder that this call has made",
    "mvlm/portable/programs.py": "a folder that this call has made",
    "mvlm/report/html.py": "a file of this package",
    "mvlm/tasks/__init__.py": "files of this package",
    "dataloading/mvlm_dataloading/build/assemble.py": "the build's own folder",
    "dataloading/mvlm_dataloading/build/build.py": "the build's own folder",
    "dataloading/mvlm_dataloading/build/piece.py": "the build's own folder",
    "dataloading/mvlm_dataloading/build/workers.py": "the build's own folder",
    "dataloading/mvlm_dataloading/build/packaged_sets.py": "files of installed packages",
    "dataloading/mvlm_dataloading/scenes/drawing.py": "files of installed packages",
    "dataloading/mvlm_dataloading/dataset/open.py": "a path that the one writer gives out",
    "dataloading/mvlm_dataloading/dataset/folders.py": "a file that it has fetched itself",
    "dataloading/mvlm_dataloading/dataset/remote_cache.py": "the cache's own folder",
    "dataloading/mvlm_dataloading/links/cache.py": "the cache's own folder",
    "dataloading/mvlm_dataloading/links/store.py": "a file of the hub, by its client",
    "dataloading/mvlm_dataloading/loader/pipeline.py": "a temporary folder of this process",
    "dataloading/mvlm_dataloading/tools/link.py": "a folder that this call has made",
    "dataloading/mvlm_dataloading/tools/view.py": "a folder that this call has made",
    "dataloading/mvlm_dataloading/tools/view_links.py": "a folder that this call has made",
}
"""Files of code that open files by other means than the one reader and the one writer, and which files these are."""
OPENING = re.compile(r"(^os|\w|\)|\])\.(read_text|read_bytes|write_text|write_bytes|open|from_file|to_file)$|^open$")
IN_MEMORY = re.compile(r"tarfile|[Pp][Ii][Ll]|_dataset|opened")


def test_files_of_others_have_one_reader_and_one_writer() -> None:
    opening = set()
    for package, file in FILES:
        if package in ("mvlm", "mvlm_dataloading"):
            called = {ast.unparse(node.func) for node in ast.walk(tree(file)) if isinstance(node, ast.Call)}
            if any(OPENING.search(name) and not IN_MEMORY.search(name) for name in called):
                opening.add(str(file.relative_to(ROOT)))
    assert opening == OPENED_BY_THEMSELVES.keys()


def dotted(node: ast.AST, origins: dict[str, str]) -> str | None:
    """The full name of `a.b[0].c` if `a` was imported, without its indices. None for an object that a call has made."""
    while isinstance(node, ast.Subscript):
        node = node.value
    if isinstance(node, ast.Name):
        return origins.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value, origins)
        return owner and f"{owner}.{node.attr}"
    return None


def patched(module: ast.Module) -> list[str]:
    """What a file changes of other modules and of their classes, by full names; `unittest.mock` for its import."""
    found, origins = [], dict[str, str]()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            origins |= {
                a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names
            }
            found += [a.name for a in node.names if a.name == "unittest.mock"]
        elif isinstance(node, ast.ImportFrom):
            names = {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            origins |= names
            found += ["unittest.mock" for name in names.values() if name.startswith("unittest.mock")]
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            found.append(dotted(node, origins))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr"):
            owner, name = node.args[:2]
            whole = ast.unparse(owner) if isinstance(owner, ast.Call) else dotted(owner, origins)
            found.append(whole and f"{whole}.{ast.unparse(name)}")
    return [name for name in found if name and name not in SWITCHES]


@pytest.mark.parametrize(
    "source",
    [
        "from unittest.mock import patch",
        "from unittest import mock",
        "import unittest.mock",
        "import torch\ntorch.autograd.backward = print",
        "import torch.nn.functional as F\nF.linear, x = print, 1",
        "from a.b import Numbers\nNumbers.read = print",
        "from a import b\nsetattr(b.c, 'd', 1)",
        "import sys\nsys.modules['a'].b = 1",
        "from importlib import import_module\nsetattr(import_module('a'), 'b', 1)",
        "import a\ndel a.b",
    ],
)
def test_a_patch_is_seen(source: str) -> None:
    assert patched(ast.parse(source))


def test_nothing_is_patched_at_run_time() -> None:
    """`triton_proof` replaces functions of Triton and torch, in tests alone: that is its purpose."""
    for package, file in FILES:
        if package not in ("triton_proof", "mvlm_benchmarks"):
            assert not patched(tree(file)), file


OPENINGS = re.compile(r"(What|That of|Those of|As|The same|Of|How|Where|Whether|Which|Its)\b")
"""Words by which no docstring opens."""


def riddles(module: ast.Module) -> list[str]:
    """Docstrings, also those behind an assignment, that open by a pronoun in place of the thing that they describe."""
    texts = []
    for node in ast.walk(module):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            texts.append(ast.get_docstring(node))
            texts += [
                after.value.value
                for before, after in pairwise(node.body)
                if isinstance(before, ast.Assign | ast.AnnAssign) and isinstance(after, ast.Expr)
                if isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
            ]
    return [text for text in texts if text and OPENINGS.match(text)]


@pytest.mark.parametrize(
    "source",
    [
        '"""What the file is about."""',
        'class A:\n    """Of one rank."""',
        'class A:\n    a: int\n    """Its width."""',
        'def f():\n    """As `g`."""',
        'A = 1\n"""The same of B."""',
    ],
)
def test_a_docstring_that_needs_another_one_is_seen(source: str) -> None:
    assert riddles(ast.parse(source))


def test_docstrings_say_first_which_thing_they_describe() -> None:
    found = {str(file.relative_to(ROOT)): riddles(tree(file)) for _, file in FILES}
    assert {name: texts for name, texts in found.items() if texts} == {}


def test_the_architecture_page_names_every_room() -> None:
    page = (ROOT / "docs" / "explain" / "architecture.md").read_text()
    for path in PACKAGES["mvlm"].iterdir():
        if (path / "__init__.py").is_file():
            assert f"`{path.name}/`" in page
    for path in re.findall(r"`((?:mvlm|kernels|dataloading|benchmarks|tests|docs)/[\w/.]+)`", page):
        assert (ROOT / path).exists(), f"{path} is not there"


TESTS_OF = {
    "mvlm": "mvlm",
    "mvlm_kernels": "kernels",
    "triton_proof": "triton_proof",
    "mvlm_dataloading": "dataloading",
    "mvlm_benchmarks": "benchmarks",
}
TEST_FILES = sorted((ROOT / "tests").rglob("*.py"))


def own_test(package: str, file: Path) -> Path:
    """tests/.../x/test_y.py of x/y.py."""
    inside = file.relative_to(PACKAGES[package])
    return ROOT / "tests" / TESTS_OF[package] / inside.parent / f"test_{inside.name}"


@cache
def names_in(file: Path) -> set[str]:
    """Modules that a file imports, or names in a string, or of whose commands it has the first words."""
    text, found = file.read_text(), set[str]()
    for start, *names in re.findall(r"^\s*from (\S+) import (?:\(([^)]*)\)|(.*))", text, re.MULTILINE):
        found |= {start, *(f"{start}.{name}" for name in re.findall(r"\w+", " ".join(names)))}
    for name in re.findall(r"\b(?:mvlm\w*|triton_proof)(?:\.\w+)+", text):
        found |= {name, name.rpartition(".")[0]}  # the latter for a name of a module, such as one that is patched
    words = set(re.findall(r"""(?:"|mvlm )([a-z]+)\b""", text))
    found |= {command.__module__ for name, command in COMMANDS.items() if name.split()[0] in words}
    found = {name for name in found if name in MODULES or name.startswith("support.")}
    faces = [(package, face) for package, face in FILES if face.name == "__init__.py"]
    return found.union(*(imports(*face) & MODULES for face in faces if module_of(*face) in found))


@cache
def reached_by(test: Path) -> set[str]:
    """What a test file or a helper that it imports names, and what the modules import or name that they name."""
    helpers = [ROOT / "tests" / f"{name.replace('.', '/')}.py" for name in names_in(test) if "support." in name]
    named = names_in(test).union(*(names_in(helper) for helper in helpers if helper.is_file()))
    return named.union(*(imports(of, file) | names_in(file) for of, file in FILES if module_of(of, file) in named))


@pytest.mark.slow
def test_a_test_file_of_a_modules_name_tests_the_module() -> None:
    further = {"triton_proof.plugin", "mvlm_dataloading.build.piece"}  # called by pytest, and by a build
    for package, file in FILES:
        if (own := own_test(package, file)).is_file() and module_of(package, file) not in further:
            assert module_of(package, file) in reached_by(own), f"{own} does not test {file}"


@pytest.mark.slow
def test_every_module_has_a_test_of_its_name_or_a_row_of_the_table() -> None:
    _, table = (ROOT / "tests" / "README.md").read_text().split("## Modules without a test file of their name")
    without = {
        file: module_of(package, file)
        for package, file in FILES
        if not file.name.startswith("__") and not own_test(package, file).is_file()
    }
    told, named = set[Path](), set().union(*map(names_in, TEST_FILES))
    for left, right in re.findall(r"^\| (`.*`) \| (`.*`|none) \|$", table, re.MULTILINE):
        tests = [ROOT / name for name in re.findall(r"`(.*?)`", right)]
        for name in re.findall(r"`(.*?)`", left):
            place = ROOT / name
            files = {file for file in without if place == file or (place in file.parents and file not in told)}
            assert files, f"{name} is not there, has a test file of its name, or has two rows"
            told |= files
            modules = {without[file] for file in files}
            assert tests or not modules & named, f"a test names {name}"
            for test in tests:
                assert test.exists(), f"{test} is not there"
                reached = map(reached_by, [test] if test.is_file() else test.rglob("test_*.py"))
                assert modules & set().union(*reached), f"{test} imports neither {name} nor what imports it"
    missing = sorted(str(file.relative_to(ROOT)) for file in without if file not in told)
    assert not missing, f"tests/README.md has no row for {missing}"


@cache
def fixtures_of(file: Path) -> set[str]:
    return set(re.findall(r"^@pytest\.fixture.*\n(?:[@\s)\]].*\n)*def (\w+)", file.read_text(), re.MULTILINE))


def test_a_fixture_has_one_meaning_below_its_folder() -> None:
    for file in TEST_FILES:
        for folder in file.parents:
            if (above := folder / "conftest.py").is_file() and above != file:
                again = fixtures_of(file) & fixtures_of(above)
                assert not again, f"{file}: {again} are other fixtures of {above}"


def test_names_of_tests_can_be_read_at_once() -> None:
    for file in TEST_FILES:
        long = [name for name in re.findall(r"^\s*def (test_\w+)", file.read_text(), re.MULTILINE) if len(name) > 70]
        assert not long, f"{file}: names of tests have at most 70 characters"

"""Judge the suite by planted faults: a fixed sample of mutants of the code, each against the tests of its room.

    python tests/promises/mutants.py                                     those without a result, tests of `make test`
    python tests/promises/mutants.py --redraw                            and new mutants for functions that changed
    python tests/promises/mutants.py --lane extended                     survivors, the other tests of `make test-all`
    python tests/promises/mutants.py --tree OLD --lane all --column old  survivors, in another checkout

The operators are those of Cosmic Ray (`pip install cosmic-ray`): another operator, comparison or number, a condition
turned round, a loop that never runs, and so on. A mutant lies in the body of a function, outside annotations and
messages of errors. It is killed if a test fails within `SECONDS` of processor time. One that lets tests run for longer
lives. The table's column `why` is written by hand, and says why a survivor may live.

Every mutant is tried in a fork of this process, which has imported torch and pytest but nothing of ours, in a copy of
the tree. A run that is stopped goes on where it was.
"""

import argparse
import ast
import csv
import hashlib
import importlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_suffix(".csv")
SECONDS = 30
"""Processor time of a mutant's tests, without collecting them."""
COLLECTING = 20
"""Processor time that importing and collecting may take on top."""
PATHS = (".", "kernels", "dataloading", "benchmarks")
IMPORTED = (
    "numpy", "scipy.stats", "PIL.Image", "torch._dynamo", "torch.distributed.tensor", "triton", "tokenizers",
    "safetensors.torch", "nvidia.dali", "transformers", "timm", "pytest",
)  # fmt: skip
"""What all tests import, once in place of every fork: nothing of ours, and nothing that starts threads."""
LANES = {"test": "not gpu and not extended", "extended": "extended and not gpu", "all": "not gpu"}
ROOMS = {
    "mvlm/model": ["tests/mvlm/model", "tests/mvlm/distributed/test_global_batch.py", "tests/promises/test_overfit.py"],
    "mvlm/objectives": ["tests/mvlm/objectives", "tests/mvlm/model/test_fast.py", "tests/mvlm/distributed"],
    "dataloading/mvlm_dataloading/loader": ["tests/dataloading/loader"],
    "kernels/mvlm_kernels": ["tests/kernels"],
    "mvlm/runs": ["tests/mvlm/runs", "tests/mvlm/training"],
    "mvlm/statistics.py": ["tests/mvlm/test_statistics.py", "tests/mvlm/studies", "tests/mvlm/evaluation"],
    "mvlm/studies": ["tests/mvlm/studies"],
}
"""What is mutated, and the tests that should notice. The test file of a module's own name comes first."""


class Mutant(NamedTuple):
    """One change of one function. `function` is a hash of the function's code, which finds it in another checkout."""

    file: str
    name: str
    function: str
    operator: str
    occurrence: int
    line: str


def room_of(file: str) -> str:
    return next(room for room in ROOMS if file.startswith(room))


def sources(tree: Path) -> dict[str, str]:
    """The files that are mutated, by their path in the tree. Of the kernels, the references and the routes on a CPU."""
    found = {}
    for room in ROOMS:
        for file in [tree / room] if room.endswith(".py") else sorted((tree / room).rglob("*.py")):
            if "mvlm_kernels" not in room or file.name in ("reference.py", "cpu.py"):
                found[str(file.relative_to(tree))] = file.read_text()
    return found


def functions(source: str) -> Iterator[tuple[str, int, int, str]]:
    """Name, first and last line and text of each outermost function and method."""
    lines = source.splitlines(keepends=True)

    def visit(node: ast.AST, prefix: str) -> Iterator[tuple[str, int, int, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                assert child.end_lineno
                text = "".join(lines[child.lineno - 1 : child.end_lineno])
                yield prefix + child.name, child.lineno, child.end_lineno, text
            elif isinstance(child, ast.ClassDef):
                yield from visit(child, f"{prefix}{child.name}.")

    yield from visit(ast.parse(source), "")


def dedented(text: str) -> str:
    indent = len(text) - len(text.lstrip())
    # Lines of strings may stand further left than the function.
    return "".join(line[min(indent, len(line) - len(line.lstrip())) :] for line in text.splitlines(keepends=True))


def hash_of(text: str) -> str:
    """Hash of a function's code, which its docstring, comments and layout do not change."""
    function = ast.parse(dedented(text)).body[0]
    assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
    if ast.get_docstring(function) is not None:
        del function.body[0]
    return hashlib.sha256(ast.unparse(function).encode()).hexdigest()[:16]


def lines_of(node: ast.stmt) -> set[int]:
    return set(range(node.lineno, (node.end_lineno or node.lineno) + 1))


def mutable_lines(text: str) -> set[int]:
    """Lines of a function's body, counted from 1, that are no signature, docstring, annotation, raise or assert."""
    function = ast.parse(dedented(text)).body[0]
    assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
    found = {line for statement in function.body for line in lines_of(statement)}
    for node in ast.walk(function):
        if isinstance(node, ast.FunctionDef) and node is not function:
            found -= {node.lineno}
        elif isinstance(node, ast.Raise | ast.Assert | ast.AnnAssign) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            found -= lines_of(node)
    return found


def cosmic_ray(module: str) -> Any:
    """A module of Cosmic Ray, which this script alone needs."""
    return importlib.import_module(f"cosmic_ray.{module}")


def mutants_of(text: str) -> dict[int, list[tuple[str, int]]]:
    """Operators and occurrences that change a function's text, by line counted from 1."""

    def walk(node: Any) -> Iterator[Any]:
        yield node
        for child in getattr(node, "children", ()):
            yield from walk(child)

    allowed, tree = mutable_lines(text), cosmic_ray("ast").get_ast(dedented(text))
    found: dict[int, list[tuple[str, int]]] = {}
    for name in cosmic_ray("plugins").operator_names():
        operator = cosmic_ray("plugins").get_operator(name)
        if operator.arguments() or name.endswith(("NoOp", "RemoveDecorator", "ExceptionReplacer")):
            continue
        places = [line for node in walk(tree) for (line, _), _ in operator().mutation_positions(node)]
        for occurrence, line in enumerate(places):
            if line in allowed:
                found.setdefault(line, []).append((name, occurrence))
    return found


def mutated(text: str, operator: str, occurrence: int) -> str | None:
    """A function's text with one mutation; None if it changes nothing."""
    chosen = cosmic_ray("plugins").get_operator(operator)()
    changed = cosmic_ray("mutating").mutate_code(dedented(text), chosen, occurrence)
    if changed is None or changed == dedented(text):
        return None
    indent = text[: len(text) - len(text.lstrip())]
    return "".join(indent + line if line.strip() else line for line in changed.splitlines(keepends=True))


def draw(tree: Path, count: int) -> list[Mutant]:
    """`count` mutants, about as many of each room: lines by chance, and of each a random operator."""
    by_room: dict[str, list[Mutant]] = {}
    chance = random.Random(0)
    for file, source in sources(tree).items():
        for name, _, _, text in functions(source):
            for line, choices in sorted(mutants_of(text).items()):
                shown = text.splitlines()[line - 1].strip()
                mutant = Mutant(file, name, hash_of(text), *chance.choice(choices), shown)
                by_room.setdefault(room_of(file), []).append(mutant)
    drawn: list[Mutant] = []
    for behind, all_of in enumerate(sorted(by_room.values(), key=len)):
        share = (count - len(drawn)) // (len(by_room) - behind)
        drawn += chance.sample(all_of, min(share, len(all_of)))
    return drawn


def with_redrawn(rows: list[dict[str, Any]], tree: Path) -> list[dict[str, Any]]:
    """Rows of a table; those of functions that are no longer in the tree give way to new mutants of their rooms."""
    present = {hash_of(text) for source in sources(tree).values() for *_, text in functions(source)}
    kept = [row for row in rows if row["function"] in present]
    known = {(row["function"], row["line"]) for row in kept}
    free: dict[str, list[Mutant]] = {}
    for mutant in draw(tree, 10 * len(rows)):
        if (mutant.function, mutant.line) not in known:
            free.setdefault(room_of(mutant.file), []).append(mutant)
    gone = Counter(room_of(row["file"]) for row in rows if row["function"] not in present)
    return kept + [row_of(mutant) for room, count in gone.items() for mutant in free.get(room, [])[:count]]


def row_of(mutant: Mutant) -> dict[str, Any]:
    return {**mutant._asdict(), "test": "", "why": ""}


def place(tree: Path, mutant: Mutant) -> tuple[Path, str] | None:
    """The file that holds the mutant's function in a tree, and its text with the mutation; None if there is none."""
    for file, source in sources(tree).items():
        lines = source.splitlines(keepends=True)
        for _, first, last, text in functions(source):
            if hash_of(text) == mutant.function and (changed := mutated(text, mutant.operator, mutant.occurrence)):
                return Path(file), "".join(lines[: first - 1]) + changed + "".join(lines[last:])
    return None


def tests_of(tree: Path, file: Path) -> list[str]:
    """Paths of tests for a mutated file, those of its own name first."""
    folders = [name for name in ROOMS[room_of(str(file))] if (tree / name).exists()]
    own = Path("tests/kernels", file.parent.name)
    if file.parts[0] == "kernels" and (tree / own).is_dir():
        folders = [str(own), "tests/kernels/test_ops.py"]
    named = [path for folder in folders for path in (tree / folder).rglob(f"test_{file.stem}.py")]
    first = [str(path.relative_to(tree)) for path in named]
    return [*first, *(name for name in folders if name not in first)]


def run_tests(tree: Path, paths: list[str], lane: str, log: Path) -> int:
    """Exit code of the tests of a tree, which run in a fork; below 0 the number of a signal."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    import pytest

    code = 70
    try:
        os.chdir(tree)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ["PYTHONPATH"] = os.pathsep.join(str(tree / path) for path in PATHS)
        sys.path[:0] = [str(tree / path) for path in PATHS]
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS + COLLECTING, SECONDS + COLLECTING))
        signal.alarm(8 * (SECONDS + COLLECTING))  # tests may wait for ever
        words = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", LANES[lane]]
        code = pytest.main([*words, "-W", "ignore::pytest.PytestAssertRewriteWarning", *paths])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(code))


def judge(tree: Path, mutant: Mutant, lane: str, log: Path) -> str:
    """What became of a mutant: "killed by TEST", "lives", "lives, time is up", "no tests" or "not there"."""
    found = place(tree, mutant)
    if found is None:
        return "not there"
    file, text = found
    before = (tree / file).read_text()
    (tree / file).write_text(text)
    code = run_tests(tree, tests_of(tree, file), lane, log)
    (tree / file).write_text(before)
    if code in (0, 5, -signal.SIGKILL, -signal.SIGALRM):
        return {0: "lives", 5: "no tests"}.get(code, "lives, time is up")
    failed = re.search(r"^(?:FAILED|ERROR) ([^\s\[]+)", log.read_text(errors="replace"), re.MULTILINE)
    return f"killed by {failed[1] if failed else 'the end of the process'}"


def copy_tree(tree: Path, into: Path) -> None:
    """Copy the files that git knows in a checkout."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=tree, capture_output=True, check=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (tree / name).is_file():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(tree / name, into / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout whose tests are judged")
    parser.add_argument("--count", type=int, default=300, help="mutants of a new table")
    parser.add_argument("--redraw", action="store_true", help="replace rows of functions that have changed or gone")
    parser.add_argument("--lane", choices=LANES, default="test")
    parser.add_argument("--column", help="the table's column that is written; the lane's name by default")
    parser.add_argument("--table", type=Path, default=TABLE, help="mutants and results; one that is new is drawn")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "TRITON_INTERPRET": "1"}
    for name in IMPORTED:
        importlib.import_module(name)
    if options.table.exists():
        rows: list[dict[str, Any]] = list(csv.DictReader(options.table.open()))
    else:
        rows = [row_of(mutant) for mutant in draw(options.tree, options.count)]
    if options.redraw:
        rows = with_redrawn(rows, options.tree)
    column = options.column or options.lane
    fields = [*Mutant._fields, *sorted({*rows[0], column} - {*Mutant._fields, "why"}), "why"]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy_tree(options.tree, Path(folder, "tree"))
        for number, row in enumerate(rows):
            if row.get(column) or (column != "test" and not row["test"].startswith("lives")):
                continue
            mutant = Mutant(*(row[field] for field in Mutant._fields))._replace(occurrence=int(row["occurrence"]))
            row[column] = judge(Path(folder, "tree"), mutant, options.lane, Path(folder, "log"))
            print(f"{number:4d} {row[column]:18s} {mutant.file} {mutant.name}: {mutant.line}", flush=True)
            with options.table.open("w", newline="") as file:
                writer = csv.DictWriter(file, fields, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
    print(f"{sum((row.get(column) or '').startswith('killed') for row in rows)} of {len(rows)} killed")


if __name__ == "__main__":
    main()

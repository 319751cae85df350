"""Rules of the code itself, read from its text."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
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

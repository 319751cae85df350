"""Downstream tasks: what a pretrained model is fine-tuned for, and how its answers are judged.

A file of this folder with a subclass of `Task` that has a `name`, as `name = "entailment"`, is a task, and the file's
name is the task's. `mvlm finetune NAME`, `mvlm eval NAME`, its report and its files of predictions follow from that one
file.
"""

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

from mvlm.errors import ConfigError


@cache
def task_names() -> tuple[str, ...]:
    """Names of the tasks of the library. Their files are read and not imported, because torch takes seconds."""
    files = sorted(file for folder in __path__ for file in Path(folder).glob("*.py"))
    return tuple(f.stem for f in files if re.search(r'^    name = "', f.read_text(encoding="utf-8"), re.M))


def stated(task: str, name: str) -> dict[str, Any]:
    """Value of a class attribute that a task's file annotates and sets, such as `recipe: ClassVar = {"flip": 0.5}`.

    The file is parsed and not run. Returns an empty dict if no class of it sets the attribute. Raises ConfigError if
    the dict has values other than literals.

    Args:
        task: the task's name, or the path of its Python file.
        name: name of the attribute.
    """
    places = [Path(task)] if task.endswith(".py") else [Path(folder, f"{task}.py") for folder in __path__]
    text = next((file.read_text(encoding="utf-8") for file in places if file.is_file()), "")
    for kind in ast.parse(text).body if name in text else ():
        for node in kind.body if isinstance(kind, ast.ClassDef) else ():
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name and node.value is not None:
                try:
                    return ast.literal_eval(node.value)
                except ValueError:
                    raise ConfigError(f"{task}: wanted {name} as a dict of literals; write its values out") from None
    return {}

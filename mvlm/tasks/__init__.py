"""Downstream tasks: what a pretrained model is fine-tuned for, and how its answers are judged.

A file of this folder with a subclass of `Task` that has a `name`, as `name = "entailment"`, is a task, and the file's
name is the task's. `mvlm finetune NAME`, `mvlm eval NAME`, its report and its files of predictions follow from that one
file.
"""

import re
from functools import cache
from pathlib import Path


@cache
def task_names() -> tuple[str, ...]:
    """Names of the tasks of the library. Their files are read and not imported, because torch takes seconds."""
    files = sorted(file for folder in __path__ for file in Path(folder).glob("*.py"))
    return tuple(f.stem for f in files if re.search(r'^    name = "', f.read_text(encoding="utf-8"), re.M))

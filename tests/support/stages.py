"""Stages of `benchmarks/gpu_run.py`, rehearsed in a test's own process."""

import json
from pathlib import Path
from typing import Any

from mvlm_benchmarks.gpu.stage import running


def run_stage(module: Any, out: Path, seconds: float = 600.0) -> tuple[int, dict[str, Any]]:
    """Exit code and summary of a stage that is rehearsed in this process."""
    name = module.__name__.rsplit(".", 1)[1]
    code = 0
    try:
        with running(name, out, seconds, rehearse=True) as stage:
            module.run(stage)
    except SystemExit as end:
        code = int(end.code or 0)
    return code, json.loads((out / f"{name}.json").read_text())

"""Golden losses: 30 steps of `tiny` on the committed images give the committed losses, on every machine.

A change that moves them has changed the mathematics, the order of samples, a mask, a draw or the initialization. Their
last digits depend on the processor and on the packages that compute, so here they are compared within a thousandth. To
the digit they are compared with another commit, on the same machine:

    python tests/promises/test_golden.py --against COMMIT

If a change is meant to move them (a new recipe for `tiny`, another torch, other data), renew them and say why in the
commit:

    python tests/promises/test_golden.py --renew
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # as a script

from support.shapes import copy_shapes

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden_losses.json"
LOSSES = ("mlm", "mim", "itc", "itm")
STEPS = 30
FLAGS = (
    f"--max-steps {STEPS} --warmup-steps 5 --batch-size 8 --optimizer adamw --log-every 1 --device cpu --precision fp32"
)


def run(folder: Path, tree: Path = ROOT) -> list[list[float]]:
    """The four losses of each step, (30, 4), in fp32 on one thread of the CPU, by the code in `tree`."""
    packages = [str(tree), *(str(tree / name) for name in ("kernels", "dataloading", "benchmarks"))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(packages), "OMP_NUM_THREADS": "1"}
    places = ("--data", copy_shapes(folder / "data"), "--out", folder / "run")
    command = ["-m", "mvlm", "pretrain", "tiny", *map(str, places), *FLAGS.split()]
    subprocess.run([sys.executable, *command], env=environment, cwd=folder, check=True, capture_output=True)
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [[row[name] for name in LOSSES] for row in rows]


def release(version: str) -> tuple[int, ...]:
    """ "2.13.0+cpu" -> (2, 13)."""
    return tuple(map(int, version.split(".")[:2]))


@pytest.mark.extended
@pytest.mark.slow
def test_golden_losses(tmp_path):
    golden: dict[str, Any] = json.loads(GOLDEN.read_text())
    if release(golden["torch"]) < (2, 13) or release(torch.__version__) < (2, 13):
        pytest.skip("before torch 2.13 trunc_normal_ draws other weights from the same seed")
    losses = run(tmp_path)
    assert len(losses) == len(golden["losses"]) == STEPS
    for step, (mine, wanted) in enumerate(zip(losses, golden["losses"], strict=True), 1):
        assert mine == pytest.approx(wanted, rel=1e-3), f"step {step}"


def against(commit: str) -> None:
    """Exit with 1 if the losses of a commit and those of this checkout differ in any digit."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "now").mkdir()
        (folder / "then").mkdir()
        subprocess.run(["git", "worktree", "add", "--detach", folder / "tree", commit], cwd=ROOT, check=True)
        try:
            now, then = run(folder / "now"), run(folder / "then", folder / "tree")
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", folder / "tree"], cwd=ROOT, check=True)
    different = [step for step, (a, b) in enumerate(zip(now, then, strict=True), 1) if a != b]
    if different:
        sys.exit(f"the losses differ from those of {commit}, first at step {different[0]}: {now[different[0] - 1]}")
    print(f"{STEPS} steps: every loss is that of {commit}, to the digit")


def renew() -> None:
    with tempfile.TemporaryDirectory() as folder:
        losses = run(Path(folder))
    rows = ",\n  ".join(json.dumps(row) for row in losses)
    about = json.dumps({"torch": torch.__version__, "names": LOSSES}, indent=1)[:-2]
    GOLDEN.write_text(f'{about},\n "losses": [\n  {rows}\n ]\n}}\n')


if __name__ == "__main__":
    if sys.argv[1:2] == ["--against"] and len(sys.argv) == 3:
        against(sys.argv[2])
    elif sys.argv[1:] == ["--renew"]:
        renew()
    else:
        sys.exit(__doc__)

"""The plugin that proves other people's kernels: its example passes, and planted bugs are found."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parents[1]
EXAMPLES = TESTS / "proof_kit" / "examples"
PROOFS = ("interpreted", "sm_90")
PLANTED = {  # a line of the kernel or its launcher, what it becomes, and what each proof says
    "load without a mask": ("mask=inside, other=-float", "mask=column >= 0, other=-float", ("assert", "out-of-bounds")),
    "store without a mask": ("element_ty), mask=inside)", "element_ty))", ("wrote", "out-of-bounds")),
    "a row forgotten": ("[(rows,)]", "[(rows - 1,)]", ("assert", "assert")),
    "rows that overlap": ("row * width + column, y", "row * (width - 1) + column, y", ("assert", "global-race")),
}


def run(proof: str, folder: Path, package: str, test: Path, *options: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), str(TESTS), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "-p", "proof_kit.plugin", "-p", "no:cacheprovider"]
    command += ["--proof", proof, "--of", package, "-q", "--tb=short", *options, str(test)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)


@pytest.mark.parametrize("proof", PROOFS)
def test_softmax_of_tutorials_is_proved(proof: str, tmp_path: Path) -> None:
    done = run(proof, tmp_path, "proof_kit.examples", EXAMPLES / "test_row_softmax.py")
    assert "11 passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]
    assert ("row_softmax_kernel" in done.stdout) == (proof != "interpreted")


@pytest.mark.parametrize("proof", PROOFS)
def test_planted_bugs_are_found(proof: str, tmp_path: Path) -> None:
    """Each bug in a module of its own, all proved by one process."""
    source, test = (EXAMPLES / "row_softmax.py").read_text(), (EXAMPLES / "test_row_softmax.py").read_text()
    (tmp_path / "planted").mkdir()
    for number, (old, new, _) in enumerate(PLANTED.values()):
        assert source.count(old) == 1
        (tmp_path / "planted" / f"bug_{number}.py").write_text(source.replace(old, new))
        renamed = test.replace("proof_kit.examples.row_softmax", f"planted.bug_{number}")
        (tmp_path / f"test_bug_{number}.py").write_text(renamed)
    report = tmp_path / "report.xml"
    done = run(proof, tmp_path, "planted", tmp_path, "-k", "test_values and 1000", f"--junitxml={report}")
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-1000:]
    cases = {case.get("classname"): "".join(case.itertext()) for case in ElementTree.parse(report).iter("testcase")}
    for number, (bug, (_, _, says)) in enumerate(PLANTED.items()):
        assert says[PROOFS.index(proof)] in cases[f"test_bug_{number}"], bug

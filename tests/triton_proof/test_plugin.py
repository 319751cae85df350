"""The plugin that proves other people's kernels: its example passes, and planted bugs are found."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[2] / "examples" / "proofs"
PROOFS = ("interpreted", "sm_90")
PLANTED = {  # a line of the kernel or its launcher, what it becomes, and what each proof says
    "load without a mask": ("mask=inside, other=-float", "mask=column >= 0, other=-float", ("assert", "out-of-bounds")),
    "store without a mask": ("element_ty), mask=inside)", "element_ty))", ("out-of-bounds", "out-of-bounds")),
    "a row forgotten": ("[(rows,)]", "[(rows - 1,)]", ("assert", "assert")),
    "rows that overlap": ("row * width + column, y", "row * (width - 1) + column, y", ("assert", "global-race")),
}
# Tests of a stranger's package in the folder that pytest is started in.
TUNED = """
import pytest, torch, triton
import triton.language as tl

@triton.autotune([triton.Config({"BLOCK": n}, num_warps=w) for n, w in ((32, 1), (64, 2), (128, 4))], key=["n"])
@triton.jit
def double(x, out, n, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) * (3.0 if BLOCK > LIMIT else 2.0), mask=i < n)

def run(x, limit):
    out = torch.empty_like(x)
    double[lambda meta: (triton.cdiv(len(x), meta["BLOCK"]),)](x, out, len(x), limit)
    return out

@pytest.mark.parametrize("limit", [128, 64])
def test_each_configuration(limit):
    x = torch.randn(100)
    assert torch.equal(run(x, limit), 2 * x)
"""
STRANGE = """
import pytest, torch, triton
import triton.language as tl

@triton.jit
def past(out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, i, mask=i < n + 2)

def test_past_a_buffer():
    for _ in range(3):
        past[(1,)](torch.empty(14, dtype=torch.int32), 14, BLOCK=16)

@pytest.mark.finding("out-of-bounds")
def test_known():
    past[(1,)](torch.empty(14, dtype=torch.int32), 14, BLOCK=16)

def test_needs_cuda():
    assert torch.empty(3).is_cuda
"""


# One kernel is right; the other takes the width for the stride of its second input. All inputs are contiguous.
NARROW = """
import pytest, torch, triton
import triton.language as tl

def product(of):
    @triton.jit
    def right(x, y, out, xs, ys, n, BLOCK: tl.constexpr):
        row, i = tl.program_id(0), tl.arange(0, BLOCK)
        a = tl.load(x + row * xs + i, mask=i < n) * tl.load(y + row * ys + i, mask=i < n)
        tl.store(out + row * n + i, a, mask=i < n)

    @triton.jit
    def wrong(x, y, out, xs, ys, n, BLOCK: tl.constexpr):
        row, i = tl.program_id(0), tl.arange(0, BLOCK)
        a = tl.load(x + row * xs + i, mask=i < n) * tl.load(y + row * n + i, mask=i < n)
        tl.store(out + row * n + i, a, mask=i < n)

    def call(x, y):
        out, (rows, n) = torch.empty(x.shape), x.shape
        kernel = right if of == "right" else wrong
        kernel[(rows,)](x, y, out, x.stride(0), y.stride(0), n, BLOCK=triton.next_power_of_2(n))
        return out
    return call

@pytest.mark.parametrize("of", ["right", "wrong"])
@pytest.mark.parametrize("n", [16, 64])
def test_random(of, n):
    x, y = torch.randn(3, n), torch.randn(3, n)
    torch.testing.assert_close(product(of)(x, y), x * y)

@pytest.mark.parametrize("of", ["right", "wrong"])
def test_guarded(of, proof):
    x, y = (proof.guarded(torch.randn(3, 8).double().float()) for _ in range(2))
    torch.testing.assert_close(product(of)(x, y), x * y)
"""


def run(proof: str, folder: Path, *options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "triton_proof", "--proof", proof, "-c", os.devnull, "-p", "no:cacheprovider"]
    command += ["-q", "--tb=short", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


def failures(report: Path) -> dict[str, str]:
    """What each test said, by name, from a report in JUnit's XML."""
    cases = ElementTree.parse(report).iter("testcase")
    return {f"{case.get('classname')}::{case.get('name')}": "".join(case.itertext()).strip() for case in cases}


@pytest.mark.extended
@pytest.mark.parametrize("proof", PROOFS)
def test_softmax_of_tutorials_is_proved(proof: str) -> None:
    done = run(proof, EXAMPLES, "test_row_softmax.py")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "11 passed" in done.stdout
    assert ("row_softmax_kernel" in done.stdout) == (proof != "interpreted")


@pytest.mark.parametrize("proof", PROOFS)
def test_planted_bugs_are_found(proof: str, tmp_path: Path) -> None:
    """Each bug in a module of its own, all proved by one process."""
    source, test = (EXAMPLES / "row_softmax.py").read_text(), (EXAMPLES / "test_row_softmax.py").read_text()
    (tmp_path / "planted").mkdir()
    for number, (old, new, _) in enumerate(PLANTED.values()):
        assert source.count(old) == 1
        (tmp_path / "planted" / f"bug_{number}.py").write_text(source.replace(old, new))
        renamed = test.replace("from row_softmax import", f"from planted.bug_{number} import")
        (tmp_path / f"test_bug_{number}.py").write_text(renamed)
    report = tmp_path / "report.xml"
    done = run(proof, tmp_path, ".", "-k", "test_values and 1000", f"--junitxml={report}")
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-1000:]
    found = failures(report)
    for number, (bug, (_, _, says)) in enumerate(PLANTED.items()):
        text = "".join(text for name, text in found.items() if name.startswith(f"test_bug_{number}:"))
        assert says[PROOFS.index(proof)] in text, bug


@pytest.mark.parametrize("proof", [pytest.param("interpreted", marks=pytest.mark.extended), "sm_90"])
def test_each_configuration_of_an_autotuned_kernel_is_proved(proof: str, tmp_path: Path) -> None:
    """The kernel is wrong in its third configuration alone."""
    (tmp_path / "test_tuned.py").write_text(TUNED)
    report = tmp_path / "report.xml"
    run(proof, tmp_path, "test_tuned.py", f"--junitxml={report}")
    found = failures(report)
    assert not found["test_tuned::test_each_configuration[128]"]
    assert "BLOCK: 128" in found["test_tuned::test_each_configuration[64]"]


@pytest.mark.parametrize("proof", [pytest.param("interpreted", marks=pytest.mark.extended), "sm_90"])
def test_findings_are_told_once_with_a_remedy(proof: str, tmp_path: Path) -> None:
    (tmp_path / "test_strange.py").write_text(STRANGE)
    report = tmp_path / "report.xml"
    done = run(proof, tmp_path, "test_strange.py", f"--junitxml={report}")
    assert "2 failed, 1 passed" in done.stdout, done.stdout
    found = failures(report)
    told = found["test_strange::test_past_a_buffer"]
    assert told.count("out-of-bounds") == 1
    assert all(words in told for words in ("past", "3 launches", "mask=")), told
    assert "plugin.py" not in done.stdout
    assert "CPU tensors" in found["test_strange::test_needs_cuda"]


@pytest.mark.parametrize("proof", [pytest.param("interpreted", marks=pytest.mark.extended), "sm_90"])
def test_what_tests_do_not_tell_apart_is_hinted_at_and_varied(proof: str, tmp_path: Path) -> None:
    (tmp_path / "test_narrow.py").write_text(NARROW)
    done, report = run(proof, tmp_path, "test_narrow.py"), tmp_path / "report.xml"
    assert "6 passed" in done.stdout, done.stdout
    hints = [line for line in done.stdout.splitlines() if line.startswith("hint: right: ")]
    words = [["`xs`, `ys`, `n`", "equal"], ["`xs`, `ys`, `n`", "even"], ["no lane was masked at test_narrow.py:"]]
    assert len(hints) == (0 if proof == "interpreted" else 3)
    assert all(word in hint for hint, wanted in zip(hints, words, strict=False) for word in wanted), hints

    done = run(proof, tmp_path, "test_narrow.py", "--vary", "strides,sizes", f"--junitxml={report}")
    found = failures(report)
    assert {name for name, text in found.items() if text} == {name for name in found if "wrong" in name}
    assert all("in the variant strides" in text for text in found.values() if text)
    assert "hint: right" not in done.stdout, done.stdout
    refused = run(proof, tmp_path, "test_narrow.py", "--vary", "stride")
    assert "--vary: wanted strides or sizes" in refused.stdout + refused.stderr

"""Prove five kernels that other people wrote, and the same with a bug planted in each; print a table.

    pip install '.[proof]' && pip install --no-deps liger-kernel==0.8.5 fla-core==0.6.0 einops
    python examples/proofs/gallery.py [--page docs/guides/prove_your_kernel.md]

`make proof-gallery` does all of it in an environment of its own.
"""

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

FOLDER = Path(__file__).parent
PROOFS = ("interpreted", "sm_80", "sm_90")
MARKS = ("<!-- gallery -->", "<!-- end of gallery -->")


class Exhibit(NamedTuple):
    """A kernel by its test, what is known of it, and a bug: ``old`` becomes ``new`` in ``module``."""

    kernel: str
    package: str
    test: str
    known: str
    module: str
    old: str
    new: str
    bug: str


EXHIBITS = (
    Exhibit(
        "RMSNorm", "liger-kernel", "test_liger_rms_norm", "`reduction-bits` at 128 columns",
        "liger_kernel/ops/rms_norm.py",
        "X_row = tl.load(x_base + col_offsets, mask=mask, other=0)", "X_row = tl.load(x_base + col_offsets)",
        "a load without its mask",
    ),
    Exhibit(
        "SwiGLU", "liger-kernel", "test_liger_swiglu", "", "liger_kernel/ops/swiglu.py",
        "c_ptr += program_id * stride", "c_ptr += program_id * (stride - 1)", "rows that overlap by one column",
    ),
    Exhibit(
        "cross-entropy", "liger-kernel", "test_liger_cross_entropy", "`race` below the block, harmless",
        "liger_kernel/ops/cross_entropy.py", "X_block, mask=X_offsets < n_cols", "X_block, mask=X_offsets <= n_cols",
        "a mask one column too wide",
    ),
    Exhibit(
        "softmax", "fla-core", "test_fla_softmax", "`reduction-bits` in the backward pass", "fla/ops/utils/softmax.py",
        "b_p.to(p.dtype.element_ty), mask=m_d)", "b_p.to(p.dtype.element_ty))", "a store without its mask",
    ),
    Exhibit(
        "cumulative sum", "fla-core", "test_fla_cumulative_sum", "", "fla/ops/utils/cumsum.py",
        "    m_t = o_t < T\n", "    m_t = o_t < T - 1\n", "a last step that nobody writes",
    ),
)  # fmt: skip


def prove(exhibit: Exhibit, proof: str, packages: Path | None) -> list[str]:
    """Run an exhibit's test under one proof, and return the texts of its failures, or ["skipped"] if all is skipped.

    packages: folder that comes before the installed packages.
    """
    path = os.pathsep.join(str(x) for x in (packages, os.environ.get("PYTHONPATH")) if x)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "triton_proof", "--proof", proof, "test_gallery.py", "-k", exhibit.test]
        command += ["-c", os.devnull, "-p", "no:cacheprovider", "-W", "ignore", f"--junitxml={report}"]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=FOLDER, env=os.environ | {"PYTHONPATH": path}, check=False
        )
        if done.returncode not in (0, 1):
            sys.exit(done.stdout + done.stderr)
        cases = list(ElementTree.parse(report).iter("testcase"))
    if all(case.find("skipped") is not None for case in cases):
        return ["skipped"]
    return ["".join(case.itertext()) for case in cases if case.find("failure") is not None]


def planted(exhibit: Exhibit, folder: Path) -> Path:
    """A copy of the exhibit's package with the bug, in a folder for PYTHONPATH."""
    name = exhibit.module.split("/")[0]
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    shutil.copytree(Path(spec.origin).parent, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    module = folder / exhibit.module
    source = module.read_text()
    assert exhibit.old in source, f"{exhibit.package} is another version"
    module.write_text(source.replace(exhibit.old, exhibit.new, 1))
    return folder


def verdict(said: list[str]) -> str:
    """A cell of the table: what the failures are, with the lines of the source."""
    if said == ["skipped"]:
        return "refused"
    if not said:
        return "passes"
    found = sorted({kind for text in said for kind in re.findall(r"^(?:E +)?([a-z-]+): \w+: ", text, re.MULTILINE)})
    at = re.compile(r"^E? +at (?:.* < )?(\S+:\d+)", re.MULTILINE)
    places = sorted({place for text in said for place in at.findall(text)})
    kinds = ", ".join(f"`{kind}`" for kind in found) or "wrong values"
    return f"{kinds} at {places[0]}" if places else kinds


def row(exhibit: Exhibit) -> str:
    version = importlib.metadata.version(exhibit.package)
    cells = [exhibit.kernel, f"{exhibit.package} {version}"]
    cells.append("; ".join(dict.fromkeys(verdict(prove(exhibit, proof, None)) for proof in PROOFS)))
    cells += [exhibit.known or "nothing", exhibit.bug]
    with tempfile.TemporaryDirectory() as folder:
        packages = planted(exhibit, Path(folder))
        cells += [verdict(prove(exhibit, proof, packages)) for proof in PROOFS]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--page", type=Path, help="a Markdown file whose table is replaced")
    page = parser.parse_args().page
    columns = ("kernel", "package", "as it is", "known", "planted bug", *(f"found, {proof}" for proof in PROOFS))
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    print("\n".join(lines), flush=True)
    for exhibit in EXHIBITS:
        lines.append(row(exhibit))
        print(lines[-1], flush=True)
    if page is not None:
        before, _, rest = page.read_text().partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        page.write_text("\n".join([before + MARKS[0], "", *lines, "", MARKS[1] + after]))


if __name__ == "__main__":
    main()

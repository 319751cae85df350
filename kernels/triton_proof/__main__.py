"""``python -m triton_proof TEST...``: tests of Triton kernels under one proof after the other."""

import argparse
import os
import subprocess
import sys
from importlib.util import find_spec

PROOFS = ("interpreted", "sm_80", "sm_90")


def main() -> int:
    """The worst exit status of pytest: 0 if every test passes under every proof."""
    parser = argparse.ArgumentParser(
        prog="python -m triton_proof",
        description="Run tests of Triton kernels on a CPU: interpreted, and emulated as compiled for two GPUs.",
        usage="python -m triton_proof [--proof {interpreted,sm_80,sm_90}] [--vary strides,sizes] TEST [TEST ...] "
        "[OPTION OF PYTEST ...]",
        epilog="A TEST is a file, FILE::test or a folder. All but these options goes to pytest, such as -k, -x and -q.",
    )
    parser.add_argument("--proof", action="append", choices=PROOFS, help="this proof alone; may be given twice")
    parser.add_argument(
        "--vary", metavar="strides,sizes",
        help="run each test again on rows that lie apart (strides), on even parameters plus 1 (sizes), or on both",
    )  # fmt: skip
    options, others = parser.parse_known_args()
    if not others:
        parser.error("no test is named: give a file, FILE::test or a folder")
    if find_spec("pytest") is None:
        parser.error("pytest is not installed: pip install 'mvlm[proof]'")
    # Triton decides at import whether it interprets, so each proof has a process, and the plugin says which it is.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    worst = 0
    for proof in options.proof or PROOFS:
        print(f"proof {proof}", flush=True)
        command = [sys.executable, "-m", "pytest", "-p", "triton_proof.plugin", "--proof", proof, *others]
        if options.vary:
            command += ["--vary", options.vary]
        worst = max(worst, subprocess.run(command, env=environment, check=False).returncode)
    return worst


if __name__ == "__main__":
    sys.exit(main())

"""Run one stage of the measurements on a GPU: `python benchmarks/gpu_run.py STAGE [--seconds N] [--out FOLDER]`.

Each takes less than ten minutes, and stops itself at its budget; `first` has what is worth most of all of them. Only
torch and Triton are needed; what else is missing is named in the results. Rows are on the disk as soon as they are
measured, so a killed stage keeps them. `--rehearse` runs small shapes on a CPU.

Kernels and compiled graphs are cached in `build/gpu-cache`, so that a second call compiles nothing.
"""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = [ROOT, ROOT / "kernels", ROOT / "dataloading", ROOT / "benchmarks"]
sys.path[:0] = [str(folder) for folder in FOLDERS]

from mvlm_benchmarks.gpu.stages import STAGES  # noqa: E402

GRACE = 30
"""Seconds beyond the budget until the stage is asked to end, and again until it is killed."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"{name:10} {spec.seconds:4.0f} s  {spec.what}" for name, spec in STAGES.items()),
    )
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--seconds", type=float, help="budget; the defaults are listed below")
    parser.add_argument("--out", type=Path, help="folder of the results; $OUT, or else build/gpu/STAGE")
    parser.add_argument("--rehearse", action="store_true", help="small shapes on a CPU, kernels interpreted")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "gpu-cache", help="folder of compiled kernels")
    options = parser.parse_args()
    seconds = options.seconds or STAGES[options.stage].seconds
    out = options.out or Path(os.environ.get("OUT") or ROOT / "build" / "gpu" / options.stage)
    command = [sys.executable, "-m", "mvlm_benchmarks.gpu", options.stage, "--out", str(out.resolve())]
    command += ["--seconds", f"{seconds:g}", *(["--rehearse"] if options.rehearse else [])]
    child = subprocess.Popen(command, cwd=ROOT, env=environment(options.cache.resolve(), options.rehearse))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: child.send_signal(received))
    try:
        return child.wait(seconds + GRACE)
    except subprocess.TimeoutExpired:
        print(f"{options.stage}: still running {GRACE} s after its budget; it is asked to end", flush=True)
        child.terminate()
    try:
        return child.wait(GRACE)
    except subprocess.TimeoutExpired:
        child.kill()
        print(f"{options.stage}: killed; its rows are in {out}", flush=True)
        return child.wait() or 1


def environment(cache: Path, rehearse: bool) -> dict[str, str]:
    """Environment of a stage: paths of this checkout, caches that are kept, and how Triton runs kernels."""
    paths = [*(str(folder) for folder in FOLDERS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_INTERPRET": "1" if rehearse else "0",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # as in a run
    }


if __name__ == "__main__":
    sys.exit(main())

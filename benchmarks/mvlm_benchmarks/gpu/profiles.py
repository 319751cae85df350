"""Part `profiles` of stage `first`: Nsight Compute's basic counters of two kernels, where it is installed."""

import shutil
import sys

from mvlm_benchmarks.gpu.correct import write_output
from mvlm_benchmarks.gpu.stage import Stage

KERNELS = {"add_norm_backward_kernel": "add_layer_norm", "short_kv_backward": "cross_attention"}


def run(stage: Stage) -> None:
    """Run part `profiles`. Writes KERNEL.ncu.txt, and KERNEL.ncu-rep for Nsight Compute's window."""
    for kernel, op in KERNELS.items():
        if not stage.allows(kernel):
            return
        calls = [sys.executable, "-m", "mvlm_benchmarks.gpu.small_calls", "--op", op, "--kernel", kernel]
        calls += ["--rehearse"] if stage.rehearse else ["--paper"]
        report = ["ncu", "--set", "basic", "--clock-control", "none", "-c", "1", "-k", f"regex:^{kernel}"]
        report += ["-o", str(stage.out / kernel), "-f", "--print-details", "all"]
        if shutil.which("ncu") is None and not stage.rehearse:
            stage.end_part(kernel, "missing: ncu is not installed")
            continue
        command = calls if stage.rehearse else [*report, *calls]
        code = write_output(stage, f"{kernel}.ncu.txt", command, max(1.0, stage.budget.left))
        stage.end_part(kernel, "ok" if code == 0 else f"error: exit code {code}")

"""`mvlm doctor`: a report on this machine."""

import sys
from pathlib import Path

# Commands import what they need when they run, so that --help and errors are immediate.


def doctor(
    *,
    preset: str = "tiny",
    data: Path | None = None,
    out: Path = Path("runs"),
    batch_size: int | None = None,
    device: str = "auto",
) -> None:
    """Check this machine: packages, devices, backends, disk. With --data also shards, memory and training speed.

    Lines are green (works), amber (works at a cost) or red (does not work). The exit code is 1 if a line is red.

    Args:
        preset: Preset of the trial: tiny, small or base.
        data: Folder of shards for the trial. Default: no trial.
        out: Folder in which runs would be written.
        batch_size: Pairs per step. Default: the preset's.
        device: auto, cpu or cuda.
    """
    from mvlm.commands.machine_check import examine

    states = []
    for finding in examine(preset, data, out, batch_size, device):
        states.append(finding.state)
        print(f"{finding.state:<6} {finding.name:<18} {finding.text}", flush=True)
    if "red" in states:
        sys.exit(1)

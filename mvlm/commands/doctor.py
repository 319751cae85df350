"""`mvlm doctor`: report on this machine."""

import sys
from pathlib import Path

# A command imports what it needs when it runs, so that --help and mistakes answer at once.


def doctor(
    *,
    preset: str = "tiny",
    data: Path | None = None,
    out: Path = Path("runs"),
    batch_size: int | None = None,
    device: str = "auto",
) -> None:
    """Say what this machine can do, what it cannot and why; with shards also how fast it would train.

    The exit code is 0, or 1 when a line is red.

    Args:
        preset: The preset whose memory and speed are tried.
        data: Folder of shards.
        out: Where runs would be written.
        batch_size: Pairs a step; the preset's own when not given.
        device: auto, cpu or cuda.
    """
    from mvlm.commands.machine_check import examine

    states = []
    for finding in examine(preset, data, out, batch_size, device):
        states.append(finding.state)
        print(f"{finding.state:<6} {finding.name:<18} {finding.text}", flush=True)
    if "red" in states:
        sys.exit(1)

"""`mvlm app` in a process of its own, as an attacker meets it."""

import os
import resource
import select
import subprocess
import sys
from pathlib import Path

from support.page_attacks import Target, png
from support.ports import free_port


class Page:
    """`mvlm app` in a process of its own."""

    def __init__(self, run: Path, folder: Path, *arguments: str) -> None:
        port = free_port()
        (folder / "uploads").mkdir()
        (folder / "other").mkdir()
        (folder / "other" / "secret.png").write_bytes(png(99))
        (folder / "other" / "secret.txt").write_text("secret")
        os.mkfifo(folder / "other" / "pipe")
        self.uploads, self.log = folder / "uploads", folder / "log"
        command = [sys.executable, "-m", "mvlm.cli", "app", str(run), "--port", str(port), *arguments]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "GRADIO_TEMP_DIR": str(self.uploads)},
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30)),
            )
        self.target = Target(f"http://127.0.0.1:{port}", self.process.pid, folder / "other")
        self._wait()

    def _wait(self) -> None:
        output = self.process.stdout
        assert output is not None
        ready, _, _ = select.select([output], [], [], 180)
        line = output.readline().decode() if ready else ""
        assert "Ctrl-C" in line, line + self.log.read_text()

    def end(self, number: int) -> int:
        """Send a signal, and wait for the end."""
        self.process.send_signal(number)
        try:
            return self.process.wait(20)
        finally:
            self.kill()

    def kill(self) -> None:
        """End the process at once."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

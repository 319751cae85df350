"""The job of several nodes in examples/; test_pages.py runs the scripts, and tests/walks the study."""

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    """Environment in which SLURM's commands and torchrun are stand-ins that write what they were asked."""
    stand_ins = {
        "scontrol": 'echo "scontrol $*" >> asked; [ "$1" = requeue ] || printf "node%s\\n" 07 08',
        "srun": 'exec "$@"',
        # It ends once the notice is there, as a run does.
        "torchrun": "\n".join(
            [
                'echo "torchrun $*" >> asked',
                "until [ -e runs/mvlm-42.stop ]; do sleep 0.02; done",
                "echo saved >> asked",
            ]
        ),
    }
    (tmp_path / "bin").mkdir()
    for name, body in stand_ins.items():
        file = tmp_path / "bin" / name
        file.write_text(f"#!/bin/bash\n{body}\n")
        file.chmod(0o755)
    return os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[07-08]", "SLURM_GPUS_ON_NODE": "8",
    }  # fmt: skip


def test_the_job_of_several_nodes_saves_before_its_end_and_is_queued_again(cluster, tmp_path):
    script = EXAMPLES / "multi_node.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/mvlm-42.stop").touch()  # left by a job that was killed
    job = subprocess.Popen(["bash", script, "base", "--data", "my data"], cwd=tmp_path, env=cluster)
    asked, deadline = tmp_path / "asked", time.monotonic() + 60
    while not (asked.exists() and "torchrun" in asked.read_text()):
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 0
    first, torchrun, saved, requeued = asked.read_text().splitlines()
    assert (first, saved, requeued) == ("scontrol show hostnames node[07-08]", "saved", "scontrol requeue 42")
    words = shlex.split(torchrun)
    for name, value in {"--nnodes": "2", "--nproc-per-node": "8", "--rdzv-endpoint": "node07:29500"}.items():
        assert words[words.index(name) + 1] == value
    assert torchrun.endswith(
        "-m mvlm pretrain base --data my data --out runs/mvlm-42 --resume --preemption-file runs/mvlm-42.stop"
    )
    assert not (tmp_path / "runs/mvlm-42.stop").exists()


def test_the_job_of_several_nodes_fails_if_the_run_does(cluster, tmp_path):
    (tmp_path / "bin/torchrun").write_text("#!/bin/bash\nexit 2\n")
    done = subprocess.run(["bash", EXAMPLES / "multi_node.sbatch", "base"], cwd=tmp_path, env=cluster)
    assert done.returncode == 2
    assert "requeue" not in (tmp_path / "asked").read_text()

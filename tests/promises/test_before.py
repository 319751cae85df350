"""What version 0.2.0 left on disk still opens, and gives the figures that it gave: a run, an exported model, a search
index, embeddings and a data folder.

`before/` holds them, made by commit 190a7342 from the committed shapes, in fp32 on a CPU, by these commands:

    mvlm pretrain tiny --data data --out run --seed 3 --max-steps 8 --warmup-steps 2 --batch-size 12 --log-every 1 \
        --checkpoint-every-steps 4 --eval-every-steps 4 --optimizer adamw --device cpu --precision fp32 \
        --model.image-size 32 --model.patch-size 8 --model.mask-block 16 --model.width 16 --model.heads 2 \
        --model.image-layers 1 --model.text-layers 1 --model.cross-layers 1 --model.decoder-layers 1 \
        --model.vocab-size 300 --model.itc-width 8
    mvlm eval retrieval --checkpoint run --data data --split test --out retrieval.json
    mvlm embed data embeddings --checkpoint run
    mvlm search index embeddings index --method flat
    mvlm search query index "a red circle on white" --json query.json --checkpoint run
    mvlm export run exported

The run was cut after its checkpoint of step 4 before the other commands; rows.jsonl has its rows of steps 5 to 8.
The figures hold on any processor, so they are compared within what the precision allows.
"""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch

import mvlm
from mvlm.cli import find_command
from mvlm.runs.folder import read_metrics
from support.shapes import copy_shapes

BEFORE = Path(__file__).parent / "before"
PRECISION = 1e-3  # of losses after 4 further steps in fp32, and of log-odds
SIMILARITY = 1e-5  # of numbers of a unit vector in fp32
BF16 = 2**-8  # of products of unit vectors: a command computes in bf16 where the processor is fast at it


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A copy of the old folders with their data, as the working directory: the run's config.json names `data`."""
    shutil.copytree(BEFORE, tmp_path / "old")
    copy_shapes(tmp_path / "old" / "data")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def vectors(kind: str) -> torch.Tensor:
    """Embeddings that the old version wrote, (n, 8), in the order of the file."""
    table = parquet.read_table(BEFORE / "embeddings" / f"{kind}.parquet")
    return torch.tensor(table["vector"].to_pylist())


@pytest.mark.slow
def test_an_old_run_resumes_with_the_rows_that_it_would_have_had(folder, without_tensorboard):
    """Its loader, optimizer, guard and generators go on where they were."""
    find_command(["pretrain", "--config", "run/config.json", "--resume"])()
    rows = read_metrics(folder / "run" / "metrics.jsonl")
    wanted = [json.loads(line) for line in (BEFORE / "rows.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    for row, old in zip(rows[4:], wanted, strict=True):
        for name in ("mlm", "mim", "itc", "itm", "grad_norm"):
            assert row[name] == pytest.approx(old[name], rel=PRECISION), (row["step"], name)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["run", "exported"])
def test_an_old_model_gives_its_figures(folder, model):
    find_command(
        ["eval", "retrieval", "--checkpoint", model, "--data", "data", "--split", "test", "--out", "now.json"]
    )()
    now, old = (json.loads(file.read_text()) for file in (folder / "now.json", BEFORE / "retrieval.json"))
    assert now["model"] == old["model"]
    assert now["fingerprint"] == old["fingerprint"]
    for name in ("masked_nats", "masked_l1", "masked_l1_train_median", "masked_l1_white"):
        assert now[name] == pytest.approx(old[name], rel=PRECISION), name
    assert set(old) - set(now) <= {"seconds"}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["run", "exported"])
def test_an_old_model_embeds_as_before(folder, model):
    trained = mvlm.load_model(folder / model, device="cpu", precision="fp32")
    table = parquet.read_table(BEFORE / "embeddings" / "texts.parquet")
    texts = trained.embed_texts(table["text"].to_pylist())
    assert (texts - vectors("texts")).abs().max() < SIMILARITY


@pytest.mark.slow
def test_an_old_index_and_old_embeddings_answer_as_before(folder):
    pytest.importorskip("lancedb")
    find_command(["search", "index", "embeddings", "new", "--method", "flat"])()
    old = json.loads((BEFORE / "query.json").read_text())
    for index in ("index", "new"):
        query = ["search", "query", index, "a red circle on white", "--checkpoint", "run", "--top", "76"]
        find_command([*query, "--json", f"{index}.json"])()
        now = {hit["id"]: hit["similarity"] for hit in json.loads((folder / f"{index}.json").read_text())}
        assert len(now) == 76
        for hit in old:
            assert now[hit["id"]] == pytest.approx(hit["similarity"], abs=BF16), hit["id"]

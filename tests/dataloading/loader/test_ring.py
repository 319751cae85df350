"""Linked data in sample order 2: batches of any ranks, resumed, bytes that are read, and ranges that are in flight."""

import gc
import io
import itertools
import json
import tarfile
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mvlm_dataloading import DataError, Dataset, ViewOptions, make_view, open_dataset
from mvlm_dataloading.links import store
from mvlm_dataloading.links.captions import parse_captions_option
from mvlm_dataloading.links.samples import LinkedSample
from mvlm_dataloading.loader import ring, segment
from mvlm_dataloading.loader.lanes import LaneOrder
from mvlm_dataloading.loader.resume import lanes_of
from mvlm_dataloading.loader.sampler import SampleOrder, substitute_sample
from mvlm_dataloading.tools.link import LinkOptions, link_files
from support.data import wave_tokenizer
from support.linked import write_table, write_tars
from support.loaders import make_loader, rows, take

parquet = pytest.importorskip("pyarrow.parquet")

TARS, SAMPLES = 3, 32


@pytest.fixture(autouse=True)
def cache(data_cache: Path) -> Path:
    return data_cache


@pytest.fixture
def nothing_ahead(monkeypatch):
    """Nothing is asked for before its batch."""
    monkeypatch.setattr(ring, "AHEAD_SAMPLES", 0)
    monkeypatch.setattr(ring, "AHEAD_S", 0)


def linked(tmp_path: Path, urls: list[str], caption: str = "txt,json:caption=2") -> Dataset:
    link_files(urls, tmp_path / "out", LinkOptions(parse_captions_option(caption)), workers=0)
    return open_dataset(tmp_path / "out", "train")


@pytest.fixture
def tars(tmp_path: Path) -> Dataset:
    return linked(tmp_path, list(map(str, write_tars(tmp_path / "tars", TARS, SAMPLES))))


@pytest.fixture
def read(monkeypatch) -> list[tuple[str, int, int]]:
    """File, begin and end of all ranges that are read from a disk."""
    found, own = [], store._read_local

    def read_local(file, begin: int, end: int) -> bytes:
        found.append((file.url, begin, end))
        return own(file, begin, end)

    monkeypatch.setattr(store, "_read_local", read_local)
    return found


def on_ranks(dataset: Dataset, ranks: int, batches: int, state: dict | None = None, **settings: Any):
    """Samples of the next batches, those of all ranks together; and the state of the first one."""
    parts, states = [], []
    settings = {"batch_size": 16, "prefetch_batches": 0} | settings
    for rank in range(ranks):
        loader = make_loader(dataset, wave_tokenizer(), rank=rank, world_size=ranks, **settings)
        if state is not None:
            loader.load_state_dict(json.loads(json.dumps(state)))
        parts.append([rows([pair]) for pair in take(loader, batches)])
        states.append(loader.state_dict())
        loader.close()
    assert all(other == states[0] for other in states)
    return [row for step in range(batches) for part in parts for row in part[step]], states[0]


@pytest.mark.slow
@pytest.mark.parametrize("block", [1, 8])
def test_ranks_see_the_same_batches_and_read_each_byte_once(tars, read, nothing_ahead, monkeypatch, block):
    """Over three epochs, in blocks of one and of eight samples."""
    monkeypatch.setattr("mvlm_dataloading.loader.lanes.POOL", TARS * SAMPLES // block)
    wanted, _ = on_ranks(tars, 1, 18)
    samples = [row["sample"] for row in wanted]
    for epoch in range(3):
        assert sorted(samples[epoch * 96 : (epoch + 1) * 96]) == list(range(96))
    assert len({tuple(samples[epoch * 96 : (epoch + 1) * 96]) for epoch in range(3)}) == 3
    size = sum(shard["bytes"] for shard in tars.shards)
    for ranks in (1, 2, 4):
        read.clear()
        assert on_ranks(tars, ranks, 18)[0] == wanted
        assert 0.2 * 3 * size < sum(end - begin for _, begin, end in read) <= 3 * size
        assert max(Counter(read).values()) == 3
        assert len(read) <= 3 * 96 / block + 3 * 16  # a lane's end may cut a block


@pytest.mark.slow
def test_a_run_resumes_within_an_epoch_on_other_ranks(tars, read, nothing_ahead):
    """On 2, 4 and 3 ranks, at another batch size in the end: pixels, captions and masks too."""
    wanted, _ = on_ranks(tars, 1, 18)
    found, state = on_ranks(tars, 2, 4)
    assert (state["order"], state["lanes"][:2]) == (2, [16, 1])
    for ranks, batch_size, batches in ((4, 16, 3), (1, 16, 1), (3, 6, 5), (2, 24, 2)):
        more, state = on_ranks(tars, ranks, batches, state, batch_size=batch_size)
        found += more
    assert len(found) == 206
    assert found == wanted[:206]


def test_ranks_resume_with_other_microbatches(tars, read, nothing_ahead):
    """From two ranks to one with two microbatches, as `mvlm pretrain --accumulate 2`."""
    wanted, _ = on_ranks(tars, 2, 6)
    found, state = on_ranks(tars, 2, 2)
    more, _ = on_ranks(tars, 1, 8, state, batch_size=8, microbatches=2)
    assert found + more == wanted


@pytest.mark.slow
def test_ranks_of_a_node_share_its_requests(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert [ring.ranges_at_a_time(ranks) for ranks in (1, 2, 4, 64)] == [64, 32, 16, 8]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # 64 nodes of one GPU
    assert ring.ranges_at_a_time(64) == 64


def test_substitutes_of_damaged_images_are_the_same_on_all_ranks(tmp_path, caplog):
    """A damaged PNG is replaced by the sample that (seed, epoch, its id) draws, however early it is known."""
    bad = {1, 41, 69}
    dataset = linked(tmp_path, list(map(str, write_tars(tmp_path / "tars", TARS, SAMPLES, damaged=bad))))
    found = {}
    for ranks in (1, 2):
        samples = {}
        for rank in range(ranks):
            loader = make_loader(dataset, wave_tokenizer(), batch_size=16, rank=rank, world_size=ranks)
            samples[rank] = [batch.sample_id.tolist() for batch, _ in take(loader, 12)]
            loader.close()
        found[ranks] = [i for step in range(12) for rank in range(ranks) for i in samples[rank][step]]
    state = make_loader(dataset, wave_tokenizer(), batch_size=16).state_dict()
    lanes = lanes_of(state)
    assert lanes is not None
    ids, epochs = LaneOrder(dataset.shard_sizes, 5, lanes).at(np.arange(192))
    wanted = [
        substitute_sample(5, epoch, i, 96, bad) if i in bad else i
        for i, epoch in zip(ids.tolist(), epochs.tolist(), strict=True)
    ]
    assert found[1] == found[2] == wanted
    assert "cannot be decoded" in caplog.text


def test_a_damaged_image_costs_one_more_pipeline(tmp_path, monkeypatch):
    """Of few samples, so that the batch goes on soon: it is found by DALI's word, not by a search."""
    dataset = linked(tmp_path, list(map(str, write_tars(tmp_path / "tars", TARS, SAMPLES, damaged={1, 41, 69}))))
    built, own = [], segment.build_pipeline

    def build_pipeline(*arguments, **settings):
        built.append(len(arguments[1]))
        return own(*arguments, **settings)

    monkeypatch.setattr(segment, "build_pipeline", build_pipeline)
    loader = make_loader(dataset, wave_tokenizer(), batch_size=16)
    take(loader, 12)
    assert loader.skipped == 3
    loader.close()
    assert len(built) <= 4
    assert max(built) <= 16 * 16


@pytest.mark.extended
def test_one_pipeline_makes_batches_of_65536(tmp_path, monkeypatch):
    """Of tiny images, for more than an epoch. The samples of two epochs are never in memory together."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(4096):
            image = io.BytesIO()
            Image.fromarray(np.full((8, 8, 3), number % 251, np.uint8)).save(image, "JPEG")
            for extension, content in (("jpg", image.getvalue()), ("txt", b"text %d" % number)):
                member = tarfile.TarInfo(f"{number}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    once = linked(tmp_path, [str(tmp_path / "a.tar")], "txt")
    make_view(tmp_path / "view", [once.folder], ViewOptions(), weights=[24])
    dataset, built, own = open_dataset(tmp_path / "view", "train"), [], segment.build_pipeline

    def build_pipeline(*arguments, **settings):
        built.append(len(arguments[1]))
        return own(*arguments, **settings)

    monkeypatch.setattr(segment, "build_pipeline", build_pipeline)
    settings = {"batch_size": 1 << 16, "image_size": 8, "patch_size": 4, "mask_block": 4, "prefetch_batches": 0}
    loader, seen = make_loader(dataset, wave_tokenizer(), **settings), []
    for batch, _ in itertools.islice(loader, 3):
        seen += batch.sample_id.tolist()
        held = sum(isinstance(one, LinkedSample) for one in gc.get_objects())
        assert held <= len(dataset) + (1 << 16)
    loader.close()
    assert sorted(seen) == sorted([*range(len(dataset))] * 2)
    assert len(built) == 1


def test_many_ranges_are_in_flight(tars, monkeypatch):
    """While the first batch waits, as many are read as the pool has threads; and nothing twice."""
    at_once, most, lock, gate = 0, 0, threading.Lock(), threading.Event()
    own = store._read_local

    def read_local(file, begin: int, end: int) -> bytes:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
            if most >= 16:
                gate.set()
        gate.wait(10)
        with lock:
            at_once -= 1
        return own(file, begin, end)

    monkeypatch.setattr(store, "_read_local", read_local)
    loader = make_loader(tars, wave_tokenizer(), batch_size=16, world_size=2, rank=1)
    take(loader, 2)
    loader.close()
    assert most >= 16


def test_what_is_asked_for_in_advance_is_bounded(tars, read, monkeypatch):
    monkeypatch.setattr(ring, "AHEAD_BYTES", 4000)
    loader = make_loader(tars, wave_tokenizer(), batch_size=4, prefetch_batches=0)
    take(loader, 2)
    bound = sum(end - begin for _, begin, end in read)
    loader.close()
    read.clear()
    monkeypatch.setattr(ring, "AHEAD_BYTES", 1 << 20)
    loader = make_loader(tars, wave_tokenizer(), batch_size=4, prefetch_batches=0)
    take(loader, 2)
    loader.close()
    assert bound < sum(end - begin for _, begin, end in read) / 2


def test_a_file_that_changed_ends_the_run_by_name(tars, tmp_path):
    tar = Path(tars.shards[1]["tar"])
    tar.write_bytes(tar.read_bytes()[::-1])
    loader = make_loader(tars, wave_tokenizer(), batch_size=32)
    with pytest.raises(DataError, match=r"00001\.tar.*link"):
        take(loader, 6)
    loader.close()


@pytest.fixture
def tables(tmp_path: Path) -> Dataset:
    """Three Parquet files of 80 row groups each, with columns that nobody wants."""
    urls = []
    for number in range(3):
        path = write_table(tmp_path / f"{number}.parquet", range(160 * number, 160 * (number + 1)), by_datasets=False)
        table = parquet.read_table(path)
        table = table.add_column(1, "not wanted", [[f"{i:05d}" * 200 for i in range(160)]])
        parquet.write_table(table, path, row_group_size=2, use_dictionary=False)
        urls.append(str(path))
    return linked(tmp_path / "tables", urls, "caption,others")


def needed_bytes(dataset: Dataset) -> int:
    """Bytes of the columns of images and captions, by pyarrow."""
    total = 0
    for shard in dataset.shards:
        metadata = parquet.read_metadata(shard["tar"])
        for group in range(metadata.num_row_groups):
            chunks = [metadata.row_group(group).column(k) for k in range(metadata.num_columns)]
            names = ("image", "caption", "others")
            total += sum(one.total_compressed_size for one in chunks if one.path_in_schema.split(".")[0] in names)
    return total


@pytest.mark.slow
def test_ranks_read_each_row_group_of_tables_once(tables, read, nothing_ahead):
    """The same batches on 1, 2 and 4 ranks over two epochs, and resumed; wanted columns and footers alone are read."""
    wanted, state = on_ranks(tables, 4, 60)
    assert state["order"] == 2
    lanes = state["lanes"]
    samples = [row["sample"] for row in wanted]
    for epoch in range(2):
        assert sorted(samples[480 * epoch : 480 * (epoch + 1)]) == list(range(480))
    footers = sum(int.from_bytes(Path(one["tar"]).read_bytes()[-8:-4], "little") + 16 for one in tables.shards)
    for ranks in (1, 2, 4):
        read.clear()
        assert on_ranks(tables, ranks, 60)[0] == wanted
        sent = sum(end - begin for _, begin, end in read) - ranks * footers
        assert sent <= 1.05 * 2 * needed_bytes(tables)
    found, state = on_ranks(tables, 2, 7)
    for ranks, batches in ((4, 20), (1, 5)):
        more, state = on_ranks(tables, ranks, batches, state)
        found += more
    assert state["lanes"] == lanes
    assert found == wanted[: 32 * 16]


def test_tables_and_tars_are_mixed(tables, tars, tmp_path):
    """Rows of a view, twice or not at all, in the row groups that they lie in."""
    make_view(tmp_path / "mix", [tables.folder, tars.folder], options=ViewOptions(match="[1-9]"), weights=[1.5, 1])
    mix = open_dataset(tmp_path / "mix", "train")
    samples, state = on_ranks(mix, 2, len(mix) // 16)
    assert state["order"] == 2
    assert len({row["sample"] for row in samples}) == len(mix) // 16 * 16
    shown = {sample["sample"]: sample["pixels"] for sample in samples}
    copies = [i for i in range(1, len(mix)) if mix.image_bytes(i) == mix.image_bytes(i - 1)]
    assert len(copies) > 100
    order_1, _ = on_ranks(mix, 1, 2 * len(mix) // 16, state_of_order_1(mix))
    pixels = {row["sample"]: row["pixels"] for row in order_1[: len(mix)]}
    assert all(pixels[i] == one for i, one in shown.items() if i in pixels)


def state_of_order_1(dataset: Dataset) -> dict:
    own = make_loader(dataset, wave_tokenizer(), batch_size=16).state_dict()
    del own["lanes"]
    return own | {"order": 1}


def test_states_of_order_1_keep_their_order(tars, tables):
    """The cache then has whole shards."""
    for dataset in (tars, tables):
        samples, state = on_ranks(dataset, 1, 3, state_of_order_1(dataset))
        assert state["order"] == 1
        wanted = SampleOrder(dataset.shard_sizes, 5, shuffle=True)(0, 48)[0].tolist()
        assert [row["sample"] for row in samples] == wanted


def test_row_groups_that_the_description_does_not_have(tables):
    """A description that joins row groups ends the run: no sample is taken from another row."""
    path = tables.folder / "dataset.json"
    found = json.loads(path.read_text())
    for shard in found["splits"]["train"]["shards"]:
        shard["groups"] = [shard["samples"]]
    forged = replace(tables, description=found)
    loader = make_loader(forged, wave_tokenizer(), batch_size=16)
    with pytest.raises(DataError, match="link again"):
        take(loader, 30)
    loader.close()
    for groups in ([1], [0, 160], "160", None):
        found["splits"]["train"]["shards"][0]["groups"] = groups
        path.write_text(json.dumps(found))
        with pytest.raises(DataError, match="groups"):
            open_dataset(tables.folder, "train")


def test_a_state_of_order_2_is_refused_for_a_built_folder(waves_train):
    loader = make_loader(waves_train, wave_tokenizer())
    with pytest.raises(DataError, match="order 2"):
        loader.load_state_dict(loader.state_dict() | {"order": 2, "lanes": [8, 1, 4]})


@pytest.mark.parametrize("lanes", [None, [8, 2], [8, 2, 0], [8, 2, "3"], [8, 2, 1 << 50], [True, 2, 3]])
def test_a_state_with_other_lanes_is_refused(tars, lanes: Any):
    loader = make_loader(tars, wave_tokenizer())
    with pytest.raises(DataError, match="lanes"):
        loader.load_state_dict(loader.state_dict() | {"lanes": lanes})


def test_part_of_a_split_in_few_samples(tars):
    """Samples of a part are numbered from its first one; a batch may be larger than the split."""
    part = tars.rows(40, 43)
    samples, _ = on_ranks(part, 1, 3)
    seen = [row["sample"] for row in samples]
    assert all(sorted(seen[3 * k : 3 * k + 3]) == [0, 1, 2] for k in range(16))

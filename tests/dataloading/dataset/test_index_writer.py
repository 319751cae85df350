"""Writing indices from DALI indices of any form."""

import hashlib
import io

import numpy as np
import pytest

from mvlm_dataloading.dataset.dali_index import parse_index
from mvlm_dataloading.dataset.index_writer import IndexWriter, fingerprint_of, pack_records
from mvlm_dataloading.dataset.sample_index import SampleIndex


def index_of(shards: list[list[str]]) -> SampleIndex:
    """Index of shards given as lines of DALI indices."""
    content = io.BytesIO()
    described = [{"tar": f"{k}.tar", "samples": len(lines), "sha256": ""} for k, lines in enumerate(shards)]
    writer = IndexWriter(content, "train", described)
    for lines in shards:
        parsed = parse_index("\n".join([f"v1.2 {len(lines)}", *lines, ""]).encode())
        writer.add(pack_records(parsed), parsed.keys)
    writer.finish()
    return SampleIndex(content.getvalue())


def test_odd_samples_and_empty_shards_are_packed():
    large = 512 * 0xFFFFFFFE  # the last block of a tar of 2 TiB
    index = index_of(
        [
            [],
            ["TXT 512 3 d/a.b.TXT JPG 1024 4294967294 d/a.b.JPG", "webp 2048 0 ö.webp tok 4096 8 ö.tok"],
            [],
            [f"png {large} 1 c.png txt 0 2 c.txt json 512 3 c.json png 1024 4 c.png"],
            [],
        ]
    )
    assert len(index) == 3
    assert [index.key(i) for i in range(3)] == ["d/a.b", "ö", "c"]
    assert index.shard_of(np.arange(3)).tolist() == [1, 1, 3]
    found = {kind: np.stack(index.locate(kind, np.arange(3)), 1).tolist() for kind in ("image", "text", "meta")}
    assert found["image"] == [[1024, 4294967294], [2048, 0], [1024, 4]]  # the last of two images
    assert found["text"] == [[512, 3], [0, -1], [0, 2]]
    assert found["meta"] == [[0, -1], [0, -1], [512, 3]]
    assert index.locate("tokens", 1) == (4096, 8)


@pytest.mark.parametrize("place", ["513 2", "512 4294967295", f"{512 * 0xFFFFFFFF} 1"])
def test_places_that_no_tar_has_are_refused(place):
    with pytest.raises(ValueError, match="the text of a sample at an offset or of a size that no tar has"):
        pack_records(parse_index(f"v1.2 1\njpg 0 1 a.jpg txt {place} a.txt\n".encode()))


def test_the_fingerprint_hashes_shards_and_places_of_samples():
    """The recipe, written out: checkpoints store fingerprints, so it stays. Captions count where images are shared."""
    shards = [{"samples": 2, "sha256": "aa"}, {"samples": 2, "sha256": "bb"}]
    lines = [
        ["jpg 512 3 a.jpg txt 1536 2 a.txt", "jpg 2560 3 b.jpg txt 3584 2 b.txt"],
        ["jpg 512 3 c.jpg txt 1536 2 c.txt", "jpg 512 3 d.jpg txt 3584 2 d.txt"],
    ]
    content = io.BytesIO()
    writer = IndexWriter(content, "train", [one | {"tar": f"{one['sha256']}.tar"} for one in shards])
    for part in lines:
        parsed = parse_index("\n".join(["v1.2 2", *part, ""]).encode())
        writer.add(pack_records(parsed), parsed.keys)
    writer.finish()
    places = np.array([512, 2560, 512, 512, 1536, 3584], "<i8").tobytes()
    wanted = hashlib.sha256(b'["train", [[2, "aa"], [2, "bb"]]]' + places).hexdigest()[:32]
    index = SampleIndex(content.getvalue())
    assert index.fingerprint == wanted
    assert fingerprint_of(index, "train", shards) == wanted
    assert fingerprint_of(index, "test", shards) != wanted
    assert fingerprint_of(index, "train", [shards[0], {"samples": 1, "sha256": "bb"}]) is None

"""Reading annotation files, names of splits, and keys."""

import json
import os
import shutil

import pyarrow
import pytest
from pyarrow import parquet

from mvlm_dataloading import DataError
from mvlm_dataloading.sources.files import files_under, read_json_list, read_rows
from mvlm_dataloading.sources.folder import folder
from mvlm_dataloading.sources.huggingface import huggingface
from mvlm_dataloading.sources.record import canonical_split, safe_key
from support import published
from support.data import build_source


@pytest.mark.slow
def test_links_to_folders_are_followed_once(tmp_path, monkeypatch):
    """A folder inside keeps its own path. Links in a circle end. One out of the folder has to be asked for."""
    published.folder(tmp_path / "images")
    published.folder(tmp_path / "elsewhere", 2)
    (tmp_path / "images/0").symlink_to(tmp_path / "images/a")
    (tmp_path / "images/a/circle").symlink_to(tmp_path / "images")
    (tmp_path / "images/a/more").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="more: wanted a file in"):
        folder(tmp_path / "images")
    monkeypatch.setenv("MVLM_FOLLOW_LINKS", "1")
    found = build_source(folder(tmp_path / "images"), tmp_path / "out")["train"]
    names = ["a/0", "a/2", "a/4", "a/more/a/0", "a/more/b/1", "b/1", "b/3", "b/5"]
    assert [*found] == [safe_key(name) for name in names]
    (tmp_path / "rows").mkdir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/part").symlink_to(tmp_path / "rows")
    parquet.write_table(pyarrow.Table.from_pylist(published.hub_rows(2)), tmp_path / "rows/train.parquet")
    assert len(build_source(huggingface(tmp_path / "linked"), tmp_path / "rows-out")["train"]) == 2


def test_a_folder_inside_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    """Root may read everything, so the disk's answer is made up."""
    published.folder(tmp_path / "images")
    read = os.scandir

    (tmp_path / "images" / "lost+found").mkdir()

    def refuse(place):
        if str(place).endswith(("images/b", "images/lost+found")):
            raise PermissionError(13, "Permission denied", str(place))
        return read(place)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="images/b: wanted a folder that can be read, found Permission denied"):
        files_under(tmp_path / "images")
    shutil.rmtree(tmp_path / "images" / "b")
    assert files_under(tmp_path / "images")


def test_a_long_json_list_is_read_in_chunks(tmp_path, monkeypatch):
    elements = [1234567, "a] [,", {"b": [1, {"c": '\\"]'}]}, [], -0.5, None, "é" * 30]
    file = tmp_path / "list.json"
    for text in (json.dumps(elements), " \n" + json.dumps(elements, indent=3, ensure_ascii=False)):
        file.write_text(text, encoding="utf-8")
        for chunk in (1, 2, 3, 7, 64, 1 << 20):
            monkeypatch.setattr("mvlm_dataloading.sources.files.CHUNK", chunk)
            assert list(read_json_list(file)) == elements
        file.write_text(text[:-1].rstrip(), encoding="utf-8")
        with pytest.raises(DataError, match="wanted a JSON list, found no end after"):
            list(read_json_list(file))
    file.write_text('{"a": 1}')
    with pytest.raises(DataError, match="wanted a JSON list, found "):
        list(read_json_list(file))


def test_tables_tolerate_common_download_errors(tmp_path):
    (tmp_path / "a.csv").write_bytes(
        '\ufeffimage,caption\n"a.jpg","two\nlines, ""quoted"""\nb.jpg,nul\0byte\n'.encode()
    )
    rows = list(read_rows(tmp_path / "a.csv"))
    assert [row["caption"].replace("\0", " ") for row in rows] == ['two\nlines, "quoted"', "nul byte"]


@pytest.mark.parametrize("name, between", [("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", ","), ("a.tsv", ";")])
def test_tables_of_spreadsheets_are_read_by_their_header(tmp_path, caplog, name, between):
    """Cells may hold what separates others elsewhere. The log says what was found."""
    lines = [f"Datei{between}Text", f'a.jpg{between}"a; b, c"', f'b.jpg{between}"un café"']
    file = tmp_path / name
    file.write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8", newline="")
    with caplog.at_level("INFO"):
        rows = list(read_rows(file))
    assert rows == [{"Datei": "a.jpg", "Text": "a; b, c"}, {"Datei": "b.jpg", "Text": "un café"}]
    assert repr(between) in caplog.text
    file.write_bytes("\r\n".join([*lines, lines[-1]]).encode("cp1252"))
    assert list(read_rows(file))[-1]["Text"] == "un caf\udce9"
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        f"{file} line 3: wanted UTF-8, found other bytes, as in a table that a spreadsheet saved in Latin-1; captions "
        "with such letters are rejected: save it as CSV UTF-8"
    ]


def test_split_names_and_keys_are_canonical():
    assert [canonical_split(name, "") for name in ("train", "VAL", " dev", "restval", "test")] == [
        "train", "validation", "validation", "train", "test",
    ]  # fmt: skip
    assert safe_key("0001_a-b") == "0001_a-b"
    names = ["a/b", "a.b", "a b", "ä", "猫", "", "x" * 81, "a_b.", "\udcff"]
    assert len({safe_key(name) for name in names} | {"a_b"}) == len(names) + 1
    assert max(len(safe_key(name)) for name in names) <= 80

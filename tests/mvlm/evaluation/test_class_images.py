"""Images of classes: layouts and names as users have them."""

import json
import tarfile

import pytest

from mvlm.errors import RunError
from mvlm.evaluation.class_images import open_classes, parse_names, read_templates
from mvlm_dataloading import DataError
from support.classes import as_tar, write_classes
from support.scenes import COLOURS

SYNSETS = {colour: f"n0000000{i}" for i, colour in enumerate(sorted(COLOURS, reverse=True))}
"""ImageNet's names of folders, in another order than the colours."""
KEYED = {synset: colour for colour, synset in SYNSETS.items()}
IN_ORDER = [KEYED[synset] for synset in sorted(KEYED)]
NAMES = {
    "LOC_synset_mapping.txt": "".join(f"{s} {c}, a colour, {c}ness\n" for s, c in KEYED.items()) + "n99999999 other\n",
    "words.txt": "".join(f"{s}\t{c}, a colour\n" for s, c in KEYED.items()),
    "imagenet_class_index.json": json.dumps({str(i): [s, KEYED[s]] for i, s in enumerate(sorted(KEYED))}),
    "classnames.json": json.dumps(KEYED),
    "classnames.txt": "".join(f"{name}\n" for name in IN_ORDER),
}


@pytest.mark.parametrize("above", [0, 2])
@pytest.mark.parametrize("file", NAMES)
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_names_come_from_the_file_that_users_have(tmp_path, file, above, kind):
    place = write_classes(tmp_path / "data/imagenet/val", SYNSETS)
    (place if above == 0 else place.parents[above - 1]).joinpath(file).write_text(NAMES[file])
    found = open_classes(as_tar(place, place.parent / "val.tar") if kind == "tar" else place)
    assert sorted(found.names) == sorted(COLOURS)
    assert len(found) == 12
    for i in range(len(found)):
        name = found.names[found.labels[i]]
        assert f"/{name}_" in f"/{found.files[i]}"
        content = found.read(i)
        path = next(place.rglob(found.files[i].rpartition("/")[2]))
        assert (content if isinstance(content, bytes) else content.read_bytes()) == path.read_bytes()


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["golden_retriever", "tabby cat"], ["golden retriever", "tabby cat"]),
        (["n02085620-Chihuahua", "n02086240-Shih-Tzu"], ["Chihuahua", "Shih-Tzu"]),
        (["001.Black_footed_Albatross", "002.Laysan_Albatross"], ["Black footed Albatross", "Laysan Albatross"]),
        (["0", "1"], ["0", "1"]),
    ],
)
def test_folders_name_their_classes_if_no_file_does(tmp_path, folders, names):
    for folder in folders:
        (tmp_path / "data" / folder).mkdir(parents=True)
        (tmp_path / "data" / folder / "a.jpg").write_bytes(b"")
    assert open_classes(tmp_path / "data").names == names


def test_numbered_folders_have_names_in_the_order_of_their_numbers():
    folders = [str(i) for i in range(11)]
    found = parse_names("\n".join(f"name {i}" for i in range(11)), folders)
    assert found == {folder: f"name {folder}" for folder in folders}


def test_two_folders_of_one_name_are_one_class(tmp_path):
    place = write_classes(tmp_path / "data", SYNSETS)
    (place / "classnames.txt").write_text("\n".join(["crane", "crane", "heron", "stork"]))
    found = open_classes(place)
    assert found.names == ["crane", "heron", "stork"]
    assert found.labels.tolist() == [0] * 6 + [1] * 3 + [2] * 3


def test_fewer_images_are_spread_over_all_classes(tmp_path):
    found = open_classes(write_classes(tmp_path / "data"))
    few = found.spread(4)
    assert few.labels.tolist() == [0, 1, 2, 3]
    assert few.fingerprint != found.fingerprint
    assert found.spread(0).fingerprint == found.spread(100).fingerprint == found.fingerprint


def test_what_has_no_classes_is_refused(tmp_path):
    place = write_classes(tmp_path / "bare", SYNSETS)
    with pytest.raises(RunError, match="LOC_synset_mapping"):
        open_classes(place)
    (place / "classnames.txt").write_text("one\ntwo\n")
    with pytest.raises(RunError, match="a name for each of the 4 folders"):
        open_classes(place)
    for wrong in (tmp_path / "missing", tmp_path):
        with pytest.raises(RunError):
            open_classes(wrong)
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat/a.jpg").write_bytes(b"")
    with pytest.raises(RunError, match="a folder for each"):
        open_classes(tmp_path / "flat")
    with pytest.raises(RunError, match="uncompressed tar"):
        open_classes(write_compressed(tmp_path / "packed.tar.gz", place))


def write_compressed(tar, folder):
    with tarfile.open(tar, "w:gz") as file:
        file.add(folder, "data")
    return tar


def test_links_that_lead_out_of_the_folder_are_refused(tmp_path):
    place = write_classes(tmp_path / "data")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (place / "red/link.png").symlink_to(tmp_path / "secret.png")
    found = open_classes(place)
    with pytest.raises(RunError, match="leads elsewhere"):
        found.read(next(i for i, file in enumerate(found.files) if "link" in file))
    (place / "other").symlink_to(tmp_path)
    with pytest.raises((RunError, DataError), match="leads elsewhere"):
        open_classes(place)


def test_templates_have_a_place_for_the_name(tmp_path):
    file = tmp_path / "templates.txt"
    file.write_text("a photo of a {}.\n\n  art of {c}\n")
    assert read_templates(file) == ["a photo of a {}.", "art of {}"]
    for wrong in ("a photo\n", "\n"):
        file.write_text(wrong)
        with pytest.raises(RunError, match="for the name of a class"):
            read_templates(file)

"""Folders of models that somebody else has written: settings, weights, tokenizers and manifests that do not fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from mvlm.errors import RunError
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.network import MaskVLMNetwork
from mvlm.model.pretrained import check_sizes, stored_sizes
from mvlm.runs.checkpoint import read_folder_shapes, read_tensors
from mvlm.runs.load import load_without_head
from support.folders import checkpoint_contents
from support.forgery import change_tensors, sign
from support.models import micro_config

SHARD = "model/shard-00001-model-00001-of-00001.safetensors"
FORMS = ("checkpoint", "exported")


@pytest.fixture
def copy(trained, portable, tmp_path) -> Callable[[str], Path]:
    """Makes a copy of the model in one of the forms, to be changed."""
    sources = {"checkpoint": trained / "checkpoints/step_00000002", "exported": portable}
    return lambda form: Path(shutil.copytree(sources[form], tmp_path / sources[form].name))


def settings_file(folder: Path) -> Path:
    return folder / ("model.json" if (folder / "model.json").is_file() else "config.json")


def set_settings(folder: Path, **changes: Any) -> None:
    file = settings_file(folder)
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def weights_file(folder: Path) -> Path:
    return folder / (SHARD if (folder / SHARD).is_file() else "model.safetensors")


def refuse(folder: Path, *words: str, load: Callable[[Path], object] = load_without_head) -> str:
    """Sign the folder and check that its model is refused in one line, which has the words and the path once."""
    if (folder / "manifest.json").is_file():
        sign(folder)
    with pytest.raises(RunError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert message.count(str(folder)) == 1
    assert "Error(" not in message
    for word in words:
        assert word in message, message
    return message


SETTINGS = [
    *({name: 10**6} for name in ("image_layers", "text_layers", "cross_layers", "decoder_layers")),
    *({name: 10**9} for name in ("text_length", "vocab_size", "itc_width")),
    {"width": 2 * 10**9},
    {"image_size": 16 * 10**8},
    {"image_size": 10**9, "mask_block": 10**9, "patch_size": 10**9},
    {"image_layers": 1},
    {"text_layers": 3},
    {"patch_size": 16},
    {"width": 18},
    {"contrastive": "sigmoid"},
    {"cross_norm": "pre"},
]
"""Settings that are valid and are not those of the weights. The first named one is in the error."""
VALUES = [
    *(({name: 10**200}, name) for name in ("image_size", "image_layers", "vocab_size")),
    ({"width": "16"}, "width: wanted int"),
    ({"image_mask_ratio": 10**150}, "image_mask_ratio"),
    ({"heads": 3}, "heads must divide width"),
    ({"widht": 3}, "widht"),
]


@pytest.mark.parametrize("change", SETTINGS, ids=str)
def test_settings_of_other_weights_are_refused_before_a_network_is_made(copy, monkeypatch, change):
    folders = {form: copy(form) for form in FORMS}
    made = []
    monkeypatch.setattr(MaskVLMNetwork, "__init__", lambda *_: made.append(1))
    for form, folder in folders.items():
        set_settings(folder, **change)
        refuse(folder, str(settings_file(folder)), f"{next(iter(change))} ", f"got {next(iter(change.values()))}")
        if form == "exported":
            refuse(folder, next(iter(change)), load=MaskVLM.from_pretrained)
    assert not made


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change, word", VALUES)
def test_settings_that_no_model_has_are_refused(copy, form, change, word):
    folder = copy(form)
    set_settings(folder, **change)
    refuse(folder, f"{settings_file(folder)}: ", word)


ARCHITECTURES = [
    ("post", "softmax", 0),
    ("pre", "softmax", 1),
    ("post", "sigmoid", 0),
    ("pre", "sigmoid", 1),
]


@pytest.mark.parametrize("norm, form, added", ARCHITECTURES)
def test_the_shapes_of_a_configuration_are_those_of_its_network(norm, form, added):
    config = micro_config(
        cross_norm=norm, contrastive=form, image_layers=1 + added, decoder_layers=1, text_layers=3
    )  # fmt: skip
    shapes = {name: tuple(tensor.shape) for name, tensor in MaskVLM(config).state_dict().items()}
    check_sizes(config, shapes, Path("model.json"), Path("model"))
    for name, shape in list(shapes.items())[::30]:
        with pytest.raises(RunError):
            check_sizes(config, shapes | {name: (*shape, 1)}, Path("model.json"), Path("model"))
    assert stored_sizes(shapes).items() <= config.to_dict().items()


def relabel(file: Path, kind: bytes, number: int = 1) -> None:
    """Change the type that the header of a file gives to its first tensors. The bytes of the numbers stay."""
    content = file.read_bytes()
    assert content.count(b'"dtype":"F32"') >= number
    file.write_bytes(content.replace(b'"dtype":"F32"', b'"dtype":"' + kind + b'"', number))


@pytest.mark.parametrize("kind, number", [(b"I32", 1), (b"U32", 99)])
@pytest.mark.parametrize("form", FORMS)
def test_weights_that_are_no_floats_are_refused(copy, form, kind, number):
    folder = copy(form)
    relabel(weights_file(folder), kind, number)
    refuse(folder, "floats", {b"I32": "torch.int32", b"U32": "torch.uint32"}[kind])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name, value",
    [
        ("log_scale", torch.nan),
        ("text_encoder.words.weight", torch.inf),
        ("image_decoder.blocks.1.norm3.bias", -torch.inf),
    ],
)
def test_weights_that_are_not_finite_are_refused(copy, form, name, value):
    folder = copy(form)

    def spoil(own: str, tensor: torch.Tensor) -> torch.Tensor:
        if own == name:
            tensor.view(-1)[-1] = value
        return tensor

    change_tensors(weights_file(folder).parent, spoil)
    refuse(folder, "finite", name)
    if form == "exported":
        refuse(folder, "finite", name, load=MaskVLM.from_pretrained)


@pytest.mark.parametrize(
    "kind, form",
    [
        (torch.float64, "checkpoint"),
        (torch.bfloat16, "checkpoint"),
        (torch.bfloat16, "exported"),
        (torch.float16, "exported"),
    ],
)
def test_weights_of_other_floats_are_loaded_as_they_are(copy, form, kind):
    """Large ones too, whose sum is above the largest number of the type."""
    folder = copy(form)
    largest = torch.finfo(torch.float16).max
    change_tensors(weights_file(folder).parent, lambda name, t: torch.full_like(t, largest) if "norm" in name else t)
    change_tensors(weights_file(folder).parent, lambda _, tensor: tensor.to(kind))
    wanted = load_file(weights_file(folder))
    if form == "checkpoint":
        sign(folder)
    found = load_without_head(folder, "cpu").network.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name].float()) for name, tensor in found.items())


def split_rows(folder: Path, second: Callable[[int], int]) -> None:
    """Write the tensors of a checkpoint as two ranks with FSDP do: the first rows of each, and the others.

    Args:
        second: the place that the second file gives to the rows that begin at one.
    """
    tensors = load_file(folder / SHARD)
    (folder / SHARD).unlink()
    for rank in (1, 2):
        parts, places = {}, {}
        for name, tensor in tensors.items():
            half = (len(tensor) + 1) // 2
            parts[name] = tensor[half:].clone() if rank == 2 else tensor[:half].clone()
            rows = second(half) if rank == 2 else 0
            places[name] = {"saved_offsets": [rows, *(0 for _ in tensor.shape[1:])]}
        file = folder / f"model/shard-{rank:05d}-model-00001-of-00001.safetensors"
        save_file(parts, file, {"DCP_SHARDING_INFO": json.dumps(places), "DCP_VERSION": "1.0"})


def test_weights_in_shards_are_loaded_bit_for_bit(copy):
    folder = copy("checkpoint")
    wanted = load_file(folder / SHARD)
    split_rows(folder, lambda half: half)
    found = {name: torch.empty_like(tensor) for name, tensor in wanted.items()}
    read_tensors(folder / "model", found)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
    assert read_folder_shapes(folder / "model") == {name: tuple(t.shape) for name, t in wanted.items()}


PLACES = [lambda half: half + 1, lambda half: 10**9, lambda half: half - 1, lambda half: -half]


@pytest.mark.parametrize("place", PLACES)
def test_shards_that_leave_rows_out_are_refused(copy, place):
    """Missing rows would stay as the network began, or ask for memory that no file has."""
    folder = copy("checkpoint")
    wanted = {name: torch.empty_like(tensor) for name, tensor in load_file(folder / SHARD).items()}
    split_rows(folder, place)
    for read in (lambda: read_folder_shapes(folder / "model"), lambda: read_tensors(folder / "model", wanted)):
        with pytest.raises(RunError, match=r"model: wanted all parts of .*, found others; use another checkpoint"):
            read()


def change_tokenizer(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def far_ids(values: dict[str, Any]) -> None:
    values["model"]["vocab"] = {name: i + 10**6 for name, i in values["model"]["vocab"].items()}
    for token in values["added_tokens"]:
        token["id"] += 10**6


def more_tokens(values: dict[str, Any]) -> None:
    """Added tokens behind the vocabulary, one more than the model has room for."""
    inner = tokenizers.Tokenizer.from_str(json.dumps(values))
    inner.add_tokens([f"<{i}>" for i in range(301 - inner.get_vocab_size())])
    values.update(json.loads(inner.to_str()))


def swap_names(one: str, other: str) -> Callable[[dict[str, Any]], None]:
    def swap(values: dict[str, Any]) -> None:
        vocabulary = values["model"]["vocab"]
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
        for token in values["added_tokens"]:
            token["id"] = vocabulary[token["content"]]

    return swap


def one_token(values: dict[str, Any]) -> None:
    """Two special tokens with one id, as words of a vocabulary that no list of added tokens names."""
    values["added_tokens"] = []
    values["model"]["vocab"]["[SEP]"] = values["model"]["vocab"]["[PAD]"]


TOKENIZERS = {
    "ids a million further": (far_ids, "vocab_size 300 "),
    "added tokens without room": (more_tokens, "vocab_size 300 "),
    "[SEP] in the place of [MASK]": (swap_names("[SEP]", "[MASK]"), "mask_token_id 4 "),
    "[PAD] in the place of [MASK]": (swap_names("[PAD]", "[MASK]"), "mask_token_id 4 "),
    "two special tokens in one": (one_token, "four special tokens"),
    "no [CLS]": (lambda values: (values["model"]["vocab"].pop("[CLS]"), values["added_tokens"].pop(2)), "cls token"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_with_other_tokens_than_the_models_is_refused(copy, form, name):
    folder, (change, word) = copy(form), TOKENIZERS[name]
    change_tokenizer(folder, change)
    refuse(folder, f"{folder}/tokenizer.json: wanted", word)


@pytest.mark.parametrize("name", ["model.json", SHARD])
def test_links_stay_in_the_folder_or_in_its_cache(copy, tmp_path, monkeypatch, name):
    """Files of a snapshot in the hub's cache are links into its blobs. Elsewhere the user has to ask for it."""
    folder = copy("checkpoint")
    before = checkpoint_contents(folder)
    for place in ("blobs", "store"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "contents").write_bytes((folder / name).read_bytes())
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "store/contents")
    with pytest.raises(RunError, match=f"{name}: wanted a file in"):
        load_without_head(folder, "cpu")
    monkeypatch.setenv("MVLM_FOLLOW_LINKS", "1")
    assert load_without_head(folder, "cpu").sha256
    assert checkpoint_contents(folder) == before
    (tmp_path / "other").write_text("secret")
    for target, word in (("other", "damaged"), ("/dev/zero", "missing"), ("none", "missing")):
        (folder / name).unlink()
        (folder / name).symlink_to(tmp_path / target)
        with pytest.raises(RunError, match=f"{name}: {word}") as caught:
            load_without_head(folder)
        assert "secret" not in str(caught.value)
    monkeypatch.delenv("MVLM_FOLLOW_LINKS")
    snapshot = tmp_path / "snapshots/revision"
    snapshot.parent.mkdir()
    folder.rename(snapshot)
    (snapshot / name).unlink()
    (snapshot / name).symlink_to(tmp_path / "blobs/contents")
    assert load_without_head(snapshot, "cpu").sha256


def test_a_linked_folder_of_weights_is_refused(copy, tmp_path, monkeypatch):
    """DCP's reader takes every file of a folder, of which the manifest may not know."""
    folder = copy("checkpoint")
    (folder / "model").rename(tmp_path / "model")
    (folder / "model").symlink_to(tmp_path / "model")
    monkeypatch.setenv("MVLM_FOLLOW_LINKS", "1")
    for inside in (tmp_path / "model", folder / "inside"):
        if not inside.exists():
            shutil.copytree(tmp_path / "model", inside)
        (folder / "model").unlink()
        (folder / "model").symlink_to(inside)
        with pytest.raises(RunError, match="not in the manifest"):
            load_without_head(folder)

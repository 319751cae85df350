"""The configuration of a run, and its groups of settings."""

import json
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

from mvlm.cli import find_command
from mvlm.config.finetune import FinetuneConfig
from mvlm.config.groups import groups_of, of_recipe, resume_may_change, way_of
from mvlm.config.model import MaskVLMConfig
from mvlm.config.pretrain import PretrainConfig
from mvlm.config.ranges import NO_FLAG
from mvlm.errors import ConfigError
from support.models import pretrain_config

FLOATS = [name for name, kind in get_type_hints(PretrainConfig).items() if kind is float]
# Listed by hand, to be independent of the ranges in the groups.
NOT_NEGATIVE = (
    *("lr_encoder", "lr_cross", "lr_pixels", "lr_muon", "lr_end", "weight_decay"),
    "warmup_steps",
    *("eval_every_steps", "eval_images", "checkpoint_every_steps", "keep_checkpoints"),
    *("max_bad_steps", "mlm_weight", "mim_weight", "itc_weight", "itm_weight"),
)


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**64 - 1])
def test_every_seed_that_torch_takes_is_valid(seed):
    torch.Generator().manual_seed(pretrain_config(Path("data"), Path("out"), seed=seed).seed)


def test_a_url_has_both_slashes_in_config_json():
    config = pretrain_config(Path("s3://bucket/data"), Path("out"), also_evaluate=Path("https://me:password@host/old"))
    assert config.to_dict()["data"] == "s3://bucket/data"
    assert config.to_dict()["also_evaluate"] == "https://host/old"


def test_an_integer_where_a_setting_is_a_float_becomes_a_float():
    """torch multiplies no tensor with the integer 10**20, which a config.json may have."""
    config = pretrain_config(Path("data"), Path("out"), itc_weight=10**20, crop_scale=(1, 1))
    assert isinstance(config.itc_weight, float)
    assert torch.ones(1).mul(config.itc_weight).item() == pytest.approx(1e20)
    assert all(isinstance(end, float) for end in config.crop_scale)


INVALID: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(FLOATS, (math.nan, math.inf)),
    **dict.fromkeys(("max_steps", "batch_size", "log_every"), (0,)),
    "batch_size": (0, 8.5, 10**20),
    "crop_scale": ((0.0, 1.0), (0.9, 0.8), (0.9, 1.1), (0.5, math.nan), (0.5,)),
    "beta2": (1.5, 1.0, math.nan),
    "ema_decay": (1.0, math.inf),
    "clip_norm": (-1.0, 0.0, math.nan),
    "stall_minutes": (0.0, math.inf),
    "seed": (99999999999999999999, -(2**63) - 1),
    "plan": ("quick", None),
    "flip": (1.1, math.nan),
    "lr_end": (10**400, math.nan),
    "log_to": ("wandb",),
}


@pytest.mark.parametrize(
    "changes",
    [
        *({name: value} for name, values in INVALID.items() for value in values),
        *({name: -1} for name in NOT_NEGATIVE),
        {"capture": "compile", "plan": "plain"},
        {"capture": "cuda-graphs", "accumulate": 2},
        {"train_text": "frozen", "capture": "compile"},
        {"keep_start": 1.0},
        *(
            {"keep_start": 1.0, "initial_model": Path("old")} | x
            for x in ({"capture": "compile"}, {"itc_weight": 0, "itm_weight": 0})
        ),
        {"train_image": "lora"},
        {"train_cross": "lora", "image_weights": Path("vit"), "text_weights": Path("roberta")},
        {"lr_image": 1e-4, "optimizer": "muon", "lr_cross": 0.0},
    ],
    ids=str,
)
def test_invalid_settings_of_a_run_are_refused(changes):
    pretrain_config(Path("data"), Path("out"), flip=1.0, beta2=0.0, randaugment=14)  # the ends of ranges are valid
    with pytest.raises(ConfigError, match=next(iter(changes))):
        pretrain_config(Path("data"), Path("out"), **changes)


def test_a_path_may_be_a_string() -> None:
    given: dict[str, Any] = {"data": "data", "out": "out", "tokenizer": "t.json"}
    found = PretrainConfig.preset("tiny", **given)
    assert found == PretrainConfig.preset("tiny", **{name: Path(x) for name, x in given.items()})
    assert (found.tokenizer, found.initial_model) == (Path("t.json"), None)


def test_adapters_name_every_setting_that_gives_them_weights() -> None:
    with pytest.raises(ConfigError, match="give text_weights or text_tower or initial_model"):
        pretrain_config(Path("data"), Path("out"), train_text="lora")


def test_itm_needs_itc() -> None:
    with pytest.raises(ConfigError, match=r"weights: .*ITC"):
        pretrain_config(Path("data"), Path("out"), itc_weight=0.0)


@pytest.mark.parametrize("kind", [PretrainConfig, FinetuneConfig])
def test_every_setting_but_the_model_belongs_to_one_group(kind) -> None:
    grouped = [name for group in groups_of(kind) for name in group.__annotations__]
    assert sorted([*grouped, "model"]) == sorted(field.name for field in fields(kind))


def test_the_group_says_if_a_resumed_run_may_change_a_setting() -> None:
    kept = {"batch_size", "max_steps", "lr_cross", "image_weights", "precision", "task", "blind", "model"}
    free = {"out", "data", "log_every", "log_to", "keep_checkpoints", "mirror", "stall_minutes"}
    free |= {"checkpoint_every_steps"}
    way = {*("plan", "self_attention", "cross_attention", "deterministic"), "capture"}
    way |= {"parallel", "accumulate", "checkpoint_activations"}
    free |= way
    assert {name for name in kept | free if resume_may_change(name)} == free
    assert {name for name in kept | free if of_recipe(name)} == kept | way
    assert way_of(pretrain_config(Path("data"), Path("out"), accumulate=2)).keys() == way


def flags_of(words: list[str], capsys) -> set[str]:
    """The flags that a command shows in its help."""
    with pytest.raises(SystemExit, match="0"):
        find_command([*words, "--help"])()
    return set(re.findall(r"^[^\w-]{0,4}(--[a-z][\w.-]*)", capsys.readouterr().out, re.MULTILINE))


def with_flags(kind: type, prefix: str = "--") -> set[str]:
    types = get_type_hints(kind, include_extras=True)
    shown = {name for name in kind.__dataclass_fields__ if NO_FLAG not in getattr(types[name], "__metadata__", ())}
    return {prefix + name.replace("_", "-") for name in shown - {"model"}}


def test_help_shows_every_setting_that_has_a_flag(capsys) -> None:
    shown = flags_of(["pretrain", "tiny"], capsys)
    assert shown == with_flags(PretrainConfig) | with_flags(MaskVLMConfig, "--model.")
    assert len([flag for flag in shown if not flag.endswith("-weight")]) <= 89  # one for each objective is no burden


def test_help_of_fine_tuning_shows_what_it_takes(capsys) -> None:
    shown = flags_of(["finetune", "vqa"], capsys)
    assert shown == with_flags(FinetuneConfig)
    assert not shown & {"--task", "--tokenizer", "--lr-pixels", "--optimizer", "--mlm-weight", "--capture"}
    assert len(shown) <= 62


@pytest.mark.parametrize("name", ["max_bad_steps", "stall_minutes", "model.mask_token_id"])
def test_a_setting_without_a_flag_is_taken_from_a_file_alone(name, tmp_path) -> None:
    from mvlm.commands.pretrain import parse_config
    from mvlm.config.json_files import config_json

    config = pretrain_config(Path("data"), Path("out"))
    values = config_json(config)
    part, key = (values["model"], name.removeprefix("model.")) if "." in name else (values, name)
    part[key] = {"mask_token_id": 7}.get(key, 3)
    (tmp_path / "config.json").write_text(json.dumps(values))
    words = ["--config", str(tmp_path / "config.json"), "--seed", "4"]
    found = config_json(parse_config(words))
    assert found == values | {"seed": 4}
    with pytest.raises(ConfigError, match=name.replace("_", "-")):
        parse_config([*words, f"--{name.replace('_', '-')}", "5"])

"""Runs that start from pretrained encoders, and the commands and code of docs/guides/weights.md."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mvlm.errors import RunError
from support.encoders import hf_text, timm_vit
from support.models import pretrain_config

PAGE = Path(__file__).parents[3] / "docs" / "guides" / "weights.md"


@pytest.mark.slow
def test_a_run_starts_from_the_encoders_of_its_files(scenes, tmp_path, without_tensorboard, monkeypatch):
    """At a learning rate of zero the encoders are unchanged after the run. A missing file leaves no run folder."""
    import mvlm.training.run
    from mvlm.runs.load import load_model

    save_file({name: t.float() for name, t in timm_vit().state_dict().items()}, tmp_path / "vit.safetensors")
    save_file(
        {name: t.float().contiguous() for name, t in hf_text("Roberta").state_dict().items()},
        tmp_path / "text.safetensors",
    )
    files = {"image_weights": tmp_path / "vit.safetensors", "text_weights": tmp_path / "text.safetensors"}
    config = pretrain_config(
        scenes, tmp_path / "run", lr_encoder=0.0, lr_cross=1e-3, max_steps=1, weight_decay=0.0, **files
    )
    mvlm.training.run.pretrain(config)
    model, _ = load_model(tmp_path / "run")
    theirs = load_file(files["image_weights"])
    assert torch.equal(model.image_encoder.position, theirs["pos_embed"][0])
    words = load_file(files["text_weights"])["embeddings.word_embeddings.weight"]
    assert torch.equal(model.text_encoder.words.weight, words)

    # A resumed run reads the checkpoint alone.
    files["image_weights"].unlink()
    mvlm.training.run.pretrain(
        pretrain_config(
            scenes, tmp_path / "run", lr_encoder=0.0, lr_cross=1e-3, max_steps=1, weight_decay=0.0, resume=True, **files
        )
    )
    with pytest.raises(RunError, match="wanted a safetensors file, found none"):
        mvlm.training.run.pretrain(pretrain_config(scenes, tmp_path / "other", **files))
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_the_python_of_the_page_on_weights_runs(tmp_path, monkeypatch, capsys):
    """Nothing is downloaded: timm makes a ViT with random weights."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, {})
    (line,) = [line.strip() for line in PAGE.read_text().splitlines() if line.startswith("    image_encoder: ")]
    assert line in capsys.readouterr().out


def test_the_command_of_the_page_on_weights_parses(monkeypatch):
    import mvlm.training.run
    from mvlm import cli

    (block,) = re.findall(r"^```sh\nmvlm (.*?)\n```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    seen = []
    monkeypatch.setattr(mvlm.training.run, "pretrain", seen.append)
    cli.run_command(block.split())
    assert (seen[0].image_weights, seen[0].text_weights) == (Path("vit.safetensors"), Path("roberta.safetensors"))
    assert seen[0].lr_encoder == 1e-5

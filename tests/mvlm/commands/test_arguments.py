"""Wrong arguments of commands: one line, exit code 2, and the new name of a renamed flag."""

import pytest

from mvlm.cli import run_command
from mvlm.errors import ConfigError

PRETRAIN = ["pretrain", "tiny", "--data", "none", "--out", "none"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, message",
    [
        (["pretrain"], "wanted a preset"),
        (["pretrain", "--data", "d"], "wanted a preset"),
        (["pretrain", "hgue", "--data", "d", "--out", "o"], "preset"),
        (["pretrain", "--config"], "--config"),
        (["pretrain", "tiny", "--data", "none"], "--out PATH"),
        (["pretrain", "tiny", "--dat", "x"], "Unrecognized options: --dat x; "),
        ([*PRETRAIN, "--bacth-size", "3"], "--bacth-size"),
        ([*PRETRAIN, "--batch-size", "0"], "batch_size"),
        ([*PRETRAIN, "--batch-size", "abc"], "--batch-size: wanted a whole number, got 'abc'"),
        ([*PRETRAIN, "--lr-end", "x"], "--lr-end: wanted a number, got 'x'"),
        ([*PRETRAIN, "--model.image-size", "100"], "image_size"),
        ([*PRETRAIN, "--plan", "slow"], "--plan"),
        (["embed", "--data"], "data: wanted a value behind it, found none; see `mvlm embed --help`"),
        (["data", "emoji"], "OUT"),
        (["report"], "RUN"),
        (["eval", "retrieval", "--chekpoint", "c", "--data", "d"], "--checkpoint"),
        (["bench"], "bench step"),
        (["bench", "setp"], "did you mean `mvlm bench step`?"),
        (["bench", "step", "--batches", "3"], "--batches"),
        (["pretrain", "tiny", "--eval-pictures", "64"], "--eval-pictures is now --eval-images"),
        (["pretrain", "base", "--eval_pictures=64"], "--eval-pictures is now --eval-images"),
        (["pretrain", "tiny", "--self-attention", "products"], "is now --self-attention math"),
        (["pretrain", "tiny", "--cross-attention=products"], "is now --cross-attention math"),
        (["bench", "data", "--pictures", "30"], "--pictures is now --images"),
    ],
)
def test_wrong_arguments_are_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        run_command(words)
    assert message in str(caught.value)
    assert not {"\n", "│", "─"} & set(str(caught.value))
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())

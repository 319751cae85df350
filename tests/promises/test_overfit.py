"""A small model overfits 32 pairs, which needs every part of training to work, from shards to updates."""

import numpy as np
import pytest

from mvlm.evaluation.cross_modal_gain import cross_modal_gain
from mvlm.evaluation.retrieval import encode_split, rank_all, recall
from mvlm.runs.folder import read_metrics
from mvlm.tasks.load import load_model
from mvlm.training.run import pretrain
from mvlm_dataloading import ShardWriter, open_dataset
from support.models import micro_config, pretrain_config
from support.scenes import png

COLOURS, ANIMALS = ("red", "green", "blue", "black"), ("cat", "dog", "bird", "fish", "horse", "snake", "whale", "ant")


def write_mosaics(folder, count=32):
    """Up to 32 mosaics of random colours, one colour a patch, each with a unique caption.

    A caption has two words. Each word occurs with several others, so only the mosaic determines a masked word.
    """
    rng = np.random.default_rng(0)
    with ShardWriter(folder, name="mosaics", source="tests", licence="CC0", attribution="nobody", recipe={}) as writer:
        for i in range(count):
            pixels = np.kron(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
            caption = f"{COLOURS[i % 4]} {ANIMALS[i // 4]}"
            assert writer.add(f"pair{i:02d}", png(pixels), [caption], {}, split="train") is None
    return folder


LAYERS = {"image_layers": 1, "text_layers": 1, "cross_layers": 1, "decoder_layers": 1}
MODEL = micro_config(width=64, heads=2, itc_width=32, cross_norm="pre", initialization="xavier", **LAYERS)


@pytest.mark.extended
@pytest.mark.slow
def test_a_small_model_overfits_32_pairs(tmp_path, without_tensorboard):
    settings = {"max_steps": 250, "batch_size": 32, "warmup_steps": 20, "crop_scale": (1.0, 1.0)}
    rates = {"lr_encoder": 2e-3, "lr_cross": 2e-3, "lr_pixels": 1e-3}
    data = write_mosaics(tmp_path / "data")
    pretrain(pretrain_config(data, tmp_path / "run", model=MODEL, **settings, **rates))

    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-20:]
    means = {name: float(np.mean([row[name] for row in last])) for name in ("mlm", "itc")}
    assert means["mlm"] < 0.1, means
    assert means["itc"] < 0.1, means

    # It predicts captions from images, and retrieves each from the other.
    loaded = load_model(tmp_path / "run")
    trained, tokenizer = loaded.network, loaded.tokenizer
    split = open_dataset(data, "train")
    features = encode_split(trained, split, tokenizer)
    gain = cross_modal_gain(trained, split, features, tokenizer, draws=2)
    assert gain["gain_text_nats_95"][0] > 1, gain
    for ranks in rank_all(trained, features, k=8).values():
        assert recall(ranks.itc)["r1"] == recall(ranks.itm)["r1"] == 100

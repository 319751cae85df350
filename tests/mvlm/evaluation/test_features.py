"""Features of a split, in memory and on disk, against each image and caption alone."""

import pytest
import torch

from mvlm.evaluation import features
from mvlm.evaluation.features import encode_split
from mvlm.evaluation.workspace import Workspace
from mvlm.inference import encode
from mvlm_dataloading import ShardWriter, open_dataset
from support.models import micro_model
from support.scenes import png, scene


@pytest.fixture(scope="module")
def model():
    return micro_model(dtype=torch.float32).eval()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("batch", [64, 3])
def test_features_of_a_split_are_those_of_each_image_and_caption_alone(
    model, heldout_split, tokenizer, monkeypatch, tmp_path, batch, place
):
    """The plain network encodes each alone."""
    monkeypatch.setattr(encode, "BATCH", batch)
    monkeypatch.setattr(features, "BATCH", batch)
    workspace = Workspace(tmp_path if place == "disk" else None)
    found = encode_split(model, heldout_split, tokenizer, "fp32", workspace)
    captions = [caption for i in range(8) for caption in heldout_split.captions(i)]
    assert found.captions == captions
    assert len(captions) == 12  # every second image has two
    assert found.owner.tolist() == [0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 7]
    assert found.first.tolist() == [0, 1, 3, 4, 6, 7, 9, 10]
    assert found.v.shape == (8, 17, 16)
    lengths = [len(tokenizer.encode([caption], 12)[0]) for caption in captions]
    assert found.starts.tolist() == [sum(lengths[:t]) for t in range(13)]
    assert found.w.shape == (sum(lengths), 16)
    with torch.no_grad():
        for i in range(8):
            pixels = torch.from_numpy(scene(3 * i + 1)[0]).permute(2, 0, 1)[None]
            v = model.encode_image(pixels)
            torch.testing.assert_close(found.v[i], v[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(found.image_embedding[i], model.embed_image(v)[0], rtol=0, atol=1e-6)
        for t, caption in enumerate(captions):
            tokens = torch.from_numpy(tokenizer.encode([caption], 12)[0])
            length = len(tokens)
            w, _ = model.encode_text(tokens, torch.tensor([0, length]), length)
            rows = found.w[found.starts[t] : found.starts[t + 1]]
            torch.testing.assert_close(rows, w[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(found.text_embedding[t], model.embed_text(w)[0], rtol=0, atol=1e-6)
    for embedding in (found.image_embedding, found.text_embedding):
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(len(embedding)))


def test_chosen_captions_are_packed_in_the_given_order(model, heldout_split, tokenizer):
    found = encode_split(model, heldout_split, tokenizer, "fp32")
    chosen = torch.tensor([7, 0, 7, 3])
    text = found.texts(chosen, torch.device("cpu"))
    rows = [found.w[found.starts[t] : found.starts[t + 1]] for t in chosen.tolist()]
    assert torch.equal(text.rows, torch.cat(rows))
    assert text.packing.lengths.tolist() == [len(x) for x in rows]
    assert (text.packing.total, text.packing.max_length) == (len(text.rows), max(map(len, rows)))
    assert torch.equal(found.images(chosen, torch.device("cpu")), found.v[chosen])


def test_the_first_caption_of_an_image_is_one_that_has_a_token(model, tokenizer, monkeypatch, tmp_path):
    """As in the loader of the masks, which passes over the others."""
    with ShardWriter(tmp_path, name="odd", source="tests", licence="CC0", attribution="", recipe={}) as writer:
        for i, captions in enumerate((["unseen", "red", "blue"], ["green", "unseen"], ["red", "blue"])):
            assert writer.add(f"{i}", png(scene(i)[0]), captions, {}, split="test") is None
    encoding = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda texts, n: encoding([t.replace("unseen", "") for t in texts], n))
    split = open_dataset(tmp_path, "test")
    found = encode_split(model, split, tokenizer, "fp32")
    assert [found.captions[n] for n in found.first.tolist()] == ["red", "green", "red"]
    (batch, _), *_ = encode.eval_loader(split, model, tokenizer)
    lengths = found.starts.diff()[found.first]
    assert torch.equal(batch.cu_seqlens.diff().long(), lengths)

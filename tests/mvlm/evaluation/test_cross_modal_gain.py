"""Cross-modal gain of models with known losses, its intervals, and the trivial predictors."""

import math

import numpy as np
import pytest
import torch

from mvlm.evaluation import cross_modal_gain as gains
from mvlm.evaluation.cross_modal_gain import cross_modal_gain, trivial_losses, wrong_partners
from mvlm.evaluation.retrieval import encode_split
from mvlm.inference.encode import eval_loader
from mvlm.model.network import PixelHead
from support.models import micro_model, normal
from support.reference import Reference
from support.scenes import scene


@pytest.fixture
def network():
    return micro_model(dtype=torch.float32).eval()


@pytest.mark.parametrize("number", [2, 3, 8, 50, 399])
def test_wrong_partners_are_other_samples_each_once(number):
    for seed in range(5):
        partner = wrong_partners(number, seed).tolist()
        assert sorted(partner) == list(range(number))
        assert all(i != p for i, p in enumerate(partner))
    if number > 8:
        assert wrong_partners(number, 0).tolist() != wrong_partners(number, 1).tolist()
    assert torch.equal(wrong_partners(number), wrong_partners(number))


@pytest.mark.parametrize("counts", [[1, 1, 1], [5] * 8, [1, 30, 2], [2, 2]])
def test_wrong_partners_are_of_the_next_other_image_of_the_cycle(counts):
    image = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
    following = wrong_partners(len(image)).tolist()
    wanted = []
    for i in range(len(image)):
        partner = following[i]
        while image[partner] == image[i]:
            partner = following[partner]
        wanted.append(partner)
    assert wrong_partners(len(image), image=torch.from_numpy(image)).tolist() == wanted
    alone = np.arange(len(image))
    assert wrong_partners(len(image), image=torch.from_numpy(alone)).tolist() == following
    assert wrong_partners(len(image), image=torch.from_numpy(0 * alone)).tolist() == following  # no image is another


@pytest.mark.parametrize("texts", [5, 2, 1], ids=["some repeat", "most repeat", "all are equal"])
def test_wrong_partners_have_other_words_where_there_are_any(texts):
    rng = np.random.default_rng(texts)
    image, words = rng.integers(20, size=40), rng.integers(texts, size=40)
    words[image == 0] = words[0]
    words[0], image[0] = words[1], image[1]
    following = wrong_partners(40).tolist()
    for i, partner in enumerate(wrong_partners(40, image=torch.from_numpy(image), words=torch.from_numpy(words))):
        walk = [following[i]]
        while walk[-1] != i:
            walk.append(following[walk[-1]])
        others = [p for p in walk if image[p] != image[i]]
        unlike = [p for p in others if words[p] != words[i]]
        assert partner == (unlike or others)[0]


def test_a_model_without_cross_attention_gains_nothing(network, heldout_split, tokenizer):
    """With its output at zero, the right and the wrong partner make no difference."""
    with torch.no_grad():
        for name, module in network.named_modules():
            if name.endswith("cross_attention.out"):
                module.weight.zero_()
                module.bias.zero_()
    gain = cross_modal_gain(
        network, heldout_split, encode_split(network, heldout_split, tokenizer, "fp32"), tokenizer, 2, "fp32"
    )
    assert (gain["gain_text_nats"], gain["gain_pixels_pct"]) == (0, 0)
    assert gain["gain_text_nats_95"] == gain["gain_pixels_pct_95"] == [0, 0]
    assert gain["masked_nats"] > 0 < gain["masked_l1"]


class OffByHeart(PixelHead):
    """A pixel head whose features are the pixels themselves."""

    def __init__(self, config):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.zeros(config.patch_values, config.patch_values))

    def forward(self, x):
        return x


@pytest.mark.parametrize("target, loss", [("pixels", "l1"), ("normalized", "l1"), ("pixels", "mse")])
def test_pixel_gain_in_both_spaces_and_of_an_untrained_head_against_loops(
    heldout_split, tokenizer, monkeypatch, target, loss
):
    """Features of the masked patches are random, others for each caption."""
    model = micro_model(mim_target=target, mim_loss=loss).eval()
    features = encode_split(model, heldout_split, tokenizer, "fp32")
    ((batch, masks),) = list(eval_loader(heldout_split, model, tokenizer))
    logits = torch.zeros(len(masks.token_ids), model.config.vocab_size)
    first = features.starts[features.first].tolist()
    partner = gains.partners_of(heldout_split).tolist()
    number, patches = masks.patch_ids.shape
    x = {which: normal(number, patches, 16, seed=which) for which in (0, 1)}
    drawn = {features.w[first[0], 0].item(): (logits, x[0]), features.w[first[partner[0]], 0].item(): (logits, x[1])}
    monkeypatch.setattr(gains, "reconstruct", lambda _, vm, wm, v, w, *rest: drawn[w.first()[0, 0, 0].item()])
    gain = cross_modal_gain(model, heldout_split, features, tokenizer, 1, "fp32")

    weights = {name: tensor.detach().numpy() for name, tensor in model.pixel_head.named_parameters()}
    fresh, reference, sums = gains.untrained_weight(model).numpy(), Reference(model), np.zeros((3, 2))
    assert fresh.std() == pytest.approx(0.02, rel=0.05)
    for b in range(number):
        true = reference.patches(batch.images[b].numpy())
        for k, p in enumerate(masks.patch_ids[b].tolist()):
            for which in (0, 1):
                y = x[which][b, k].numpy()
                guess = drawn_pixels = weights["weight"] @ y + weights["bias"]
                if target == "normalized":
                    mean, deviation = weights["statistics.weight"] @ y + weights["statistics.bias"]
                    drawn_pixels = mean + max(deviation, 0) * guess
                own = (reference.error(predicted, true[p]) for predicted in (guess, fresh @ y))
                sums[:, which] += [error.mean() for error in (*own, np.abs(drawn_pixels - true[p]))]
    for name, (right, wrong) in zip(("gain_mim_pct", "gain_untrained_pct", "gain_pixels_pct"), sums, strict=True):
        assert gain[name] == pytest.approx(100 * (wrong / right - 1), abs=2e-3), name
        low, high = gain[f"{name}_95"]
        assert low <= gain[name] <= high
    assert gain["masked_mim"] == pytest.approx(sums[0, 0] / number / patches, abs=6e-5)
    assert gain["masked_l1"] == pytest.approx(sums[2, 0] / number / patches, abs=6e-5)
    assert (gain["gain_mim_pct"] == gain["gain_pixels_pct"]) == ((target, loss) == ("pixels", "l1"))


@pytest.mark.slow
def test_gain_of_a_model_with_known_losses(network, heldout_split, tokenizer, monkeypatch):
    """Given its own image, sample i gives the masked token at position c of its caption a logit of i/2 + c/3 more
    than the others; given its own caption, each of its masked pixels is off by (i + 1)/10. Given a wrong image,
    no token gets more than another, and with a wrong caption the pixels are off by half as much again."""
    vocabulary, number = network.config.vocab_size, 8
    batches = [next(iter(eval_loader(heldout_split, network, tokenizer, seed))) for seed in (0, 1, 2)]
    features = encode_split(network, heldout_split, tokenizer, "fp32")
    features.v[:, 0, 0] = torch.arange(number)  # so that the mock below can see which sample it is given
    features.w[features.starts[:-1], 0] = features.owner.float()
    tokens, starts = batches[0][0].tokens, batches[0][0].cu_seqlens.tolist()  # the same in every pass
    own = torch.arange(number)
    row = {t: b for b in range(number) for t in range(starts[b], starts[b + 1])}

    def bonus(place: int) -> float:
        return row[place] / 2 + (place - starts[row[place]]) / 3

    def reconstruct(_, vm, wm, v, w, batch, masks):
        logits = torch.zeros(len(masks.token_ids), vocabulary)
        for m, place in enumerate(masks.token_ids.tolist()):
            if v[row[place], 0, 0] == row[place]:
                logits[m, tokens[place]] = bonus(place)
        assert any(torch.equal(drawn.patch_ids, masks.patch_ids) for _, drawn in batches)
        off = (own + 1) / 10 * torch.where(w.first()[:, 0, 0] == own, 1.0, 1.5)
        return logits, network.patch_targets(batch.images, masks.patch_ids) + off[:, None, None]

    network.pixel_head = OffByHeart(network.config)
    monkeypatch.setattr(gains, "reconstruct", reconstruct)
    gain = cross_modal_gain(network, heldout_split, features, tokenizer, 3, "fp32")

    nats, lost, count = np.zeros(number), np.zeros(number), np.zeros(number)  # by sample
    for _, masks in batches:
        for place in masks.token_ids.tolist():
            loss = math.log(math.exp(bonus(place)) + vocabulary - 1) - bonus(place)
            nats[row[place]] += loss
            lost[row[place]] += math.log(vocabulary) - loss
            count[row[place]] += 1
    assert gain["gain_text_nats"] == pytest.approx(lost.sum() / count.sum(), abs=6e-5)  # four digits are kept
    assert gain["masked_nats"] == pytest.approx(nats.sum() / count.sum(), abs=6e-5)
    assert gain["gain_pixels_pct"] == gain["gain_mim_pct"] == pytest.approx(50, abs=6e-4)
    assert gain["masked_l1"] == pytest.approx(np.mean([(i + 1) / 10 for i in range(number)]), abs=6e-5)

    rng, resampled = np.random.default_rng(0), []
    for _ in range(1000):
        drawn = [int(i) for i in rng.integers(number, size=number)]
        resampled.append(sum(lost[i] for i in drawn) / sum(count[i] for i in drawn))
    assert gain["gain_text_nats_95"] == pytest.approx(np.percentile(resampled, [2.5, 97.5]).tolist(), abs=6e-5)
    assert gain["gain_pixels_pct_95"] == [pytest.approx(50, abs=1e-3)] * 2  # the ratio is the same for every sample


def test_trivial_predictors_against_numpy(network, train_split, heldout_split, tokenizer):
    images = np.stack([scene(i)[0] for i in range(32)]).astype(np.float64)  # (32, S, S, 3)
    median = np.floor(np.median(images, axis=0))
    mean, std = np.array(network.config.image_mean), np.array(network.config.image_std)
    ((batch, masks),) = list(eval_loader(heldout_split, network, tokenizer))
    white, middle = [], []
    for row in range(8):
        pixels = batch.images[row].permute(1, 2, 0).numpy().astype(np.float64)
        for patch in masks.patch_ids[row].tolist():
            area = slice(patch // 4 * 8, patch // 4 * 8 + 8), slice(patch % 4 * 8, patch % 4 * 8 + 8)
            target = (pixels[area] / 255 - mean) / std
            white.append(np.abs((1 - mean) / std - target).mean())
            middle.append(np.abs((median[area] / 255 - mean) / std - target).mean())
    found = trivial_losses(network, train_split, heldout_split, tokenizer)
    assert found["masked_l1_white"] == pytest.approx(np.mean(white), abs=6e-5)
    assert found["masked_l1_train_median"] == pytest.approx(np.mean(middle), abs=6e-5)

"""Two-way choices on edited images against the method in numpy float64, and of models that do and do not read."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from mvlm.errors import RunError
from mvlm.evaluation import two_way
from mvlm.evaluation.evaluate import format_table
from mvlm.evaluation.retrieval import encode_split
from mvlm.evaluation.two_way import differing_tokens, edits_of, patches_in, two_way_choices
from mvlm.inference.encode import eval_loader
from mvlm.inference.trained_model import TrainedModel
from support.models import micro_model
from support.reference import Reference, gelu, log_softmax
from support.scenes import scene, write_samples

CORNERS = {"top left": [0, 0], "top right": [0.5, 0], "bottom left": [0, 0.5], "bottom right": [0.5, 0.5]}


def edited(folder, pairs: int = 6, cells=None):
    """Pairs of squares that differ in their colour alone."""
    samples = []
    for pair in range(pairs):
        first = 4 * pair + pair % 3
        for number in (first, first + 1):
            caption = scene(number)[1]
            corner = next(edges for place, edges in CORNERS.items() if place in caption)
            cell = [*corner, corner[0] + 0.5, corner[1] + 0.5] if cells is None else cells[pair]
            samples.append((number, [caption, "another caption"], {"edit": cell}))
    return write_samples(folder, samples, "edits")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return edited(tmp_path_factory.mktemp("edits") / "data")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"mim_target": "normalized", "mim_rows": "masked"}], ids=str)
def test_choices_are_those_of_the_losses_of_each_sample(pairs, tokenizer, changes):
    """The words of a colour and the patches of its corner are hidden, nothing else."""
    model = micro_model(**changes).eval()
    found = two_way._choices, encode_split(model, pairs, tokenizer, "fp32")
    ((batch, _),) = list(eval_loader(pairs, model, tokenizer))
    cells = [pairs.metadata(i)["edit"] for i in range(len(pairs))]
    right = found[0](model, batch, cells, found[1], torch.arange(len(pairs)), "fp32").numpy()

    reference, config = Reference(model), model.config
    bounds, side = batch.cu_seqlens.tolist(), config.image_size // config.patch_size
    captions = [batch.tokens[a:b].tolist() for a, b in pairwise(bounds)]
    images = batch.images.numpy()
    for i, caption in enumerate(captions):
        other = i ^ 1
        hidden = [n for n, token in enumerate(caption) if token not in captions[other]]
        assert 0 < len(hidden) < len(caption) - 4
        shown = [config.mask_token_id if n in hidden else token for n, token in enumerate(caption)]
        nats = []
        for image in (images[i], images[other]):
            x = reference.cross("text_cross", config.cross_layers, reference.text(shown), reference.image(image))
            losses = []
            for n in hidden:
                y = reference.norm("language_head.norm", gelu(reference.linear("language_head.dense", x[n])))
                losses.append(-log_softmax(reference.linear("language_head.vocabulary", y))[caption[n]])
            nats.append(sum(losses))
        left, top, rest, low = cells[i]
        inside = [
            row * side + column
            for row in range(side)
            for column in range(side)
            if left < (column + 0.5) / side < rest and top < (row + 0.5) / side < low
        ]
        x, w = reference.masked_image(images[i], inside), reference.text(caption)
        seen = None
        if config.mim_rows == "masked":
            seen = x[[0, *(1 + p for p in range(side * side) if p not in inside)]]
            x = np.stack([x[0], *(x[1 + p] for p in range(side * side))])
        distances = [0.0, 0.0]
        for p in inside:
            rows = x if seen is None else x[[1 + p]]
            y = reference.cross("image_cross", config.cross_layers, rows, w, seen)
            y = reference.cross("image_decoder", config.decoder_layers, y, w, seen)
            painted = reference.linear("pixel_head", y[1 + p] if seen is None else y[0])
            for which, image in enumerate((images[i], images[other])):
                distances[which] += np.abs(painted - reference.target(reference.patches(image)[p])).mean()
        assert right[i].tolist() == [nats[0] < nats[1], distances[0] < distances[1], 1], i


def test_a_model_without_cross_attention_is_right_on_half(pairs, tokenizer):
    """Words: a tie. Cells: it paints the same for both captions, right for one of them."""
    model = micro_model().eval()
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith("cross_attention.out") and isinstance(module, torch.nn.Linear):
                module.weight.zero_()
                module.bias.zero_()
    found = two_way_choices(model, pairs, tokenizer, "fp32")
    assert (found["pairs"], found["words_pct"], found["cells_pct"]) == (6, 50, 50)
    assert found["words_pct_95"] == found["cells_pct_95"] == [50, 50]


def test_captions_that_are_cut_before_the_edit_have_no_choice_of_words(tmp_path, tokenizer):
    words = "a square on white that is"
    samples = [(n, [f"{words} {colour}"], {"edit": [0, 0, 0.5, 0.5]}) for n, colour in ((0, "red"), (1, "green"))]
    model = micro_model(text_length=5).eval()
    found = two_way_choices(model, write_samples(tmp_path / "data", samples, "edits"), tokenizer, "fp32")
    assert found["words_pct"] is None
    assert found["cells_pct"] is not None


def test_patches_of_cells_are_the_nearest_and_equally_many():
    """Nine cells of two by two patches, also where the edges of cells are not those of patches."""
    edges = [0, 0.335, 0.66, 1.0]
    cells = [[edges[c], edges[r], edges[c + 1], edges[r + 1]] for r in range(3) for c in range(3)]
    for number, patches in enumerate(patches_in(cells, 6).tolist()):
        row, column = divmod(number, 3)
        assert patches == [6 * (2 * row + i) + 2 * column + j for i in range(2) for j in range(2)]
    assert patches_in([[0.4, 0.4, 0.45, 0.45]], 6).shape == (1, 1)


@pytest.mark.parametrize(
    "one, other, differ",
    [("axxb", "ayb", [1, 2]), ("ab", "ab", []), ("aab", "ab", [1]), ("ab", "aab", []), ("xb", "yb", [0])],
)
def test_differing_tokens_lie_between_what_captions_share(one, other, differ):
    assert list(differing_tokens([*map(ord, one)], [*map(ord, other)])) == differ


@pytest.mark.parametrize(
    "metadata", [[{}, {}], [{"edit": [0, 0, 1, 1]}], [{"edit": [0, 0, 1, 1]}, {"edit": [0, 0, 1, "1"]}]], ids=str
)
def test_a_split_without_pairs_is_refused(tmp_path, tokenizer, metadata):
    samples = [(n, ["red"], own) for n, own in enumerate(metadata)]
    with pytest.raises(RunError, match="pairs"):
        two_way_choices(micro_model().eval(), write_samples(tmp_path / "data", samples, "edits"), tokenizer, "fp32")


@pytest.mark.slow
def test_an_evaluation_has_choices_where_the_data_have_edits(pairs, tokenizer, heldout_split):
    assert edits_of(heldout_split) is None
    model = TrainedModel(micro_model(dtype=torch.float32), tokenizer, "fp32")
    figures = model.evaluate(pairs, rerank=0, edits=edits_of(pairs)).figures
    assert figures["two_way"] == two_way_choices(model.network, pairs, tokenizer, "fp32")
    assert format_table(figures).count("chance 50 %") == 2
    assert "two_way" not in model.evaluate(pairs, rerank=0).figures

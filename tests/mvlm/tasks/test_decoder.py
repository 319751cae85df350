"""The answer decoder against one answer at a time, one token at a time, and its choice among a list."""

import copy

import numpy as np
import pytest
import torch

from mvlm.tasks.decoder import AnswerDecoder, AnswerTable
from support.models import micro_batch, micro_model

ANSWERS = ["red", "blue square", "top left on white", "red and blue", "yes", "no"]
OF = torch.tensor([0, 3, 1, 1, 4, 0, 2])
IDS = torch.tensor([0, 1, 2, 5, 3, 3, 4])


@pytest.fixture(scope="module", params=["post", "pre"])
def parts(request, tokenizer):
    model = micro_model(cross_norm=request.param)
    batch, _ = micro_batch()
    return model, AnswerDecoder(model), batch, AnswerTable(ANSWERS, tokenizer, model.config.text_length)


@torch.no_grad()
def next_logits(model, decoder, batch, prefix: list[int], question: int) -> np.ndarray:
    """Logits of the token after a prefix, for one question: nothing is padded or packed, and no mask is needed."""
    start, stop = batch.cu_seqlens[question : question + 2].tolist()
    bounds = torch.tensor([0, stop - start], dtype=torch.int32)
    v = model.encode_image(batch.images[question : question + 1])
    w, _ = model.encode_text(batch.tokens[start:stop], bounds, stop - start)
    memory = decoder.fusion(model.text_cross(w, v), model.image_cross(v, w))
    encoder = model.text_encoder
    x = encoder.norm(encoder.words.weight[prefix] + encoder.position[: len(prefix)])[None]
    for block in decoder.decoder.layers:
        y = block.norm1(x) if block.pre else x
        rows = [block.self_attention(y[:, i : i + 1], y[:, : i + 1]).rows for i in range(len(prefix))]
        if block.pre:
            x = x + torch.cat(rows, 1)
            x = x + block.cross_attention(block.norm2(x), memory).rows
            x = x + block.mlp(block.norm3(x))
        else:
            x = block.norm1(x + torch.cat(rows, 1))
            x = block.norm2(x + block.cross_attention(x, memory).rows)
            x = block.norm3(x + block.mlp(x))
    return model.language_head(decoder.decoder.norm(x)[0, -1]).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["plain", "fast"])
def test_likelihoods_are_those_of_one_token_at_a_time(parts, tokenizer, plan):
    model, decoder, batch, table = parts
    question = decoder.question(model, batch, plan)
    found = decoder.log_likelihoods(model, question, table.select(IDS), OF, plan)
    for value, answer, of in zip(found.tolist(), IDS.tolist(), OF.tolist(), strict=True):
        tokens = tokenizer.encode([ANSWERS[answer]], model.config.text_length)[0].tolist()
        wanted = 0.0
        for place in range(1, len(tokens)):
            logits = next_logits(model, decoder, batch, tokens[:place], of)
            wanted += logits[tokens[place]] - np.log(np.exp(logits).sum())
        assert value == pytest.approx(wanted, rel=1e-9)


def test_both_implementations_give_the_same_loss_and_gradients(parts):
    model, decoder, batch, table = parts
    weights = torch.rand(len(OF), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = {}
    for plan in ("plain", "fast"):
        own, theirs = copy.deepcopy((model, decoder))
        question = theirs.question(own, batch, plan)
        loss, accuracy = theirs.loss(own, question, table.select(IDS), OF, weights, plan)
        loss.backward()
        gradients = {n: p.grad for m in (own, theirs) for n, p in m.named_parameters() if p.grad is not None}
        found[plan] = (loss.item(), accuracy.item(), gradients)
        likelihoods = theirs.log_likelihoods(own, question, table.select(IDS), OF, plan)
        assert loss.item() == pytest.approx(-(weights * likelihoods).sum().item(), rel=1e-12)
    assert found["plain"][:2] == pytest.approx(found["fast"][:2], rel=1e-12)
    gradients = found["fast"][2]
    assert not gradients.pop("image_encoder.mask_token").any()  # unused; zeros from the kernel that places tokens
    assert gradients.keys() == found["plain"][2].keys()
    for name, gradient in found["plain"][2].items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-8, atol=1e-12)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("listed, candidates", [(4, 128), (6, 128), (6, 2)])
def test_the_likeliest_candidate_is_chosen(parts, listed, candidates):
    model, decoder, batch, table = parts
    question = decoder.question(model, batch, "plain")
    found = decoder.rank(model, question, table, listed, candidates, "fast")
    for row in range(5):
        all_answers = torch.arange(listed)
        scores = decoder.log_likelihoods(model, question, table.select(all_answers), all_answers * 0 + row, "plain")
        first = next_logits(model, decoder, batch, table.tokens[0, :1].tolist(), row)[table.tokens[:listed, 1]]
        kept = np.argsort(-first, kind="stable")[:candidates]
        assert found[row] == kept[scores[kept].argmax()]


@torch.no_grad()
def test_generated_answers_take_the_likeliest_token_each_time(parts, tokenizer):
    model, decoder, batch, _ = parts
    question = decoder.question(model, batch, "plain")
    found = decoder.generate(model, question, tokenizer, 5, "fast").tolist()
    allowed = [
        i for i in range(tokenizer.vocab_size) if i not in (tokenizer.cls_id, tokenizer.pad_id, tokenizer.mask_id)
    ]
    for row, tokens in enumerate(found):
        prefix = [tokenizer.cls_id]
        while len(prefix) < 5 and prefix[-1] != tokenizer.sep_id:
            logits = next_logits(model, decoder, batch, prefix, row)
            prefix.append(allowed[int(logits[allowed].argmax())])
        assert tokens[: len(prefix) - 1] == prefix[1:]
        assert set(tokens[len(prefix) - 1 :]) <= {tokenizer.sep_id}


@pytest.mark.parametrize("plan", ["plain", "fast"])
def test_questions_without_a_listed_answer_have_no_loss_and_zero_gradients(parts, plan):
    model, decoder, batch, table = copy.deepcopy(parts)
    nothing = torch.empty(0, dtype=torch.int64)
    question = decoder.question(model, batch, plan)
    loss, accuracy = decoder.loss(model, question, table.select(nothing), nothing, torch.empty(0), plan)
    assert (loss.item(), accuracy.item()) == (0, 0)
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in decoder.parameters())

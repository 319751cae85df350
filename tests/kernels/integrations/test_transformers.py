"""Models of transformers with attn_implementation="sdpa_mvlm", compared with transformers' own attention."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    BertConfig,
    BertForMaskedLM,
    BertModel,
    Gemma4TextConfig,
    Gemma4TextModel,
    MPNetConfig,
    MPNetModel,
    ViltConfig,
    ViltModel,
)
from transformers.masking_utils import bidirectional_mask_function, create_bidirectional_mask  # noqa: E402
from transformers.models.bert.modeling_bert import BertCrossAttention, BertSelfAttention  # noqa: E402

from mvlm_kernels import use_backend  # noqa: E402
from mvlm_kernels.integrations import transformers as integration  # noqa: E402
from mvlm_kernels.integrations.calls import (  # noqa: E402
    ALREADY_SWAPPED,
    AttentionCall,
    recorded_calls,
)

NAME = integration.NAME
SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(autouse=True)
def registered() -> None:
    integration.register()


@pytest.fixture
def calls() -> Iterator[list[AttentionCall]]:
    """Every call of the attention function, on the op's torch backend: without a choice a CPU takes SDPA."""
    with use_backend("torch"), recorded_calls() as found:
        yield found


def fused(calls: list[AttentionCall]) -> int:
    """Number of calls that reached the op."""
    return sum(not call.reasons for call in calls)


def config(implementation: str, **changes: Any) -> BertConfig:
    made = BertConfig(hidden_size=64, num_attention_heads=2, attention_probs_dropout_prob=0.0)
    for name, value in changes.items():
        setattr(made, name, value)
    made._attn_implementation = implementation
    return made


def outputs(layer_class: type, padding: torch.Tensor | None, **changes: Any) -> list[torch.Tensor]:
    """Output of one layer under SDPA and under ours, with the mask that transformers makes for each."""
    torch.manual_seed(0)
    hidden, encoded = torch.randn(3, 9, 64), torch.randn(3, 7, 64)
    cross = layer_class is BertCrossAttention
    found = []
    for implementation in ("sdpa", NAME):
        made = config(implementation, **changes)
        torch.manual_seed(1)
        layer = layer_class(made).eval()
        extra: dict[str, Any] = {"encoder_hidden_states": encoded} if cross else {}
        mask = create_bidirectional_mask(config=made, inputs_embeds=hidden, attention_mask=padding, **extra)
        if implementation == NAME and padding is not None:
            assert mask is not None
            assert mask.shape == (3, 1, 9, padding.shape[1])
            assert mask.untyped_storage().nbytes() == padding.numel()  # a view: expanded, not copied
        found.append(layer(hidden, attention_mask=mask, **extra)[0])
    return found


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_bert_cross_attention_with_key_padding_equals_sdpa(backend: Any, calls: list[AttentionCall]):
    padding = torch.arange(7) < torch.tensor([[7], [3], [1]])
    with use_backend(backend):
        torch.testing.assert_close(*outputs(BertCrossAttention, padding.long()))
        torch.testing.assert_close(*outputs(BertCrossAttention, None))
    assert fused(calls) == 2


def test_head_width_without_kernel_goes_to_sdpa(calls: list[AttentionCall]):
    padding = (torch.arange(9) < torch.tensor([[9], [3], [5]])).long()
    torch.testing.assert_close(*outputs(BertSelfAttention, padding))
    assert fused(calls) == 1
    torch.testing.assert_close(*outputs(BertSelfAttention, padding, num_attention_heads=16))  # width 4
    assert fused(calls) == 1


def built(model_class: Any, made: Any, implementation: str) -> Any:
    torch.manual_seed(1)
    return model_class._from_config(made, attn_implementation=implementation).eval()


@pytest.mark.extended
@pytest.mark.slow
@pytest.mark.plain_empty
def test_compiled_bert_recognises_key_padding(calls: list[AttentionCall]):
    ids = torch.arange(24).view(2, 12)
    padding = (torch.arange(12) < torch.tensor([[12], [6]])).long()
    made = BertConfig(vocab_size=99, **SIZES)
    eager = built(BertModel, made, "eager")(ids, padding)[0]
    compiled = torch.compile(built(BertModel, made, NAME), fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, padding)[0], eager)
    assert fused(calls) == 2


@pytest.mark.extended
@pytest.mark.slow
@pytest.mark.plain_empty
def test_compiled_bert_makes_one_graph_for_all_lengths_on_a_cpu():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled: Any = torch.compile(
        built(BertModel, BertConfig(vocab_size=99, **SIZES), NAME), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for length in (10, 65, 300):
        padding = torch.ones(3, length, dtype=torch.long)
        padding[1, length // 2 :] = 0
        compiled(torch.randint(99, (3, length)), padding)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_exported_bert_runs_at_other_batches_and_lengths():
    made = BertConfig(vocab_size=99, **SIZES)
    model, eager = built(BertModel, made, NAME), built(BertModel, made, "eager")
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=512)
    sizes = {0: batch, 1: length}
    example = torch.arange(24).view(2, 12), torch.ones(2, 12, dtype=torch.long)
    exported = torch.export.export(
        model, example, dynamic_shapes={"input_ids": sizes, "attention_mask": sizes}, strict=False
    ).module()
    for rows, columns in ((3, 24), (2, 65), (5, 300)):
        ids, padding = torch.randint(99, (rows, columns)), torch.ones(rows, columns, dtype=torch.long)
        padding[1, columns // 2 :] = 0
        torch.testing.assert_close(exported(ids, padding)[0], eager(ids, padding)[0], rtol=1e-4, atol=1e-4)


def test_mask_is_made_where_a_model_asks_for_one():
    # T5Gemma2 joins its encoder's and decoder's masks, so None would be an error there.
    made = integration.mask(2, 3, 5, mask_function=bidirectional_mask_function, allow_is_bidirectional_skip=False)
    assert made is not None
    assert made.shape == (2, 1, 3, 5)
    assert made.all()
    assert (
        integration.mask(2, 3, 5, mask_function=bidirectional_mask_function, allow_is_bidirectional_skip=True) is None
    )


def test_mask_takes_the_keys_from_the_offset_and_pads_a_static_cache():
    padding = torch.tensor([[1, 0, 1, 1]])
    made = integration.mask(1, 2, 5, kv_offset=1, mask_function=bidirectional_mask_function, attention_mask=padding)
    assert made is not None
    assert made[0, 0].tolist() == [[False, True, True, False, False]] * 2


@pytest.mark.parametrize("implementation", ["mvlm", NAME])
@pytest.mark.parametrize(
    "model_class, made",
    [(MPNetModel, MPNetConfig(vocab_size=99, **SIZES)), (ViltModel, ViltConfig(vocab_size=99, image_size=32, **SIZES))],
    ids=["mpnet", "vilt"],
)
def test_models_without_attention_interface_are_refused(model_class: Any, made: Any, implementation: str):
    # They add the mask to their scores, so a bool mask would hide nothing.
    with pytest.raises(ValueError, match=r"does not support an attention implementation|is not supported"):
        built(model_class, made, implementation)


def test_register_refuses_a_name_that_transformers_does_not_check():
    with pytest.raises(ValueError, match=r'name must contain "sdpa", got .mvlm.'):
        integration.register("mvlm")


def test_swap_reports_what_it_did_and_undo_puts_it_back(calls: list[AttentionCall]):
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=99, **SIZES)).eval()
    ids, names = torch.arange(24).view(2, 12), set(model.state_dict())
    wanted = model(ids)[0]
    report = integration.swap(model)
    assert str(report) == "swapped: the model (BertForMaskedLM)"
    torch.testing.assert_close(model(ids)[0], wanted)
    assert fused(calls) == 2
    assert set(model.state_dict()) == names
    report.undo()
    assert model.config._attn_implementation == "sdpa"
    model(ids)
    assert len(calls) == 2


def test_second_swap_is_refused_and_undoing_both_restores_the_first():
    """In either order; under another name too."""
    for again in (NAME, "sdpa_of_another_name"):
        for turn in (1, -1):
            model = BertModel(BertConfig(vocab_size=99, **SIZES))
            reports = integration.swap(model), integration.swap(model, again)
            assert [part.reason for part in reports[1].parts] == [ALREADY_SWAPPED]
            for report in reports[::turn]:
                report.undo()
            assert model.config._attn_implementation == "sdpa"


def test_swap_keeps_parts_that_cannot_change_with_a_reason():
    model = torch.nn.ModuleList([
        MPNetModel(MPNetConfig(vocab_size=99, **SIZES)),
        BertModel(BertConfig(vocab_size=99, **SIZES)),
        Gemma4TextModel(Gemma4TextConfig(vocab_size=99, vocab_size_per_layer_input=99, head_dim=32, **SIZES)),
        transformers.SplinterModel(transformers.SplinterConfig(vocab_size=99, **SIZES)),
    ])  # fmt: skip
    report = integration.swap(model)
    assert [(part.path, part.kind) for part in report.swapped] == [("1", "BertModel")]
    reasons = [part.reason or "" for part in report.kept]
    assert "MPNetModel does not call transformers' attention interface" in reasons[0]
    assert 'asks for "sdpa" by name' in reasons[1]
    assert "SplinterModel does not support" in reasons[2]
    with pytest.raises(ValueError, match="must hold a transformers PreTrainedModel, got Linear"):
        integration.swap(torch.nn.Linear(1, 1))


def test_models_that_ask_for_sdpa_by_name_are_refused_when_they_run():
    # With the last two logits alone this model cuts its queries. Only under the name "sdpa" it then makes a mask.
    torch.manual_seed(0)
    made = Gemma4TextConfig(vocab_size=99, vocab_size_per_layer_input=99, head_dim=32, **SIZES)
    model = built(Gemma4TextModel, made, NAME)
    with pytest.raises(ValueError, match='must have attn_implementation="sdpa" or "eager"'):
        model(torch.arange(6)[None])


SCORE_OPTIONS = ["softcap", "s_aux", "sinks", "indices", "block_indices", "cu_seq_lens_q", "an_argument_of_tomorrow"]


@pytest.mark.parametrize("option", SCORE_OPTIONS)
def test_score_options_that_the_op_lacks_are_refused(option: str):
    q, k, v = torch.randn(3, 2, 2, 5, 32)
    given: dict[str, Any] = {option: 50.0 if option == "softcap" else torch.zeros(2)}
    harmless: dict[str, Any] = {"position_ids": torch.arange(5), "use_cache": False}
    absent: dict[str, Any] = {option: None}
    module = torch.nn.Module()
    with pytest.raises(ValueError, match=f"{option} must be None"):
        integration.attention(module, q, k, v, None, is_causal=False, **given)
    integration.attention(module, q, k, v, None, is_causal=False, **absent, **harmless)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"position_bias": torch.zeros(1, 2, 5, 5)}, "there is a position_bias"),
        ({"sliding_window": 3}, "there is a sliding_window"),
        ({"output_attentions": True}, "the op returns no probabilities"),
        ({"is_causal": True}, "the module is causal"),
        ({"attention_mask": torch.zeros(2, 1, 5, 5)}, "the mask is not plain key padding"),
        ({"value": torch.zeros(2, 2, 5, 16)}, "head widths differ: 32, 32 and 16"),
        ({"query": torch.zeros(1, 2, 5, 32)}, "batches and lengths"),
        ({}, "the tensors are on the CPU"),
    ],
)
def test_every_way_to_sdpa_has_a_reason(changes: dict[str, Any], reason: str):
    q, k, v = torch.randn(3, 2, 2, 5, 32)
    given: dict[str, Any] = {"query": q, "key": k, "value": v, "attention_mask": None, "is_causal": False} | changes
    found = integration.why_not_fused(torch.nn.Module(), **given)
    assert any(reason in text for text in found), found
    if changes:
        with use_backend("torch"):
            assert len(integration.why_not_fused(torch.nn.Module(), **given)) == 1


def test_dropout_in_training_is_computed_by_the_op(calls: list[AttentionCall]):
    """Also with grouped heads: the model's 4 query heads share 2 key heads."""
    v = torch.eye(32).expand(2, 2, 32, 32)
    q, k = torch.zeros(2, 4, 9, 32), torch.zeros(2, 2, 32, 32)
    out, _ = integration.attention(torch.nn.Module(), q, k, v, None, is_causal=False, dropout=0.25)
    assert fused(calls) == 1
    # Of 32 equal probabilities each shows itself in a column: 0, or a third more than without a dropout.
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 32 / 0.75).item()}
    assert 0.2 < float((out == 0).double().mean()) < 0.3


def test_mask_of_two_dimensions_is_refused():
    q, k, v = torch.randn(3, 2, 2, 5, 32)
    with pytest.raises(ValueError, match=r"attention_mask must have shape .*, got \(2, 5\)"):
        integration.attention(torch.nn.Module(), q, k, v, torch.ones(2, 5, dtype=torch.bool), is_causal=False)


@pytest.mark.parametrize("causal", [False, True])
def test_masks_that_differ_between_queries_go_to_sdpa(causal: bool, calls: list[AttentionCall]):
    q, k, v = torch.randn(3, 2, 2, 5, 32)
    mask = torch.rand(2, 1, 5, 5) < 0.5
    mask[..., 0] = True
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    out, _ = integration.attention(torch.nn.Module(), q, k, v, mask, is_causal=causal)
    torch.testing.assert_close(out, wanted.transpose(1, 2))
    assert not fused(calls)

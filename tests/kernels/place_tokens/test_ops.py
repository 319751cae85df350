"""place_tokens as an op: registration, compilation, errors, and the text of explain."""

import pytest
import torch

from mvlm_kernels import dispatch, explain, use_backend
from mvlm_kernels.aot_cases import CASES
from mvlm_kernels.dispatch import ON_CPU
from mvlm_kernels.place_tokens import place_tokens
from support.kernels.token_placement import case


@pytest.mark.slow
@pytest.mark.plain_empty
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_place_tokens_passes_opcheck(backend):
    with use_backend(backend):
        for mode in ("masked", "both", "visible"):
            inputs, options = case(2, 3, 4, mode, visible=2)
            args = [x.requires_grad_() for x in inputs] + [
                options.get("masked"),
                options.get("visible_ids"),
                mode == "both",
            ]
            torch.library.opcheck(torch.ops.mvlm_kernels.place_tokens.default, tuple(args))


@pytest.mark.slow
@pytest.mark.plain_empty
def test_place_tokens_compiles_without_a_break_for_any_size():
    compiled = torch.compile(place_tokens, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, num_patches in ((2, 3), (3, 5)):
        inputs, options = case(batch, num_patches, 4, "masked")
        x = [i.requires_grad_() for i in inputs]
        with use_backend("triton"):
            got, want = compiled(*x, **options), place_tokens(*x, **options)
            grads = [torch.autograd.grad(out.square().sum(), x) for out in (got, want)]
        assert torch.equal(got, want)
        for a, b in zip(*grads, strict=True):
            assert torch.equal(a, b)


TOKENS, TOKEN, POS = torch.zeros(2, 3, 4), torch.zeros(4), torch.zeros(4, 4)
IDS = torch.tensor([[0, 1, 2], [0, 1, 2]])


@pytest.mark.parametrize(
    "args, kwargs, message",
    [
        ((TOKENS[0], TOKEN, POS, TOKEN), {}, r"tokens must have shape \(B, N, C\), got \(3, 4\)"),
        ((TOKENS, TOKEN[:3], POS, TOKEN), {}, r"mask_token must have shape \(4,\) or \(1, 1, 4\), got \(3,\)"),
        ((TOKENS, TOKEN, POS, TOKEN[None]), {}, r"cls_token must have shape \(4,\) or \(1, 1, 4\), got \(1, 4\)"),
        ((TOKENS, TOKEN, POS[:, :3], TOKEN), {}, r"pos_embed must have shape \(1\+N, 4\) .*, got \(4, 3\)"),
        ((TOKENS, TOKEN, POS[:3], TOKEN), {}, r"tokens must have N = 2 rows, .*, got \(2, 3, 4\)"),
        ((TOKENS.int(), TOKEN, POS, TOKEN), {}, "tokens must be float16, .*, got torch.int32"),
        ((TOKENS, TOKEN.to("meta"), POS, TOKEN), {}, "mask_token must be on the device"),
        ((TOKENS, TOKEN, POS, TOKEN), {"masked": torch.zeros(2, 2).bool()}, r"masked must be bool of shape \(2, 3\)"),
        ((TOKENS, TOKEN, POS, TOKEN), {"masked": torch.zeros(2, 3)}, "masked must be bool of shape .* torch.float32"),
        ((TOKENS, TOKEN, POS, TOKEN), {"masked": IDS.bool(), "visible_ids": IDS}, "masked must be None where visible"),
        ((TOKENS, TOKEN, POS, TOKEN), {"with_unmasked": True}, "masked must be given where with_unmasked is True"),
        ((TOKENS, TOKEN, POS, TOKEN), {"visible_ids": IDS[:, :2]}, "visible_ids must have one id for each of the 3"),
        ((TOKENS, TOKEN, POS, TOKEN), {"visible_ids": IDS.float()}, "visible_ids must be int32 or int64, got"),
        ((TOKENS, TOKEN, POS, TOKEN), {"visible_ids": IDS + 1}, r"visible_ids must be in \[0, 3\), got .* \[1, 3\]"),
        ((TOKENS, TOKEN, POS, TOKEN), {"visible_ids": IDS * 0}, "visible_ids must be distinct within a row, got 0"),
    ],
)
def test_bad_input_of_place_tokens_says_what_was_wanted(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        place_tokens(*args, **kwargs)


def test_explain_names_reasons_of_place_tokens():
    assert explain(place_tokens, TOKENS, TOKEN, POS, TOKEN).reasons == (ON_CPU,)


def test_launchers_of_place_tokens_read_no_tensor():
    launched = []
    with dispatch.recording(lambda kernel, *_: launched.append(kernel.__name__), 90):
        for _, launch in CASES["place_tokens"]():
            launch()  # meta tensors: reading one on the host would raise
    assert {"place_kernel", "place_backward_kernel", "column_sum_kernel", "reader_lists_kernel"} <= set(launched)

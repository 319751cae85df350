"""Categories of a step's kernels."""

import pytest
import torch

from mvlm_benchmarks.gpu.categories import OURS, Span, by_category, category_of, profile_call


@pytest.mark.parametrize(
    "name, category",
    [
        ("short_kv_backward", OURS),
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<cutlass::bfloat16_t>", "attention (SDPA)"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma", "attention (SDPA)"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>", "norms"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluFunctor>", "elementwise and sums"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("Memcpy DtoD (Device -> Device)", "copies and fills"),
        ("void cub::DeviceRadixSortOnesweepKernel", "indexing, sorting, joining"),
        ("strange", "other"),
    ],
)
def test_kernel_has_its_category(name: str, category: str) -> None:
    assert category_of(name) == category


def test_shares_and_idle_time_match_a_count_by_hand() -> None:
    """10 us: a product of 4, then 2 of nothing, then two overlapping kernels from 6 to 10 and from 8 to 10."""
    spans = [Span("gather_kernel", 8, 10), Span("gemm", 0, 4), Span("strange", 6, 10)]
    rows = {row["category"]: row for row in by_category(spans)}
    assert list(rows) == [OURS, "matrix products", "other", "idle"]
    assert [rows[name]["ms"] for name in rows] == [0.002, 0.004, 0.004, 0.002]
    assert rows["idle"]["pct"] == 20
    assert (rows["matrix products"]["kernels"], rows["matrix products"]["longest"]) == (1, "gemm")
    assert by_category([]) == []


def test_operators_that_others_call_do_not_count_twice() -> None:
    names = [
        span.name
        for span in profile_call(lambda: torch.nn.functional.linear(torch.ones(2, 3), torch.ones(4, 3)), "cpu")
    ]
    assert names == ["aten::ones", "aten::ones", "aten::linear"]

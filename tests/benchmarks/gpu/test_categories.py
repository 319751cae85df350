"""Categories of a step's kernels."""

from types import SimpleNamespace

import pytest
import torch

from mvlm_benchmarks.gpu import categories
from mvlm_benchmarks.gpu.categories import OURS, Span, by_category, category_of, our_kernels
from mvlm_benchmarks.kernels import checks


def test_names_of_our_kernels_are_found() -> None:
    assert {"short_kv_forward", "gather_kernel", "place_backward_kernel", "loss_kernel"} <= our_kernels()


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


def test_annotations_are_no_kernels(monkeypatch) -> None:
    """An optimizer annotates its step, from its first kernel to its last."""

    def event(name: str, start: float, end: float, annotation: bool = False) -> SimpleNamespace:
        when = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(
            name=name, device_type="DeviceType.CUDA", time_range=when, is_user_annotation=annotation,
            device_resource_id=7,
        )  # fmt: skip

    class Profile:
        def __init__(self, activities: object) -> None: ...
        def __enter__(self) -> "Profile":
            return self

        def __exit__(self, *_: object) -> None: ...
        def events(self) -> list[SimpleNamespace]:
            annotated = event("Optimizer.step#AdamW.step", 0, 9, annotation=True)
            return [annotated, event("adam_one", 0, 2), event("adam_two", 7, 9)]

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for module in (categories, torch.profiler):
        monkeypatch.setattr(module, "profile", Profile)
    rows = {row["category"]: row for row in by_category(categories.profile_call(lambda: None, "cuda"))}
    assert (rows["optimizer"]["ms"], rows["optimizer"]["kernels"], rows["idle"]["ms"]) == (0.004, 2, 0.005)
    assert checks.launched_kernels(lambda: None) == [("adam_one", 7), ("adam_two", 7)]


def test_shares_and_idle_time_match_a_count_by_hand() -> None:
    """10 us: a product of 4, then 2 of nothing, then two overlapping kernels from 6 to 10 and from 8 to 10."""
    spans = [Span("gather_kernel", 8, 10), Span("gemm", 0, 4), Span("strange", 6, 10)]
    rows = {row["category"]: row for row in by_category(spans)}
    assert list(rows) == [OURS, "matrix products", "other", "idle"]
    assert [rows[name]["ms"] for name in rows] == [0.002, 0.004, 0.004, 0.002]
    assert rows["idle"]["pct"] == 20
    assert (rows["matrix products"]["kernels"], rows["matrix products"]["longest"]) == (1, "gemm")
    assert by_category([]) == []

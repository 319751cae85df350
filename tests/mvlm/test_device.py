"""Choice of device and precision."""

from operator import attrgetter

import pytest
import torch

from mvlm import device as devices
from mvlm.device import autocast, choose_device, deterministic_kernels, has_fast_bf16
from mvlm.errors import ConfigError

CPU = torch.device("cpu")


@pytest.mark.parametrize("available", [False, True])
def test_the_default_device_is_the_gpu_if_there_is_one(monkeypatch, available):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert choose_device().type == choose_device("auto").type == ("cuda" if available else "cpu")
    assert choose_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    "call, name",
    [
        *((lambda name=name: choose_device(name), "device") for name in ("cuda", "gpu")),
        *((lambda name=name: autocast(CPU, name), "precision") for name in ("fp16", "bfloat16", "BF16", "")),
    ],
)
def test_a_device_that_is_not_here_and_an_unknown_precision_are_refused(monkeypatch, call, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=name):
        call()


@pytest.mark.parametrize(
    "capability, avx512_bf16, amx, fast",
    [
        ("AVX512", True, False, True),
        ("AVX512", False, True, True),
        ("AVX512", False, False, False),
        ("AVX2", True, True, False),  # torch is configured not to use AVX512
        ("DEFAULT", False, False, False),
    ],
)
def test_bf16_is_fast_on_a_cpu_with_avx512_bf16_or_amx(monkeypatch, capability, avx512_bf16, amx, fast):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert has_fast_bf16(CPU) is fast


@pytest.mark.parametrize(
    "precision, fast, wanted",
    [
        ("auto", True, torch.bfloat16),
        ("auto", False, torch.float32),
        ("bf16", False, torch.bfloat16),
        ("fp32", True, torch.float32),
    ],
)
def test_autocast_follows_the_precision(monkeypatch, precision, fast, wanted):
    monkeypatch.setattr(devices, "has_fast_bf16", lambda device: fast)
    a = torch.ones(4, 4)
    with autocast(CPU, precision):
        assert (a @ a).dtype == wanted
    assert (a @ a).dtype == torch.float32


def test_determinism_on_a_gpu_leaves_out_cudnn_attention_and_is_undone(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # so that the test's own value is restored

    def settings() -> tuple[object, ...]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            attrgetter("fill_uninitialized_memory")(torch.utils.deterministic),
            torch.backends.cuda.cudnn_sdp_enabled(),
        )

    before = settings()
    with deterministic_kernels(torch.device("cpu")):
        assert settings() == before
    with deterministic_kernels(torch.device("cuda")):
        assert settings() == (True, True, False, False)
    assert settings() == before == (False, False, True, True)

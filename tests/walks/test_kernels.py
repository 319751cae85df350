"""Models of others and kernels of one's own, with the package of kernels alone, as the guides on kernels say."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mvlm_kernels import cross_attention, use_backend


@pytest.mark.slow
def test_a_model_of_timm_takes_bytes_and_warns_of_normalised_floats():
    timm = pytest.importorskip("timm")
    from mvlm_kernels.integrations.timm import swap

    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=96).eval()
    images = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    normalised = (images / 255 - 0.5) / 0.25
    with torch.no_grad():
        wanted = model(normalised)
        report = swap(model, mean=(0.5,) * 3, std=(0.25,) * 3)
        torch.testing.assert_close(model(images), wanted, rtol=0, atol=1e-5)
        with pytest.warns(UserWarning, match="images"):
            model(normalised)
        report.undo()
        assert torch.equal(model(normalised), wanted)


@pytest.mark.slow
def test_a_bert_with_a_head_learns_the_same_after_a_swap():
    transformers = pytest.importorskip("transformers")
    from mvlm_kernels.integrations.transformers import swap

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=50, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes)
    library = transformers.BertForSequenceClassification(config)
    ours = copy.deepcopy(library)
    swap(ours)
    words = torch.randint(50, (4, 9))
    exists, labels = torch.arange(9) < torch.tensor([[9], [4], [7], [2]]), torch.tensor([0, 1, 1, 0])
    for model in (library, ours):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            with use_backend("torch"):
                model(words, attention_mask=exists, labels=labels).loss.backward()
            optimizer.step()
    for name, value in library.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=1e-5)


def test_a_cross_attention_model_of_ones_own():
    class Reader(nn.Module):
        def __init__(self, fused: bool) -> None:
            super().__init__()
            self.fused, self.query, self.pair = fused, nn.Linear(32, 32), nn.Linear(32, 64)

        def forward(self, patches, words, exists):
            q, k, v = (x.unflatten(-1, (2, 16)) for x in (self.query(patches), *self.pair(words).chunk(2, -1)))
            if self.fused:
                return cross_attention(q, k, v, key_mask=exists).flatten(2)
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=exists[:, None, None]).transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    ours, theirs = Reader(True), Reader(False)
    ours.load_state_dict(theirs.state_dict())
    inputs = torch.randn(3, 20, 32), torch.randn(3, 6, 32), torch.arange(6) < torch.tensor([[6], [2], [4]])
    for model in (ours, theirs):
        model(*inputs).square().sum().backward()
    torch.testing.assert_close(ours(*inputs), theirs(*inputs))
    for found, wanted in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="heads"):
        cross_attention(*(torch.randn(3, 2, length, 16) for length in (20, 6, 6)))


KERNEL = """
import pytest, torch, triton
import triton.language as tl

@triton.jit
def norm(x_ptr, w_ptr, out_ptr, width, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * width + i, mask=i < width, other=0.0)
    w = tl.load(w_ptr + i{mask})
    y = x * tl.rsqrt(tl.sum(x * x) / width + 1e-6) * w
    tl.store(out_ptr + tl.program_id(0) * width + i, y, mask=i < width)

def test_norm():
    torch.manual_seed(0)
    x, w = torch.randn(40, 100), torch.randn(100)
    out = torch.empty_like(x)
    norm[(40,)](x, w, out, 100, BLOCK=128{options})
    wanted = x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt() * w
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
"""


@pytest.mark.extended
@pytest.mark.slow
def test_a_kernel_of_ones_own_is_proved_step_by_step(tmp_path: Path):
    """Each finding says how to go on: a mask, and then no fused product in a sum."""
    for number, (values, said) in enumerate((
        ({"mask": "", "options": ""}, "past the end of w_ptr (400 bytes)"),
        ({"mask": ", mask=i < width", "options": ""}, "enable_fp_fusion=False"),
        ({"mask": ", mask=i < width", "options": ", enable_fp_fusion=False"}, "1 passed"),
    )):  # fmt: skip
        file = tmp_path / f"test_norm_{number}.py"
        file.write_text(KERNEL.replace("{mask}", values["mask"]).replace("{options}", values["options"]))
        words = ["-m", "triton_proof", file.name, "--proof", "sm_90", "-q", "-c", os.devnull, "-p", "no:cacheprovider"]
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=tmp_path, check=False)
        assert said in done.stdout, done.stdout[-2000:] + done.stderr[-1000:]
        assert (done.returncode == 0) == (number == 2)

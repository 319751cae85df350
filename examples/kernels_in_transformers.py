"""Kernels in a model of transformers: the attention of a text encoder, and of a model whose masks are causal.

    python examples/kernels_in_transformers.py

Prints, for each model, what was swapped, how many calls of attention the op computed, why it left the others to SDPA,
and the largest difference from the original (rounding, below 1e-5).
"""

from contextlib import nullcontext

import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

from mvlm_kernels import use_backend
from mvlm_kernels.integrations.calls import recorded_calls
from mvlm_kernels.integrations.transformers import swap

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
models = [
    BertModel(BertConfig(vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)),
    GPT2Model(GPT2Config(vocab_size=99, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)),
]  # or BertModel.from_pretrained(...)
ids = torch.randint(99, (4, 24), device=device)
exists = torch.arange(24, device=device) < torch.tensor([[24], [9], [17], [5]], device=device)

fused, differences = [], []
for model in models:
    model = model.to(device).eval()
    with torch.no_grad():
        wanted = model(ids, attention_mask=exists).last_hidden_state
    report = swap(model)
    print(report)
    # Without a GPU a swapped model keeps the library's attention, which is as fast there. This asks for the op anyway.
    anyway = nullcontext() if device == "cuda" else use_backend("torch")
    with torch.no_grad(), anyway, recorded_calls() as calls:
        found = model(ids, attention_mask=exists).last_hidden_state
    report.undo()

    # A call with reasons was left to SDPA.
    fused.append(len([call for call in calls if not call.reasons]))
    print(f"{fused[-1]} of {len(calls)} calls by the op")
    for reason in {reason for call in calls for reason in call.reasons}:
        print(f"SDPA: {reason}")
    differences.append((found - wanted)[exists].abs().max().item())
    print(f"states of existing tokens differ by {differences[-1]:.0e}\n")

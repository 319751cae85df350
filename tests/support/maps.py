"""Attention written out, for tests of maps of words."""

from typing import Any

from torch import Tensor

from mvlm.model.attention import Attention, Branch


def written_out(seen: list[Tensor], attention: Attention) -> Any:
    """Forward of an attention layer by an explicit softmax, which is appended to `seen` and keeps its gradient.

    It is (B, heads, rows of x, rows of memory).
    """

    def forward(x: Tensor, memory: Tensor, key_mask: Tensor | None = None) -> Branch:
        q, k, v = (
            projection(rows).unflatten(-1, (2, -1)).transpose(1, 2)
            for projection, rows in ((attention.query, x), (attention.key, memory), (attention.value, memory))
        )
        p = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        p.retain_grad()
        seen.append(p)
        return Branch(attention.out((p @ v).transpose(1, 2).flatten(2)))

    return forward


def spans_of(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """(first, last + 1) of the tokens of [CLS] and of each word of a text, by encoding the words one by one."""
    spans, position = [(0, 1)], 1
    for word in text.split():
        length = len(tokenizer.encode([word], 40)[0]) - 2
        spans.append((position, position + length))
        position += length
    return spans

"""Peers of cross_attention that take packed sequences, and cuDNN through its own frontend.

Layouts are converted as in :mod:`mvlm_benchmarks.kernels.attention_peers`.
"""

from typing import Any

import torch
from torch import Tensor

from mvlm_benchmarks.kernels.attention_peers import Function, Side, require_cuda
from mvlm_benchmarks.kernels.inputs import Inputs


def xformers(inputs: Inputs) -> Function:
    from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]
    from xformers.ops.fmha import attn_bias  # pyright: ignore[reportMissingImports]

    return _block_diagonal(inputs, memory_efficient_attention, attn_bias)


def mslk(inputs: Inputs) -> Function:
    """MSLK, where the attention kernels of xformers moved."""
    from mslk.attention.fmha import attn_bias, memory_efficient_attention  # pyright: ignore[reportMissingImports]

    return _block_diagonal(inputs, memory_efficient_attention, attn_bias)


def _block_diagonal(inputs: Inputs, attention: Any, attn_bias: Any) -> Function:
    """memory_efficient_attention. Lengths and packed keys become block-diagonal masks over one flat sequence."""
    require_cuda(inputs)
    queries, keys = Side(inputs, "q"), Side(inputs, "k")
    if not queries.ragged and not keys.ragged:
        return lambda q, k, v: attention(q, keys.padded(k), keys.padded(v))
    lengths_q, lengths_k = queries.lengths.tolist(), keys.lengths.tolist()
    if keys.is_packed or queries.is_packed:
        bias = attn_bias.BlockDiagonalMask.from_seqlens(lengths_q, lengths_k)

        def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x[None] for x in (queries.packed(q), keys.packed(k), keys.packed(v)))
            return queries.from_packed(attention(q, k, v, attn_bias=bias)[0])

        return packed
    bias = attn_bias.BlockDiagonalPaddedKeysMask.from_seqlens(
        lengths_q, kv_padding=keys.longest, kv_seqlen=lengths_k
    )  # fmt: skip

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (keys.padded(x).flatten(0, 1)[None] for x in (k, v))
        return queries.from_packed(attention(queries.packed(q)[None], k, v, attn_bias=bias)[0])

    return padded


def flash_attn_2(inputs: Inputs) -> Function:
    from flash_attn import flash_attn_func, flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return _flash_attn(inputs, flash_attn_func, flash_attn_varlen_func)


def flash_attn_4(inputs: Inputs) -> Function:
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return _flash_attn(inputs, flash_attn_func, flash_attn_varlen_func)


def _flash_attn(inputs: Inputs, dense_attention: Any, packed_attention: Any) -> Function:
    require_cuda(inputs)
    queries, keys = Side(inputs, "q"), Side(inputs, "k")
    if not queries.ragged and not keys.ragged:
        return lambda q, k, v: _output(dense_attention(q, keys.padded(k), keys.padded(v)))
    arguments = {
        "cu_seqlens_q": queries.cu_seqlens, "cu_seqlens_k": keys.cu_seqlens, "max_seqlen_q": queries.longest,
        "max_seqlen_k": keys.longest,
    }  # fmt: skip

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return queries.from_packed(
            _output(packed_attention(queries.packed(q), keys.packed(k), keys.packed(v), **arguments))
        )

    return attend


def _output(result: Any) -> Tensor:
    """The output alone; flash-attn 4 returns (output, log-sum-exp)."""
    return result[0] if isinstance(result, tuple) else result


def varlen(inputs: Inputs) -> Function:
    """torch's own attention of packed sequences."""
    from torch.nn.attention.varlen import varlen_attn

    require_cuda(inputs)
    queries, keys = Side(inputs, "q"), Side(inputs, "k")
    bounds = queries.cu_seqlens, keys.cu_seqlens, queries.longest, keys.longest

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Any = varlen_attn(queries.packed(q), keys.packed(k), keys.packed(v), *bounds)
        return queries.from_packed(out)

    return attend


def cudnn_frontend(inputs: Inputs) -> Function:
    """cuDNN's attention through its frontend. Ragged keys get its padding mask, which torch SDPA does not use."""
    import cudnn  # pyright: ignore[reportMissingImports]

    require_cuda(inputs)
    queries, keys = Side(inputs, "q"), Side(inputs, "k")
    q, k = (side.padded(inputs.leaves[name].detach()) for name, side in (("q", queries), ("k", keys)))
    graphs = _CudnnGraphs(cudnn, q.transpose(1, 2), k.transpose(1, 2), queries, keys)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (queries.padded(q), keys.padded(k), keys.padded(v)))
        out: Any = _CudnnAttention.apply(graphs, q, k, v)
        return queries.from_padded(out.transpose(1, 2))

    return attend


class _CudnnGraphs:
    """cuDNN graphs of forward and backward for one shape. q (R, H, Lq, D), k (R, H, Lk, D), strided as given."""

    def __init__(self, cudnn: Any, q: Tensor, k: Tensor, queries: Side, keys: Side) -> None:
        self._cudnn, self._handle = cudnn, cudnn.create_handle()
        stats = torch.empty(*q.shape[:3], 1, device=q.device, dtype=torch.float32)
        options: dict[str, Any] = {"attn_scale": q.shape[-1] ** -0.5}
        self._lengths: list[Tensor] = []
        if keys.ragged:
            self._lengths = [side.lengths.int().view(-1, 1, 1, 1) for side in (queries, keys)]

        def graph() -> tuple[Any, dict[str, Any], list[Any]]:
            io = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}[q.dtype]
            single = cudnn.data_type.FLOAT
            made = cudnn.pygraph(io_data_type=io, intermediate_data_type=single, compute_data_type=single)
            lengths = [made.tensor_like(x) for x in self._lengths]
            names = dict(zip(("seq_len_q", "seq_len_kv"), lengths, strict=False))
            return made, options | names | {"use_padding_mask": bool(lengths)}, lengths

        def finish(made: Any, outputs: list[tuple[Any, Tensor]]) -> Tensor:
            for output, like in outputs:
                output.set_output(True).set_dim(list(like.shape)).set_stride(list(like.stride()))
            made.validate()
            made.build_operation_graph()
            made.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
            made.check_support()
            made.build_plans()
            return torch.empty(max(1, made.get_workspace_size()), device=q.device, dtype=torch.uint8)

        made, arguments, lengths = graph()
        inputs = [made.tensor_like(x) for x in (q, k, k)]
        out, saved = made.sdpa(*inputs, generate_stats=True, name="forward", **arguments)
        saved.set_data_type(cudnn.data_type.FLOAT)
        self._forward = made, [*inputs, out, saved, *lengths], finish(made, [(out, q), (saved, stats)])

        made, arguments, lengths = graph()
        inputs = [made.tensor_like(x) for x in (q, k, k, q, q, stats)]
        gradients = made.sdpa_backward(*inputs, name="backward", **arguments)
        workspace = finish(made, list(zip(gradients, (q, k, k), strict=True)))
        self._backward = made, [*inputs, *gradients, *lengths], workspace

    def forward(self, *tensors: Tensor) -> None:
        self._execute(self._forward, tensors)

    def backward(self, *tensors: Tensor) -> None:
        self._execute(self._backward, tensors)

    def _execute(self, plan: tuple[Any, list[Any], Tensor], tensors: tuple[Tensor, ...]) -> None:
        made, names, workspace = plan
        self._cudnn.set_stream(handle=self._handle, stream=torch.cuda.current_stream().cuda_stream)
        made.execute(dict(zip(names, (*tensors, *self._lengths), strict=True)), workspace, handle=self._handle)


class _CudnnAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graphs: _CudnnGraphs, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        stats = torch.empty(*q.shape[:3], 1, device=q.device, dtype=torch.float32)
        graphs.forward(q, k, v, out, stats)
        ctx.save_for_backward(q, k, v, out, stats)
        ctx.graphs = graphs
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, stats = ctx.saved_tensors
        incoming = torch.empty_like(q).copy_(grads[0])
        gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        ctx.graphs.backward(q, k, v, out, incoming, stats, *gradients)
        return None, *gradients

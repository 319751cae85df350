"""Table of wrong and borderline inputs of every op: a clear error, or the right result.

An error names the argument, what was wanted and what was found, on one line.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from mvlm_kernels import (
    add_layer_norm,
    cross_attention,
    explain,
    gather_patches,
    gelu_linear,
    linear_pixel_loss,
    masked_pixel_loss,
    pack_key_mask,
    place_tokens,
    use_backend,
)
from mvlm_kernels.cross_attention import invert_key_index

G = torch.Generator().manual_seed(0)


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=G)


Q, K, V = rand(2, 9, 2, 32), rand(2, 5, 2, 32), rand(2, 5, 2, 32)
ROWS = rand(8, 2, 32)  # packed keys
PIXELS = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=G)
IDS = torch.tensor([[0, 3, 15], [7, 1, 2]])
PRED, HIDDEN, WEIGHT = rand(2, 3, 192), rand(2, 3, 16), rand(192, 16)
TOKENS, ROW, POSITIONS, MIX = rand(2, 16, 8), rand(8), rand(17, 8), rand(8, 8)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def attend(q: Any = Q, k: Any = K, v: Any = V, **options: Any) -> Tensor:
    return cross_attention(q, k, v, **options)


def gather(images: Any = PIXELS, ids: Any = IDS, patch: Any = 8, **options: Any) -> Tensor:
    return gather_patches(images, ids, patch, **options)


def loss(pred: Any = PRED, images: Any = PIXELS, ids: Any = IDS, **options: Any) -> Tensor:
    return masked_pixel_loss(pred, images, ids, 8, **options)


def linear(hidden: Any = HIDDEN, weight: Any = WEIGHT, bias: Any = None, **options: Any) -> Tensor:
    return linear_pixel_loss(hidden, weight, bias, PIXELS, IDS, 8, **options)


def place(tokens: Any = TOKENS, mask: Any = ROW, positions: Any = POSITIONS, cls: Any = ROW, **options: Any) -> Tensor:
    return place_tokens(tokens, mask, positions, cls, **options)


def norm(x: Any = TOKENS, y: Any = TOKENS, weight: Any = ROW, bias: Any = ROW, **options: Any) -> Tensor:
    return add_layer_norm(x, y, weight, bias, **options)[1]


def gelu(h: Any = TOKENS, weight: Any = MIX, bias: Any = ROW, **options: Any) -> Tensor:
    return gelu_linear(h, weight, bias, **options)


LIST: Any = [0, 1]


def packed(cu: Any, **options: Any) -> Tensor:
    return attend(Q, ROWS, ROWS, cu_seqlens_k=cu, **options)


REFUSED: list[tuple[str, Callable[[], Any], str]] = [
    # dtypes
    ("mixed dtypes", lambda: attend(Q.bfloat16()), r"one dtype of float16.*got torch.bfloat16, torch.float32"),
    ("integers", lambda: attend(Q.int(), K.int(), V.int()), "one dtype of float16.*got torch.int32"),
    ("complex", lambda: attend(Q.to(torch.complex64), K.to(torch.complex64), V.to(torch.complex64)), "complex64"),
    ("float8", lambda: attend(*(x.to(torch.float8_e4m3fn) for x in (Q, K, V))), "one dtype of float16.*float8_e4m3fn"),
    ("int32 images", lambda: gather(PIXELS.int()), "images must be uint8, float16, .*got torch.int32"),
    ("uint8 result", lambda: gather(dtype=torch.uint8), "dtype must be float16, .*got torch.uint8"),
    ("weight of another dtype", lambda: linear(weight=WEIGHT.half()), "weight must be torch.float32 like hidden"),
    ("int tokens", lambda: place(TOKENS.int()), "tokens must be float16, .*got torch.int32"),
    ("float lengths", lambda: attend(key_lengths=torch.tensor([5.0, 3.0])), "key_lengths must be int32 or int64"),
    ("uint8 lengths", lambda: attend(key_lengths=torch.tensor([5, 3], dtype=torch.uint8)), "must be int32 or int64"),
    ("bool ids", lambda: gather(ids=torch.ones(2, 16, dtype=torch.bool)), r"got torch.bool; .*mask.nonzero\(\)"),
    ("int mask of tokens", lambda: place(masked=torch.ones(2, 16, dtype=torch.long)), "masked must be bool"),
    ("int norm", lambda: norm(TOKENS.int()), "x must be float16, .*got torch.int32"),
    ("complex norm", lambda: norm(TOKENS.to(torch.complex64)), "x must be float16, .*got torch.complex64"),
    ("norm as int", lambda: norm(out_dtype=torch.int8), "out_dtype must be float16, .*got torch.int8"),
    ("int hidden states", lambda: gelu(TOKENS.int()), "h must be float16, .*got torch.int32"),
    ("float index", lambda: invert_key_index(torch.tensor([0.0, 1.0]), 2), "key_index must be int32 or int64"),
    ("mask words of numbers", lambda: pack_key_mask(torch.tensor([[1, 2, 0]])), r"mask must be bool .*pass mask.bool"),
    ("seed as a float", lambda: attend(dropout_p=0.1, seed=1.5), "seed must be an int in .*got 1.5"),
    ("bound as a float", lambda: packed(ints(0, 6, 8), max_len_k=6.5), "max_len_k must be an int and not negative"),
    ("bound as a tensor", lambda: packed(ints(0, 6, 8), max_len_k=torch.tensor(6)), "max_len_k must be an int"),
    # types
    ("list of rows", lambda: norm([1.0]), "x must be a tensor, got list"),
    ("no weight of a norm", lambda: norm(weight=None), "weight must be a tensor, got NoneType"),
    ("numpy summand", lambda: norm(y=TOKENS.numpy()), "y must be a tensor, got ndarray"),
    ("list of hidden states", lambda: gelu([1.0]), "h must be a tensor, got list"),
    ("no weight after a GELU", lambda: gelu(weight=None), "weight must be a tensor, got NoneType"),
    ("numpy prediction", lambda: loss(PRED.numpy()), "pred must be a tensor, got ndarray"),
    ("list of states", lambda: linear([1.0]), "hidden must be a tensor, got list"),
    ("no head", lambda: linear(weight=None), "weight must be a tensor, got NoneType"),
    ("list of tokens", lambda: place([1.0]), "tokens must be a tensor, got list"),
    ("list of readers", lambda: invert_key_index(LIST, 2), "key_index must be int32 or int64 .*got list"),
    (
        "readers without tensors",
        lambda: attend(key_index=ints(0, 1), key_readers=(None, None)),
        "key_readers must be the two tensors of invert_key_index, got NoneType and NoneType",
    ),
    ("list of lengths", lambda: attend(key_lengths=[5, 3]), "key_lengths must be a tensor, got list"),
    ("numpy mask", lambda: attend(key_mask=numpy.ones((2, 5), dtype=bool)), "key_mask must be a tensor, got ndarray"),
    ("no keys", lambda: attend(k=None), "k must be a tensor, got NoneType"),
    ("numpy images", lambda: gather(PIXELS.numpy()), "images must be a tensor, got ndarray"),
    ("list of ids", lambda: gather(ids=[[0], [1]]), "patch_ids must be a tensor, got list"),
    ("patch side as a pair", lambda: gather(patch=(8, 8)), r"patch_size must be an int, .*got \(8, 8\)"),
    ("patch side as a float", lambda: gather(patch=8.0), "patch_size must be an int, .*got 8.0"),
    ("one mean", lambda: gather(mean=0.5), "mean must have one value for each of 3 channels, got 0.5"),
    ("no [CLS]", lambda: place(cls=None), "cls_token must be a tensor, got NoneType; a model without .CLS. can"),
    ("learned scale", lambda: attend(scale=torch.tensor(0.2, requires_grad=True)), "scale must be a float.*multiply q"),
    ("scale as a text", lambda: attend(scale="a"), "scale must be a float, got str"),
    ("scale as a list", lambda: attend(scale=[1.0]), "scale must be a float, got list"),
    ("scale of NaN", lambda: attend(scale=math.nan), "scale must be a finite float, got nan"),
    ("infinite scale", lambda: attend(scale=numpy.float32("inf")), "scale must be a finite float, got inf"),
    ("seed as a text", lambda: attend(dropout_p=0.1, seed="a"), "seed must be an int in .*got 'a'"),
    ("seed as a list", lambda: attend(seed=[1]), r"seed must be an int in .*got \[1\]"),
    ("dropout as a text", lambda: attend(dropout_p="a"), "dropout_p must be a float in .*got 'a'"),
    ("mean of NaN", lambda: gather(mean=[0.5, math.nan, 0.5]), "mean must be a finite float, got nan"),
    ("std of NaN", lambda: gather(std=[0.5, 0.5, math.nan]), "std must be a finite float, got nan"),
    ("mean of texts", lambda: gather(mean="abc"), "mean must be a float, got str"),
    ("mean of NaN in a loss", lambda: loss(mean=[math.nan] * 3), "mean must be a finite float, got nan"),
    ("eps of NaN", lambda: norm(eps=math.nan), "eps must be a finite float of at least 0, got nan"),
    ("negative eps", lambda: norm(eps=-1), "eps must be a finite float of at least 0, got -1"),
    ("eps as a text", lambda: norm(eps="a"), "eps must be a float, got str"),
    # devices
    ("keys elsewhere", lambda: attend(k=K.to("meta"), v=V.to("meta")), "k must be on the device of q, cpu, got meta"),
    (
        "mask elsewhere",
        lambda: attend(key_mask=torch.ones(2, 5, dtype=torch.bool, device="meta")),
        "key_mask must be on",
    ),
    ("norm elsewhere", lambda: norm(weight=ROW.to("meta")), "weight must be on the device"),
    ("summand elsewhere", lambda: norm(y=TOKENS.to("meta")), "y must be on the device"),
    ("weight after a GELU elsewhere", lambda: gelu(weight=MIX.to("meta")), "weight must be on the device"),
    ("index elsewhere", lambda: attend(key_index=ints(0, 1).to("meta")), "key_index must be on the device"),
    ("seed elsewhere", lambda: attend(dropout_p=0.1, seed=ints(1).long().to("meta")), "seed must be .*on meta"),
    ("offsets elsewhere", lambda: packed(ints(0, 6, 8).to("meta")), "cu_seqlens_k must be on the device"),
    ("ids elsewhere", lambda: gather(ids=IDS.to("meta")), "patch_ids must be on the device"),
    ("mean elsewhere", lambda: gather(mean=torch.ones(3, device="meta")), "mean must be on the device"),
    ("pred elsewhere", lambda: loss(PRED.to("meta")), "pred must be on the device"),
    ("weight elsewhere", lambda: linear(weight=WEIGHT.to("meta")), "weight must be on the device"),
    ("positions elsewhere", lambda: place(positions=POSITIONS.to("meta")), "pos_embed must be on the device"),
    # shapes and layouts
    ("SDPA's layout", lambda: attend(*(x.transpose(1, 2) for x in (Q, K, V))), r"the layout is \(batch, length, heads"),
    ("heads not split", lambda: attend(Q.flatten(2), K.flatten(2), V.flatten(2)), "q must be .batch, length, heads"),
    ("values of another shape", lambda: attend(v=V[:, :4]), "v must have the shape of k"),
    ("odd head width", lambda: attend(*(x[..., :7] for x in (Q, K, V))), "q must have a head width divisible by 8"),
    ("fewer key sequences", lambda: attend(rand(4, 9, 2, 32)), "k must have the 4 sequences of q .or give key_index."),
    ("mask of a tokenizer", lambda: attend(key_mask=torch.ones(2, 5, dtype=torch.long)), r"pass mask.bool\(\)"),
    ("additive mask", lambda: attend(key_mask=torch.zeros(2, 5)), "of a mask that is added to scores, pass mask == 0"),
    (
        "mask of four dimensions",
        lambda: attend(key_mask=torch.ones(2, 1, 1, 5).bool()),
        r"key_mask must have shape \(2, 5\)",
    ),
    ("summand of another shape", lambda: norm(y=TOKENS[:, :3]), "y must have the shape of x"),
    ("norm of another width", lambda: norm(weight=rand(9)), r"weight must have shape \(8,\), got \(9,\)"),
    ("row of no value", lambda: norm(TOKENS[..., :0], None), "x must have shape .* C at least 1"),
    ("weight of another width", lambda: gelu(weight=rand(8, 9)), r"h and weight must have shapes .*\(8, 9\)"),
    ("mask of one dimension", lambda: pack_key_mask(torch.ones(5).bool()), r"mask must be bool \(sequences, keys\)"),
    ("index of two dimensions", lambda: invert_key_index(IDS, 2), r"key_index must be .*\(query sequences,\)"),
    ("image without a batch", lambda: gather(PIXELS[0], IDS[0]), r"images must have shape \(B, C, H, W\), got \(3,"),
    ("image of (B, H, W, C)", lambda: gather(PIXELS.permute(0, 2, 3, 1)), "patch_size must divide the image's height"),
    ("patches that do not divide", lambda: gather(patch=7), "patch_size must divide .*got 7"),
    ("no patch side", lambda: gather(patch=0), "patch_size must divide .*got 0"),
    ("pred of all patches", lambda: loss(rand(2, 16, 192)), r"pred must have shape .*\(2, 3\), got \(2, 16, 192\)"),
    ("weight transposed", lambda: linear(weight=WEIGHT.T), r"weight must have shape .*\(192, 16\), got \(16, 192\)"),
    ("bias of another width", lambda: linear(bias=rand(16)), "bias must have shape"),
    ("mask with [CLS]", lambda: place(masked=torch.ones(2, 17).bool()), r"masked must be bool of shape \(2, 16\)"),
    (
        "positions without [CLS]",
        lambda: place(positions=POSITIONS[1:]),
        "tokens must have N = 15 rows, as pos_embed has",
    ),
    ("positions of each sample", lambda: place(positions=POSITIONS.expand(2, -1, -1)), "pos_embed must have shape"),
    # values and names
    ("negative length", lambda: attend(key_lengths=ints(-1, 3)), "key_lengths must be in 0..5, got -1..3"),
    ("key sequences of nobody", lambda: invert_key_index(IDS[0], 0), "sequences must be at least 1, got 0"),
    ("visible id out of range", lambda: place(TOKENS[:, :2], visible_ids=IDS[:, :2] + 15), "visible_ids must be in"),
    ("index out of range", lambda: attend(key_index=ints(0, 2)), "key_index must be in 0..1, got 0..2"),
    ("negative index", lambda: attend(key_index=ints(0, -1)), "key_index must be in 0..1, got -1..0"),
    ("length past the end", lambda: attend(key_lengths=ints(6, 3)), "key_lengths must be in 0..5, got 3..6"),
    (
        "offsets out of order",
        lambda: attend(Q, ROWS, ROWS, cu_seqlens_k=ints(0, 6, 4)),
        r"must rise from 0 .*\[0, 6, 4\]",
    ),
    ("offsets past the end", lambda: attend(Q, ROWS, ROWS, cu_seqlens_k=ints(0, 6, 9)), "at most the 8 rows of k"),
    ("offsets not from 0", lambda: attend(Q, ROWS, ROWS, cu_seqlens_k=ints(1, 6, 8)), "must rise from 0"),
    ("dense keys with offsets", lambda: attend(cu_seqlens_k=ints(0, 5, 10)), "k must be packed .rows, heads, width."),
    (
        "lengths with offsets",
        lambda: attend(Q, ROWS, ROWS, cu_seqlens_k=ints(0, 6, 8), key_lengths=ints(1, 2)),
        "must be None",
    ),
    (
        "bound below a length",
        lambda: attend(Q, ROWS, ROWS, cu_seqlens_k=ints(0, 6, 8), max_len_k=5),
        "at least the longest",
    ),
    ("id out of range", lambda: gather(ids=IDS + 11), r"patch_ids must be in \[0, 16\), got values in \[11, 26\]"),
    ("negative id", lambda: loss(ids=IDS - 1), r"patch_ids must be in \[0, 16\), got values in \[-1,"),
    ("std of 0", lambda: gather(std=[0.5, 0, 0.5]), "std must be positive"),
    ("std of 0 in a tensor", lambda: gather(std=torch.tensor([0.5, 0.0, 0.5])), "std must be positive"),
    ("unknown kind", lambda: loss(kind="l2"), 'kind must be "l1", "mse" or "smooth_l1", got .l2.'),
    ("unknown reduction", lambda: loss(reduction="sum"), 'reduction must be "mean" or "none", got .sum.'),
    (
        "repeated id",
        lambda: place(TOKENS[:, :2], visible_ids=torch.tensor([[1, 1], [0, 2]])),
        "visible_ids must be distinct",
    ),
    ("mask and ids", lambda: place(masked=torch.ones(2, 16).bool(), visible_ids=IDS), "masked must be None"),
    ("explain of a foreign function", lambda: explain(torch.nn.functional.linear, Q), "op must be one of"),
]


@pytest.mark.parametrize("call, message", [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_a_wrong_input_is_refused_on_one_line(call: Callable[[], Any], message: str):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


OPS = (
    add_layer_norm,
    cross_attention,
    gather_patches,
    gelu_linear,
    linear_pixel_loss,
    masked_pixel_loss,
    place_tokens,
)
READ = [case[0] for case in REFUSED].index("negative length")  # explain reads no values
EXPLAINED = REFUSED[:READ] + [
    case for case in REFUSED[READ:] if case[0].startswith(("unknown", "std of 0", "mask and"))
]


@pytest.mark.parametrize("call, message", [case[1:] for case in EXPLAINED], ids=[case[0] for case in EXPLAINED])
def test_explain_refuses_what_the_op_refuses(call: Callable[[], Any], message: str, monkeypatch: pytest.MonkeyPatch):
    for op in OPS:
        monkeypatch.setitem(globals(), op.__name__, partial(explain, op))
    with pytest.raises(ValueError, match=message):
        call()


def padded_with_nan(x: Tensor) -> Tensor:
    return x.masked_fill(torch.arange(5)[:, None, None] >= torch.tensor([5, 3])[:, None, None, None], torch.nan)


LENGTHS = ints(5, 3)
CONTIGUOUS = attend(key_lengths=LENGTHS)
WIDE = torch.cat([Q, Q], -1)[..., :32]
RIGHT: list[tuple[str, Callable[[], Tensor], Tensor]] = [
    (
        "NaN behind the lengths",
        lambda: attend(Q, padded_with_nan(K), padded_with_nan(V), key_lengths=LENGTHS),
        CONTIGUOUS,
    ),
    ("strided queries", lambda: attend(WIDE, key_lengths=LENGTHS), CONTIGUOUS),
    ("expanded keys", lambda: attend(k=K[:1].expand(2, -1, -1, -1)), attend(k=K[:1].repeat(2, 1, 1, 1))),
    ("int64 lengths", lambda: attend(key_lengths=LENGTHS.long()), CONTIGUOUS),
    (
        "0/1 mask of one key",
        lambda: attend(k=K[:, :1], v=V[:, :1], key_mask=torch.ones(2, 1).long()),
        attend(k=K[:, :1], v=V[:, :1]),
    ),
    ("no key", lambda: attend(k=K[:, :0], v=V[:, :0]), torch.zeros_like(Q)),
    ("lengths of 0", lambda: attend(key_lengths=ints(0, 0)), torch.zeros_like(Q)),
    ("no query", lambda: attend(Q[:, :0]), Q[:, :0]),
    ("no sequence", lambda: attend(Q[:0], K[:0], V[:0]), Q[:0]),
    ("query of one row", lambda: attend(Q[:, :1], key_lengths=LENGTHS), CONTIGUOUS[:, :1]),
    ("no head", lambda: attend(Q[:, :, :0], K[:, :, :0], V[:, :, :0]), Q[:, :, :0]),
    ("no query head", lambda: attend(Q[:, :, :0]), Q[:, :, :0]),
    ("no row of packed keys", lambda: packed(ints(0, 0, 0)), torch.zeros_like(Q)),
    (
        "bound of numpy's",
        lambda: packed(ints(0, 5, 8), max_len_k=int(numpy.int64(5))),
        packed(ints(0, 5, 8)),
    ),
    ("strided rows of a norm", lambda: norm(torch.cat([TOKENS, TOKENS], -1)[..., :8]), norm()),
    ("no row of a norm", lambda: norm(TOKENS[:0], TOKENS[:0]), TOKENS[:0]),
    ("strided hidden states", lambda: gelu(torch.cat([TOKENS, TOKENS], -1)[..., :8]), gelu()),
    ("no hidden state", lambda: gelu(TOKENS[:0]), TOKENS[:0]),
    ("channels last", lambda: gather(PIXELS.contiguous(memory_format=torch.channels_last)), gather()),
    ("no patch", lambda: gather(ids=IDS[:, :0]), torch.zeros(2, 0, 192)),
    ("no image", lambda: gather(PIXELS[:0], IDS[:0]), torch.zeros(0, 3, 192)),
    ("strided predictions", lambda: loss(torch.cat([PRED, PRED], -1)[..., :192]), loss()),
    ("loss of no patch", lambda: loss(PRED[:, :0], ids=IDS[:, :0]), torch.zeros(())),
    ("strided tokens", lambda: place(torch.cat([TOKENS, TOKENS], -1)[..., :8]), place()),
    ("no token", lambda: place(TOKENS[:0]), torch.zeros(0, 17, 8)),
]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("call, wanted", [case[1:] for case in RIGHT], ids=[case[0] for case in RIGHT])
def test_a_borderline_input_gives_the_right_result(call: Callable[[], Tensor], wanted: Tensor, backend: Any):
    with use_backend(backend):
        torch.testing.assert_close(call(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.plain_empty
def test_more_than_2_31_elements_keep_their_shape_on_the_meta_device():
    with torch.device("meta"):
        q, k = torch.empty(70000, 1024, 1, 32), torch.empty(70000, 5, 1, 32)
        assert attend(q, k, k).shape == q.shape
        assert gather(torch.empty(4096, 3, 512, 512), None, 16).shape == (4096, 1024, 768)
        pred = torch.empty(16384, 1024, 192)
        assert loss(pred, torch.empty(16384, 3, 256, 256), None, reduction="none").shape == (16384, 1024)
        half = torch.empty(70000, 1024, 32)
        assert norm(half, half, torch.empty(32), torch.empty(32)).shape == half.shape
        assert gelu(half, torch.empty(4, 32), torch.empty(4)).shape == (70000, 1024, 4)
        tokens, row = torch.empty(4096, 4096, 160), torch.empty(160)
        assert place(tokens, row, torch.empty(4097, 160), row).shape == (4096, 4097, 160)

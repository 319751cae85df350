"""What the ops refuse, and what keeps them from a kernel, as tables: wrong inputs, borderline inputs, reasons.

The error of a wrong input is one line that begins with the argument's name. A reason names the fact and a way out.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from typing import Any, Literal, get_origin

import numpy
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.masked import masked_tensor

import mvlm_kernels as ops
from mvlm_kernels import dispatch, explain, registration, use_backend
from mvlm_kernels.arguments import LARGEST, ChannelValues
from mvlm_kernels.cross_attention import why_not_triton
from mvlm_kernels.integrations.blocks import kernel_reasons
from mvlm_kernels.layers import CrossAttention

G = torch.Generator().manual_seed(0)


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=G)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


Q, K, V = rand(2, 9, 2, 32), rand(2, 5, 2, 32), rand(2, 5, 2, 32)
ROWS = rand(8, 2, 32)  # packed keys
PIXELS = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=G)
IDS = torch.tensor([[0, 3, 15], [7, 1, 2]])
META: Any = {"device": "meta"}
# For each op: its valid arguments by name, of which a case replaces some.
VALID: dict[str, dict[str, Any]] = {
    "cross_attention": {"q": Q, "k": K, "v": V},
    "gather_patches": {"images": PIXELS, "patch_ids": IDS, "patch_size": 8},
    "masked_pixel_loss": {"pred": rand(2, 3, 192), "images": PIXELS, "patch_ids": IDS, "patch_size": 8},
    "place_tokens": {
        "tokens": rand(2, 16, 8), "mask_token": rand(8), "pos_embed": rand(17, 8), "cls_token": rand(8),
    },
    "add_layer_norm": {"x": rand(2, 16, 8), "y": rand(2, 16, 8), "weight": rand(8), "bias": rand(8)},
    "gelu_linear": {"h": rand(2, 16, 8), "weight": rand(8, 8), "bias": rand(8)},
}  # fmt: skip
TOKENS, NORM = VALID["place_tokens"]["tokens"], VALID["add_layer_norm"]["x"]
POSITIONS, PRED = VALID["place_tokens"]["pos_embed"], VALID["masked_pixel_loss"]["pred"]


def every(change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {"q": change(Q), "k": change(K), "v": change(V)}


def packed(*bounds: int, **options: Any) -> dict[str, Any]:
    return {"k": ROWS, "v": ROWS, "cu_seqlens_k": ints(*bounds), **options}


# (arguments that replace valid ones, how the error begins); a third item: the values of tensors are wrong, which
# explain does not read.
VALUES = True


def each(name: str, *wrong: Any, **others: Any) -> list[tuple[Any, ...]]:
    """Wrong values of one argument, of which the error names it."""
    return [({**others, name: value}, f"{name} must") for value in wrong]


def each_of_values(name: str, *wrong: Any, **others: Any) -> list[tuple[Any, ...]]:
    return [(*case, VALUES) for case in each(name, *wrong, **others)]


REFUSED: dict[str, list[tuple[Any, ...]]] = {
    "cross_attention": [
        ({"q": Q.bfloat16()}, "q, k and v must have one dtype"),
        *((every(lambda x, kind=kind: x.to(kind)), "q, k and v must have one dtype")
          for kind in (torch.int32, torch.complex64, torch.float8_e4m3fn)),
        (every(lambda x: x.transpose(1, 2)), "k must"),
        (every(lambda x: x.flatten(2)), "q must"),
        (every(lambda x: x[..., :0]), "q must"),
        *each("backend", "triton"),
        *each("q", Q[0]),
        *(({"q": q}, "k must") for q in (rand(2, 9, 3, 32), rand(4, 9, 2, 32))),
        *each("k", None),
        ({"k": K.to("meta"), "v": V.to("meta")}, "k must"),
        *each("v", V[:, :4]),
        *each("key_lengths", torch.tensor([5.0, 3.0]), torch.tensor([5, 3], dtype=torch.uint8), [5, 3], ints(5, 3, 1),
              ints(5, 3).to("meta")),
        *each_of_values("key_lengths", ints(-1, 3), ints(6, 3)),
        *each("key_mask", numpy.ones((2, 5), dtype=bool), torch.ones(2, 5, dtype=torch.bool, **META),
              torch.ones(2, 5, dtype=torch.long), torch.zeros(2, 5), torch.ones(2, 9).bool(),
              torch.ones(2, 1, 1, 5).bool()),
        *each("key_index", ints(0, 1).to("meta"), ints(0, 1, 1)),
        *each_of_values("key_index", ints(0, 2), ints(0, -1)),
        ({"cu_seqlens_k": ints(0, 5, 10)}, "k must"),
        *each("key_lengths", ints(1, 2), **packed(0, 6, 8)),
        *each("key_mask", torch.ones(2, 5).bool(), **packed(0, 6, 8)),
        *each("cu_seqlens_k", torch.tensor([0.0, 4, 8]), ints(0, 6, 8).to("meta"), k=ROWS, v=ROWS),
        *each_of_values("cu_seqlens_k", ints(0, 6, 4), ints(0, 6, 9), ints(1, 6, 8), k=ROWS, v=ROWS),
        *each("max_len_q", 9),
        *each("max_len_k", 6.5, torch.tensor(6), **packed(0, 6, 8)),
        *each_of_values("max_len_k", 5, **packed(0, 6, 8)),
        *each("scale", torch.tensor(0.2, requires_grad=True), "a", [1.0], math.nan, numpy.float32("inf")),
        *each("dropout_p", 1.0, -0.1, "a", torch.tensor(0.1)),
        *each("seed", [1]),
        *each("seed", 1.5, "a", -1, 2**63, ints(1), ints(1, 2).long(), ints(1).long().to("meta"), dropout_p=0.1),
    ],
    "gather_patches": [
        *each("images", PIXELS.int(), PIXELS.numpy(), PIXELS[0], PIXELS[:, :0]),
        ({"images": PIXELS.permute(0, 2, 3, 1)}, "patch_size must"),
        *each("patch_ids", torch.ones(2, 16, dtype=torch.bool), IDS.float(), [[0], [1]], IDS[:1], IDS.to("meta")),
        *each_of_values("patch_ids", IDS + 11, IDS - 1),
        *each("patch_size", (8, 8), 8.0, 7, 0),
        *each("mean", 0.5, (0.5,), [0.5, math.nan, 0.5], "abc", torch.zeros(2), torch.ones(3, **META)),
        *each("std", [0.5, 0, 0.5], torch.tensor([0.5, 0, 0.5]), [0.5, 0.5, math.nan]),
        *each("dtype", torch.uint8, torch.int32),
    ],
    "masked_pixel_loss": [
        *each("pred", PRED.numpy(), PRED.to("meta"), PRED[0], PRED[..., :9], PRED.int(), rand(2, 16, 192)),
        ({"patch_ids": None}, "pred must"),
        *each_of_values("patch_ids", IDS - 1),
        *each("mean", [math.nan] * 3),
        *each("kind", "l2"),
        *each("reduction", "sum"),
        *each("normalize_target", True, images=PIXELS[:, :1], patch_size=1, pred=rand(2, 3, 1)),
    ],
    "place_tokens": [
        *each("tokens", TOKENS.int(), [1.0], TOKENS[0], TOKENS[:, :15]),
        *each("mask_token", rand(7), rand(8).to("meta")),
        *each("cls_token", None, rand(1, 8)),
        *each("pos_embed", POSITIONS[:, :3], POSITIONS.expand(2, -1, -1), POSITIONS.to("meta")),
        ({"pos_embed": POSITIONS[1:]}, "tokens must"),
        *each("masked", torch.ones(2, 16), torch.ones(2, 17).bool(), torch.ones(2, 16, **META).bool()),
        *each("masked", torch.ones(2, 16).bool(), visible_ids=IDS),
        ({"with_unmasked": True}, "masked must"),
        *each("visible_ids", IDS, IDS.float()),
        *each_of_values("visible_ids", IDS[:, :2] + 15, torch.tensor([[1, 1], [0, 2]]), tokens=TOKENS[:, :2]),
    ],
    "add_layer_norm": [
        *each("x", NORM.int(), NORM.to(torch.complex64), [1.0], rand(2, 0)),
        *each("y", NORM.numpy(), NORM[:, :3], NORM.to("meta")),
        *each("weight", [1.0], rand(9), rand(8).to("meta")),
        *each("bias", rand(3)),
        *each("y_bias", rand(3)),
        *each("y_bias", rand(8), y=None),
        *each("gate", rand(3), rand(16, 8), rand(2, 1, 8), rand(2, 8).to("meta")),
        *each("gate", rand(8), y=None),
        *each("scale", rand(1, 8), rand(2, 16, 8), rand(2, 8).int()),
        *each("shift", rand(2, 9), [0.0]),
        *each("kind", "batch", None),
        *each("out_dtype", torch.int8),
        *each("eps", math.nan, -1, "a"),
    ],
    "gelu_linear": [
        *each("h", NORM.int(), [1.0]),
        *(({"h": h}, "h and weight must") for h in (NORM[0, 0], NORM[..., :5])),
        *each("weight", None, rand(8, 8).to("meta")),
        *each("bias", rand(3)),
        *each("h_bias", rand(3)),
    ],
}  # fmt: skip
CASES = [
    pytest.param(op, changes, begins, bool(values), id=f"{op}-{'-'.join(changes)}-{number}")
    for op, cases in REFUSED.items()
    for number, (changes, begins, *values) in enumerate(cases)
]


@pytest.mark.parametrize("op, changes, begins, of_values", CASES)
def test_a_wrong_input_is_refused_on_one_line_that_names_it(
    op: str, changes: dict[str, Any], begins: str, of_values: bool
):
    """By the op, also through the dispatcher, which gives the same words, and by explain, which reads no values."""
    function, given = getattr(ops, op), VALID[op] | changes
    with pytest.raises(ValueError, match=begins) as error:
        function(**given)
    text = str(error.value)
    assert text.startswith(begins)
    assert "\n" not in text
    if not of_values:
        with pytest.raises(ValueError, match=begins):
            explain(function, **given)
        return
    for backend in ("torch", "triton"):
        with pytest.MonkeyPatch.context() as patch, use_backend(backend):
            patch.setattr(registration, "called_directly", lambda *_: False)
            with pytest.raises(ValueError, match=begins) as dispatched:
                function(**given)
        assert str(dispatched.value) == text


# For each op: arguments beside the valid ones, so that each argument is given in one call at least.
MORE: dict[str, list[dict[str, Any]]] = {
    "cross_attention": [
        {"key_lengths": ints(5, 3), "key_mask": torch.ones(2, 5).bool(), "key_index": ints(0, 1), "scale": 0.5,
         "dropout_p": 0.1, "seed": torch.tensor([3]), "return_lse": True, "backend": "math"},
        packed(0, 6, 8, max_len_k=6),
        {"q": ROWS, "cu_seqlens_q": ints(0, 6, 8), "max_len_q": 6},
    ],
    "gather_patches": [{"mean": [0.5] * 3, "std": [0.5] * 3, "dtype": torch.float32}],
    "masked_pixel_loss": [
        {"mean": [0.5] * 3, "std": [0.5] * 3, "kind": "mse", "normalize_target": True, "reduction": "none"},
    ],
    "place_tokens": [
        {"masked": torch.ones(2, 16).bool(), "with_unmasked": True}, {"tokens": TOKENS[:, :3], "visible_ids": IDS},
    ],
    "add_layer_norm": [
        {"eps": 1e-3, "y_bias": rand(8), "out_dtype": torch.bfloat16, "post_norm": True, "gate": rand(2, 8),
         "scale": rand(8), "shift": rand(2, 8), "kind": "rms"},
    ],
    "gelu_linear": [{"h_bias": rand(8)}],
}  # fmt: skip
ARGUMENTS = [
    (op, name)
    for op in VALID
    for name, parameter in inspect.signature(getattr(ops, op)).parameters.items()
    if parameter.kind is not parameter.VAR_KEYWORD
]
NOTHINGS: list[Any] = ["a", b"a", object(), 1j, {}, numpy.zeros((2, 2, 2)), rand(2).to_sparse(), torch.nn.Linear]
NO_NUMBERS: list[Any] = [*NOTHINGS, True, numpy.True_, [1], Fraction(1, 2), torch.tensor(1.0), 10**400]
NO_FLOATS: list[Any] = [*NO_NUMBERS, math.nan, math.inf, 1e308, numpy.float64("nan"), numpy.longdouble(0.5)]
NO_INTS: list[Any] = [*NO_NUMBERS, 8.0, "8", numpy.float32(8), -8]
NO_CHANNELS: list[Any] = [
    *NOTHINGS, 0.5, "abc", {0.1, 0.2, 0.3}, [0.5, "a", 0.5], [True] * 3, [1j] * 3, [[0.5]] * 3, [0.5, None, 0.5],
    [10**400] * 3, [1e308] * 3, [torch.tensor(0.5)] * 3, numpy.ones((3, 2)), numpy.float64(0.5), torch.ones(3).long(),
    torch.ones(3, dtype=torch.complex64),
]  # fmt: skip


def no_tensors(right: Tensor) -> list[Any]:
    """Values in the place of a dense tensor: of other types, and the tensor in other forms and other dtypes."""
    forms: list[Any] = [right.to_sparse(), right.to(torch.complex64), torch.nn.UninitializedParameter()]
    if right.is_floating_point():
        forms += [right.to_mkldnn(), torch.quantize_per_tensor(right, 0.1, 0, torch.quint8)]
    forms += [torch.nested.nested_tensor([right, right], layout=layout) for layout in (torch.strided, torch.jagged)]
    if right.dtype == torch.float32:
        forms.append(masked_tensor(right, right > 0))
    return [*NOTHINGS, 1.0, [1.0], right.numpy(), *forms]


WRONG: dict[Any, Callable[[Any], list[Any]]] = {
    Tensor: lambda right: [None, *no_tensors(right)],
    Tensor | None: no_tensors,
    float: lambda _: [None, *NO_FLOATS],
    float | None: lambda _: NO_FLOATS,
    int: lambda _: [None, *NO_INTS],
    int | None: lambda _: NO_INTS,
    int | Tensor | None: lambda right: [*NO_INTS, *no_tensors(right)[-4:]],
    bool: lambda _: [None, 0, 1, 1.0, torch.tensor(True), *NOTHINGS],
    torch.dtype | None: lambda _: [*NOTHINGS, 1, float, "float32", numpy.float32, torch.int8, torch.complex64],
    ChannelValues: lambda _: NO_CHANNELS,
    Literal: lambda _: [None, 1, ["l1"], *NOTHINGS],
}
"""Wrong values of each kind of argument, by its annotation. They take a right value."""


@pytest.mark.filterwarnings("ignore:The PyTorch API of:UserWarning")  # of nested and of masked tensors
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor.*")
@pytest.mark.parametrize("op, name", ARGUMENTS)
def test_an_argument_of_another_kind_is_refused_on_one_line(op: str, name: str):
    function = getattr(ops, op)
    annotation = inspect.signature(function).parameters[name].annotation
    right = next(call for more in [{}, *MORE[op]] if name in (call := VALID[op] | more))
    function(**right)
    for wrong in WRONG[get_origin(annotation) if get_origin(annotation) is Literal else annotation](right[name]):
        for call in (function, partial(explain, function)):
            with pytest.raises(ValueError, match=rf"^[\w, ]*\b{name}\b[\w, ]* must .*got ") as error:
                call(**right | {name: wrong})
            assert "\n" not in str(error.value)


NUMPY: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("add_layer_norm", {"eps": numpy.float32(0.1), "post_norm": numpy.True_},
     {"eps": 0.10000000149011612, "post_norm": True}),
    ("add_layer_norm", {"eps": 10**19}, {"eps": 1e19}),
    ("cross_attention", {"scale": numpy.float16(0.5), "seed": numpy.int64(3), "dropout_p": numpy.float64(0.5)},
     {"scale": 0.5, "seed": 3, "dropout_p": 0.5}),
    ("cross_attention", packed(0, 6, 8, max_len_k=numpy.int32(6), scale=2), packed(0, 6, 8, max_len_k=6, scale=2.0)),
    ("gather_patches", {"patch_size": numpy.uint8(8), "mean": numpy.full(3, 0.5), "std": (1, 2, numpy.float32(3))},
     {"patch_size": 8, "mean": [0.5] * 3, "std": [1.0, 2.0, 3.0]}),
    ("masked_pixel_loss", {"patch_size": numpy.int64(8), "normalize_target": numpy.True_}, {"normalize_target": True}),
    ("place_tokens", {"masked": IDS.new_ones(2, 16).bool(), "with_unmasked": numpy.True_},
     {"masked": IDS.new_ones(2, 16).bool(), "with_unmasked": True}),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("op, given, wanted", NUMPY)
def test_numbers_of_numpy_and_whole_floats_count_as_those_of_python(
    op: str, given: dict[str, Any], wanted: dict[str, Any], backend: Any
):
    explain(getattr(ops, op), **VALID[op] | given)
    with use_backend(backend):
        assert torch.equal(changed(op, **given)(), changed(op, **wanted)())


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_largest_numbers_are_taken_in_every_dtype(dtype: torch.dtype, backend: Any):
    """Their results may be infinite or NaN."""
    with use_backend(backend):
        for scale in (-LARGEST, 0, LARGEST):
            changed("cross_attention", **every(lambda x: x.to(dtype)), scale=scale)()
        changed("add_layer_norm", x=NORM.to(dtype), eps=LARGEST)()
        changed("gather_patches", mean=[-LARGEST] * 3, std=[LARGEST] * 3, dtype=dtype)()


@pytest.mark.parametrize(
    "call, begins",
    [
        (lambda: ops.pack_key_mask(torch.tensor([[1, 2, 0]])), "mask must"),
        (lambda: ops.pack_key_mask(torch.ones(5).bool()), "mask must"),
        *((lambda given=given: CrossAttention(**{"width": 64, "heads": 4, **given}), f"{name} must")
          for name in ("width", "heads", "kv_heads", "head_width", "context_width")
          for given in ({name: 0}, {name: "4"}, {name: 2.0})),
        (lambda: explain(torch.nn.functional.linear, Q), "op must"),
        (lambda: explain(CrossAttention(64, 4), torch.zeros(2, 3, 64)), "op must"),
        (lambda: explain(ops.cross_attention, Q, K, V, as_if="H100"), "as_if must"),
        (lambda: explain(ops.cross_attention, Q, K, V, as_if=90), "as_if must"),  # pyright: ignore[reportArgumentType]
        (lambda: use_backend("cuda").__enter__(), "backend must"),  # pyright: ignore[reportArgumentType]
        (lambda: use_backend(numpy.ones(2)).__enter__(), "backend must"),  # pyright: ignore[reportArgumentType]
    ],
)  # fmt: skip
def test_wrong_inputs_of_other_functions(call: Callable[[], Any], begins: str):
    with pytest.raises(ValueError, match=f"^{begins}"):
        call()


def changed(op: str, **changes: Any) -> Callable[[], Tensor]:
    def call() -> Tensor:
        found = getattr(ops, op)(**(VALID[op] | changes))
        return found[1] if isinstance(found, tuple) else found

    return call


def wide(x: Tensor) -> Tensor:
    """The same values in rows of twice the width."""
    return torch.cat([x, x], -1)[..., : x.shape[-1]]


def padded_with_nan(x: Tensor) -> Tensor:
    return x.masked_fill(torch.arange(5)[:, None, None] >= torch.tensor([5, 3])[:, None, None, None], torch.nan)


attend = partial(changed, "cross_attention")
LENGTHS = ints(5, 3)
CONTIGUOUS = attend(key_lengths=LENGTHS)()
RIGHT: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
    "NaN behind the lengths": (
        attend(k=padded_with_nan(K), v=padded_with_nan(V), key_lengths=LENGTHS), CONTIGUOUS,
    ),
    "strided queries": (attend(q=wide(Q), key_lengths=LENGTHS), CONTIGUOUS),
    "expanded keys": (attend(k=K[:1].expand(2, -1, -1, -1)), attend(k=K[:1].repeat(2, 1, 1, 1))()),
    "int64 lengths": (attend(key_lengths=LENGTHS.long()), CONTIGUOUS),
    "0/1 mask of one key": (
        attend(k=K[:, :1], v=V[:, :1], key_mask=torch.ones(2, 1).long()), attend(k=K[:, :1], v=V[:, :1])(),
    ),
    "no key": (attend(k=K[:, :0], v=V[:, :0]), torch.zeros_like(Q)),
    "lengths of 0": (attend(key_lengths=ints(0, 0)), torch.zeros_like(Q)),
    "no query": (attend(q=Q[:, :0]), Q[:, :0]),
    "no sequence": (attend(q=Q[:0], k=K[:0], v=V[:0]), Q[:0]),
    "query of one row": (attend(q=Q[:, :1], key_lengths=LENGTHS), CONTIGUOUS[:, :1]),
    "no head": (attend(q=Q[:, :, :0], k=K[:, :, :0], v=V[:, :, :0]), Q[:, :, :0]),
    "no query head": (attend(q=Q[:, :, :0]), Q[:, :, :0]),
    "no row of packed keys": (attend(**packed(0, 0, 0)), torch.zeros_like(Q)),
    "strided rows of a norm": (changed("add_layer_norm", x=wide(NORM)), changed("add_layer_norm")()),
    "no row of a norm": (changed("add_layer_norm", x=NORM[:0], y=NORM[:0]), NORM[:0]),
    "strided hidden states": (changed("gelu_linear", h=wide(NORM)), changed("gelu_linear", h=NORM)()),
    "no hidden state": (changed("gelu_linear", h=NORM[:0]), NORM[:0]),
    "channels last": (
        changed("gather_patches", images=PIXELS.contiguous(memory_format=torch.channels_last)),
        changed("gather_patches")(),
    ),
    "no patch": (changed("gather_patches", patch_ids=IDS[:, :0]), torch.zeros(2, 0, 192)),
    "no image": (changed("gather_patches", images=PIXELS[:0], patch_ids=IDS[:0]), torch.zeros(0, 3, 192)),
    "strided predictions": (changed("masked_pixel_loss", pred=wide(PRED)), changed("masked_pixel_loss")()),
    "loss of no patch": (changed("masked_pixel_loss", pred=PRED[:, :0], patch_ids=IDS[:, :0]), torch.zeros(())),
    "strided tokens": (changed("place_tokens", tokens=wide(TOKENS)), changed("place_tokens")()),
    "no token": (changed("place_tokens", tokens=TOKENS[:0]), torch.zeros(0, 17, 8)),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("call, wanted", RIGHT.values(), ids=RIGHT)
def test_a_borderline_input_gives_the_right_result(call: Callable[[], Tensor], wanted: Tensor, backend: Any):
    with use_backend(backend):
        torch.testing.assert_close(call(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.plain_empty
def test_more_than_2_31_elements_keep_their_shape_on_the_meta_device():
    with torch.device("meta"):
        q, k = torch.empty(70000, 1024, 1, 32), torch.empty(70000, 5, 1, 32)
        assert ops.cross_attention(q, k, k).shape == q.shape
        assert ops.gather_patches(torch.empty(4096, 3, 512, 512), None, 16).shape == (4096, 1024, 768)
        pred, images = torch.empty(16384, 1024, 192), torch.empty(16384, 3, 256, 256)
        assert ops.masked_pixel_loss(pred, images, None, 8, reduction="none").shape == (16384, 1024)
        half, row = torch.empty(70000, 1024, 32), torch.empty(32)
        assert ops.add_layer_norm(half, half, row, row)[1].shape == half.shape
        assert ops.gelu_linear(half, torch.empty(4, 32)).shape == (70000, 1024, 4)
        tokens, row = torch.empty(4096, 4096, 160), torch.empty(160)
        assert ops.place_tokens(tokens, row, torch.empty(4097, 160), row).shape == (4096, 4097, 160)


@contextmanager
def gpu(capability: tuple[int, int] = (9, 0), interpreting: bool = False, hip: str | None = None) -> Iterator[None]:
    """Fake CUDA tensors, in a process that would have such a GPU."""
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode():
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        patch.setattr(torch.version, "hip", hip)
        patch.setattr(dispatch, "interpreting", lambda: interpreting)
        patch.setattr(dispatch, "arch", lambda _: 10 * capability[0] + capability[1])
        dispatch.device_reasons.cache_clear()
        try:
            yield
        finally:
            dispatch.device_reasons.cache_clear()


def reasons(op: str) -> tuple[str, ...]:
    return explain(getattr(ops, op), **VALID[op]).reasons


def attention(queries: int = 9, keys: int = 5, width: int = 64, **kind: Any) -> tuple[str, ...]:
    q, k = (torch.empty(2, length, 2, width, **kind) for length in (queries, keys))
    return explain(ops.cross_attention, q, k, k).reasons


def norm(width: int = 8, **kind: Any) -> tuple[str, ...]:
    x, row = torch.empty(2, width, **kind), torch.empty(width, **kind)
    return explain(ops.add_layer_norm, x, x, row, row).reasons


def block(**kind: Any) -> tuple[str, ...]:
    return kernel_reasons(torch.empty(2, **kind))


def gelu(**kind: Any) -> tuple[str, ...]:
    return explain(ops.gelu_linear, torch.empty(2, 8, **kind), torch.empty(4, 8, **kind)).reasons


def on_gpu(lead: Callable[..., Any], *args: Any, kind: Any = None, **options: Any) -> tuple[str, ...]:
    with gpu(**(kind or {})):
        return lead(*args, device="cuda", **options)


def without_triton() -> tuple[str, ...]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda _: None)
        return on_gpu(norm)


def in_a_transform() -> tuple[str, ...]:
    found: list[str] = []
    torch.func.grad(lambda x: x * len(found.extend(gelu()) or found))(torch.zeros(()))
    return tuple(found)


def with_tf32() -> tuple[str, ...]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return on_gpu(attention, 197, 128)
    finally:
        torch.set_float32_matmul_precision(before)


def forced(backend: Any) -> tuple[str, ...]:
    with use_backend(backend):
        return norm()


def without_tensors(dtype: torch.dtype = torch.bfloat16, width: int = 64, rows: int = 9) -> tuple[str, ...]:
    return why_not_triton(torch.device("cuda"), dtype, head_width=width, short_rows=rows)


DOUBLE: Any = {"dtype": torch.float64}
# What leads to a reason, a word of the fact, and a word of the way out.
REASONS: dict[str, tuple[Callable[[], tuple[str, ...]], str, str]] = {
    **{f"CPU, {op}": (partial(reasons, op), "the tensors are on the CPU", "CUDA") for op in VALID},
    "meta": (partial(norm, device="meta"), "on meta", "move them to cuda"),
    "no Triton": (without_triton, "triton is not installed", "pip install triton"),
    "AMD": (partial(on_gpu, norm, kind={"hip": "7.0"}), "AMD", "torch runs"),
    "old GPU": (partial(on_gpu, norm, kind={"capability": (7, 5)}), "7.5", "A100 or a later GPU"),
    "interpreter": (partial(on_gpu, norm, kind={"interpreting": True}), "TRITON_INTERPRET=1", "unset it"),
    "torch forced": (partial(forced, "torch"), 'use_backend("torch")', "leave its block"),
    "triton forced": (partial(forced, "triton"), 'use_backend("triton")', "leave its block"),
    "GELU in a transform": (in_a_transform, "torch.func", "outside"),
    "float64 norm": (partial(on_gpu, norm, **DOUBLE), "float64", "pass float32"),
    "float64 GELU": (partial(on_gpu, gelu, **DOUBLE), "float64", "pass float32"),
    "float64 block": (partial(on_gpu, block, **DOUBLE), "float64", "pass float32"),
    "float64 attention": (partial(on_gpu, attention, **DOUBLE), "float64", "pass float32"),
    "wide row": (partial(norm, 9000), "9000", "at most that width"),
    "large patch": (
        lambda: explain(ops.gather_patches, torch.empty(1, 3, 128, 128), None, 128).reasons, "65536", "smaller patches",
    ),
    "named way": (lambda: explain(ops.cross_attention, Q, K, V, backend="math").reasons, "was given", "auto"),
    "both sides long": (partial(attention, 200, 300), "200 queries, 300 keys", "shorten one side"),
    "float32 without TF32": (partial(on_gpu, attention), "float32_matmul_precision", 'precision("high")'),
    "no tile": (with_tf32, "width 64 and 128 rows", "16 bits, narrower heads"),
    "head width": (partial(without_tensors, width=36), "36", "number of heads"),
    "dtype": (partial(without_tensors, torch.float8_e4m3fn), "float8_e4m3fn", "pass float16"),
    "rows": (partial(without_tensors, rows=129), "129 rows", "scaled_dot_product_attention"),
}  # fmt: skip


@pytest.mark.plain_empty
@pytest.mark.parametrize("lead, fact, way_out", REASONS.values(), ids=REASONS)
def test_a_reason_against_the_kernels_names_the_fact_and_a_way_out(lead: Any, fact: str, way_out: str):
    (text,) = {text for text in lead() if fact in text}
    before, after = text.split("; ", 1)
    assert fact in before
    assert way_out in after


@pytest.mark.plain_empty
def test_calls_on_a_gpu_have_no_reason_against_the_kernels():
    with gpu():
        for op in VALID:
            narrow = torch.bfloat16 if op == "cross_attention" else None
            given: dict[str, Any] = {
                name: torch.empty(x.shape, dtype=narrow or x.dtype, device="cuda") if isinstance(x, Tensor) else x
                for name, x in VALID[op].items()
            }
            found = explain(getattr(ops, op), **given)
            assert found.backend == "triton"
            assert str(found).startswith("runs: triton on cuda")


@pytest.mark.plain_empty
@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0), (10, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_cpu_explains_a_call_as_a_gpu_would(capability: tuple[int, int], dtype: torch.dtype, monkeypatch):
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    calls: dict[str, list[dict[str, Any]]] = {op: [VALID[op]] for op in VALID}
    shapes = [(9, 5, 64), (197, 128, 128), (200, 300, 64), (9, 5, 36)]
    calls["cross_attention"] += [
        {name: torch.zeros(2, length, 2, width) for name, length in (("q", q), ("k", k), ("v", k))}
        for q, k, width in shapes
    ]
    for op, cases in calls.items():
        for case in cases:
            given: dict[str, Any] = {
                name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in case.items()
            }
            with gpu(capability):
                moved: dict[str, Any] = {
                    name: torch.empty(x.shape, dtype=x.dtype, device="cuda") if isinstance(x, Tensor) else x
                    for name, x in given.items()
                }
                wanted = explain(getattr(ops, op), **moved)
            sm = f"sm_{capability[0]}{capability[1]}"
            here = explain(getattr(ops, op), **given)
            found = explain(getattr(ops, op), as_if=sm, **given)
            assert (found.backend, found.reasons) == (wanted.backend, wanted.reasons)
            assert str(found).startswith(f"would run: {found.backend} on {sm}")
            assert explain(getattr(ops, op), **given) == here  # nothing is imagined any more

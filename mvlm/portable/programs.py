"""Programs of a trained model's three parts, torch.export's .pt2 files and ONNX files, and the folder around them.

A part is a module with plain tensors as inputs and outputs. It computes what `mvlm.model.plain` computes, with torch's
own operators once exported, so a program runs where mvlm is not installed. Texts are padded. After a program is written
it is read back and compared with the network, on batches and lengths that it was not traced with. The folder also has a
tokenizer.json and a preprocess.json, which say how to prepare texts and images.

Shape legend: B batch, N patches, L tokens of the longest text, C width, E contrastive width, S image side.
"""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mvlm.errors import ConfigError, RunError
from mvlm.model.attention import Attention, Branch
from mvlm.model.network import MaskVLMNetwork
from mvlm.model.pretrained import TOKENIZER_FILE
from mvlm.model.towers.text import TextTower
from mvlm_dataloading import Tokenizer
from mvlm_dataloading.errors import need
from mvlm_dataloading.files import sha256, write_json
from mvlm_kernels.add_layer_norm import reference


class ImageEmbedder(nn.Module):
    """The image encoder and its contrastive projection."""

    def __init__(self, network: MaskVLMNetwork) -> None:
        super().__init__()
        self.encoder, self.projection = network.image_encoder, network.image_projection

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels uint8 (B, 3, S, S) -> embedding (B, E) of unit length, features (B, 1+N, C)."""
        features = self.encoder(pixels)
        return F.normalize(self.projection(features[:, 0]), dim=-1), features


class TextEmbedder(nn.Module):
    """The text encoder and its contrastive projection."""

    def __init__(self, network: MaskVLMNetwork) -> None:
        super().__init__()
        self.encoder, self.projection = network.text_encoder, network.text_projection

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """input_ids int64 (B, L), [CLS] first; attention_mask int64 (B, L), 1 = a token, 0 = padding.

        Returns embedding (B, E) of unit length, features (B, L, C). Features of padding have no meaning.
        """
        exists = attention_mask != 0
        if isinstance(self.encoder, TextTower):
            features = self.encoder.padded(input_ids, exists)
            return F.normalize(self.projection(features[:, 0]), dim=-1), features
        position = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)

        def attend(attention: Attention, rows: Tensor) -> Branch:
            return attention(rows, rows, exists)

        features = self.encoder.run(input_ids, position, attend)
        return F.normalize(self.projection(features[:, 0]), dim=-1), features


class Matcher(nn.Module):
    """The cross-modality encoders and the matching head."""

    def __init__(self, network: MaskVLMNetwork) -> None:
        super().__init__()
        self.image_cross, self.text_cross, self.head = network.image_cross, network.text_cross, network.matching_head

    def forward(self, image_features: Tensor, text_features: Tensor, attention_mask: Tensor) -> Tensor:
        """image_features (B, 1+N, C), text_features (B, L, C), attention_mask int64 (B, L), as the embedders give them.

        Returns ITM's log-odds (B,) that image b and text b belong together.
        """
        exists = attention_mask != 0
        image = self.image_cross(image_features, text_features, None, exists, first_row_only=True)[:, 0]  # (B, C)
        text = self.text_cross(text_features, image_features, exists, None, first_row_only=True)[:, 0]
        logits = self.head(image * text)
        return logits[:, 1] - logits[:, 0]


class Part(NamedTuple):
    """A module that is exported as one file, with the names and variable axes of its inputs and outputs."""

    name: str
    """Name of its file, without a suffix."""
    module: nn.Module
    inputs: dict[str, tuple[str, ...]]
    """Names of the inputs, with the names of their axes that vary: "batch", "length"; "" for the others."""
    outputs: dict[str, tuple[str, ...]]
    """Names of the outputs, with the names of their axes that vary, as for `inputs`."""


def parts(network: MaskVLMNetwork) -> list[Part]:
    """The three modules of a network that are exported: image embedder, text embedder and matcher."""
    ids, row, rows, texts = ("batch", "length"), ("batch", ""), ("batch", "", ""), ("batch", "length", "")
    tokens = {"input_ids": ids, "attention_mask": ids}
    image_outputs = {"image_embedding": row, "image_features": rows}
    text_outputs = {"text_embedding": row, "text_features": texts}
    features = {"image_features": rows, "text_features": texts, "attention_mask": ids}
    return [
        Part("image_encoder", ImageEmbedder(network), {"pixels": ("batch", "", "", "")}, image_outputs),
        Part("text_encoder", TextEmbedder(network), tokens, text_outputs),
        Part("matching_head", Matcher(network), features, {"log_odds": ("batch",)}),
    ]


def example_inputs(network: MaskVLMNetwork, batch: int, length: int, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Random inputs of each module by name, on the CPU: texts of 3 to `length` tokens, the first of `length`.

    The features of the matching head are those that the encoders compute for the other inputs.
    """
    config, generator = network.config, torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (batch, 3, config.image_size, config.image_size), generator=generator)
    lengths = torch.randint(3, length + 1, (batch,), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = torch.randint(0, config.vocab_size, (batch, length), generator=generator) * mask
    found: dict[str, dict[str, Tensor]] = {
        "image_encoder": {"pixels": pixels.to(torch.uint8)},
        "text_encoder": {"input_ids": ids, "attention_mask": mask},
    }
    with torch.no_grad():
        image: Any = ImageEmbedder(network)(**found["image_encoder"])
        text: Any = TextEmbedder(network)(**found["text_encoder"])
    found["matching_head"] = {"image_features": image[1], "text_features": text[1], "attention_mask": mask}
    return found


Format = Literal["pt2", "onnx"]
TOLERANCE = 1e-4
"""Largest difference between a program and the network, absolute for values below 1, else relative."""
OPSET = 20
"""Version of ONNX's operators: the first with GELU."""
MOST_ONNX_BYTES = 1 << 31
"""Largest size of an ONNX file, which is one message of protobuf, with its weights."""
Program = Callable[[dict[str, Tensor]], list[Tensor]]
"""A loaded program: inputs by name -> outputs."""


def write_programs(network: MaskVLMNetwork, folder: Path, format: Format) -> dict[str, float]:
    """Write the three programs of a network in fp32 on the CPU. Returns the largest difference of each, by file name.

    Raises:
        ConfigError: a package of the extra `export` is not installed, or an ONNX file would be too large.
        RunError: a program differs from the network by more than `TOLERANCE`.
    """
    if format == "onnx":
        _check_onnx(network)
    length, found = network.config.text_length, {}
    traced = example_inputs(network, 3, length)  # a batch of 1 would be taken for a constant
    shapes = [(1, min(4, length)), (5, length), (2, 3)]
    others = [example_inputs(network, *shape, seed) for seed, shape in enumerate(shapes)]
    for part in parts(network):
        file = folder / f"{part.name}.{format}"
        program = exported_program(part, traced[part.name], length)
        with _quiet():
            if format == "onnx":
                _write_onnx(program, part, traced[part.name], file)
            else:
                torch.export.save(program, file)
        run = load_program(file)
        differences = [difference(part, run, inputs[part.name]) for inputs in others]
        found[file.name] = max(differences)
        if not found[file.name] <= TOLERANCE:
            raise RunError(
                f"{file.name}: wanted outputs within {TOLERANCE} of the network's, found a difference of "
                f"{found[file.name]:.2g}; report this model and these versions: torch {torch.__version__}"
            )
    return found


def exported_program(part: Part, example: dict[str, Tensor], text_length: int) -> ExportedProgram:
    """The program of a part, for any batch and texts of 2 to `text_length` tokens, in torch's own operators."""
    axes = {"batch": Dim("batch", min=1), "length": Dim("length", min=2, max=text_length)}
    shapes = {name: {i: axes[axis] for i, axis in enumerate(of) if axis} for name, of in part.inputs.items()}
    with _quiet(), torch.no_grad():
        program = torch.export.export(part.module.eval(), (), example, dynamic_shapes=shapes)
        return program.run_decompositions(_OURS)


def _gelu(h: Tensor, h_bias: Tensor | None) -> Tensor:
    return F.gelu(h if h_bias is None else h + h_bias)


_OURS: Any = {
    torch.ops.mvlm_kernels.add_layer_norm.default: reference.add_layer_norm,
    torch.ops.mvlm_kernels.gelu.default: _gelu,
}
"""Operators of `mvlm_kernels` in an exported network -> the same computation by torch's own operators."""


def load_program(file: Path) -> Program:
    """Load a program from a .pt2 or an .onnx file; it runs on the CPU."""
    if file.suffix == ".onnx":
        session = need("onnxruntime", "export").InferenceSession(str(file), providers=["CPUExecutionProvider"])

        def run_onnx(inputs: dict[str, Tensor]) -> list[Tensor]:
            outputs = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
            return [torch.from_numpy(output) for output in outputs]

        return run_onnx
    with _quiet():
        module = torch.export.load(file).module()

    @torch.no_grad()
    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        return _as_list(module(**inputs))

    return run


@torch.no_grad()
def difference(part: Part, run: Program, inputs: dict[str, Tensor]) -> float:
    """Largest difference of a program's outputs from the part's, absolute for values below 1, else relative."""
    found = 0.0
    for wanted, got in zip(_as_list(part.module(**inputs)), run(inputs), strict=True):
        if wanted.shape != got.shape or not bool(torch.isfinite(got).all()):
            return float("inf")
        found = max(found, float(((wanted - got).abs() / wanted.abs().clamp(min=1)).max()))
    return found


def _check_onnx(network: MaskVLMNetwork) -> None:
    """ConfigError for a missing package, or a part that fits in no ONNX file: protobuf says so only after the trace."""
    try:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            need(package, "export")
    except ImportError as error:
        raise ConfigError(f"onnx: wanted its packages, found one missing: {error}") from None
    for part in parts(network):
        size = sum(x.numel() * x.element_size() for x in (*part.module.parameters(), *part.module.buffers()))
        if size >= MOST_ONNX_BYTES:
            raise ConfigError(
                f"onnx: wanted programs below {MOST_ONNX_BYTES / 2**30:g} GiB each, {part.name} has "
                f"{size / 2**30:.2f} GiB; use --format pt2"
            )


def _write_onnx(program: ExportedProgram, part: Part, example: dict[str, Tensor], file: Path) -> None:
    made: Any = torch.onnx.export(
        program,
        (),
        kwargs=example,
        input_names=list(part.inputs),
        output_names=list(part.outputs),
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    proto = made.model_proto
    values = [*proto.graph.input, *proto.graph.output]
    wanted = {**part.inputs, **part.outputs}
    renamed = {}
    for value in values:
        for axis, dimension in zip(wanted[value.name], value.type.tensor_type.shape.dim, strict=True):
            if axis:
                renamed[dimension.dim_param] = axis
    for value in [*values, *proto.graph.value_info]:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in renamed:
                dimension.dim_param = renamed[dimension.dim_param]
    file.write_bytes(proto.SerializeToString())


def _as_list(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


@contextmanager
def _quiet() -> Iterator[None]:
    """Context without the warnings of torch.export and of the ONNX exporter about their own internals."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


PREPROCESS = "preprocess.json"


def write_programs_folder(
    network: MaskVLMNetwork, tokenizer: Tokenizer, model_sha256: str, folder: Path, format: Format
) -> dict[str, float]:
    """Write a network's programs, tokenizer.json and preprocess.json to a folder (docs/guides/export.md).

    Returns and raises as `write_programs`. `model_sha256` is `TrainedModel.sha256`.
    """
    found, config, programs = write_programs(network, folder, format), network.config, {}
    write_tokenizer(tokenizer, config.text_length, folder / TOKENIZER_FILE)
    for part in parts(network):
        file = f"{part.name}.{format}"
        programs[part.name] = {
            "file": file,
            "sha256": sha256(folder / file),
            "inputs": list(part.inputs),
            "outputs": list(part.outputs),
            "largest_difference": found[file],
        }
    preprocessing = {
        "format": format,
        "opset": OPSET if format == "onnx" else None,
        "tolerance": TOLERANCE,
        "model_sha256": model_sha256,
        "model": json.loads(json.dumps(config.to_dict())),
        "image": {
            "size": config.image_size,
            "dtype": "uint8",
            "layout": "batch, channel (red, green, blue), row, column",
            "orientation": "turned as EXIF says",
            "depth": "of 16 bits the upper 8",
            "background": "white under transparent areas",
            "resize": "squeezed to a square, bilinear with antialiasing",
            "normalization": "inside the program",
        },
        "text": {
            "max_length": config.text_length,
            "cls_id": tokenizer.cls_id,
            "sep_id": tokenizer.sep_id,
            "pad_id": tokenizer.pad_id,
            "mask_id": tokenizer.mask_id,
        },
        "logit_scale": network.log_scale.exp().item(),
        "programs": programs,
    }
    write_json(folder / PREPROCESS, preprocessing)
    return found


def write_tokenizer(tokenizer: Tokenizer, length: int, file: Path) -> None:
    """Write a tokenizer.json that adds [CLS] and [SEP], truncates to `length` tokens and pads to the longest text.

    With the package `tokenizers`, `Tokenizer.from_file(file).encode_batch(texts)` then has the model's ids and masks.
    For a text with the name of a special token in it, first set `encode_special_tokens = True`: no file can hold that.
    Where special tokens are ordinary pieces (SentencePiece without added_tokens), put the unknown token for such names.
    """
    from tokenizers import Tokenizer as Fast
    from tokenizers.processors import TemplateProcessing

    tokenizer.save(file)
    inner = Fast.from_file(str(file))
    cls, sep, pad = (tokenizer.token(i) for i in (tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id))
    inner.post_processor = TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0", special_tokens=[(cls, tokenizer.cls_id), (sep, tokenizer.sep_id)]
    )
    inner.enable_truncation(length)
    inner.enable_padding(pad_id=tokenizer.pad_id, pad_token=pad)
    file.write_text(inner.to_str(pretty=True), encoding="utf-8")

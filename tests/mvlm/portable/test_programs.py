"""Programs of torch.export and ONNX: equal to the plain model at any batch and length, and free of mvlm."""

import json
import textwrap

import numpy as np
import pytest
import tokenizers
import torch

from mvlm.errors import ConfigError, RunError
from mvlm.portable import programs as module
from mvlm.portable.programs import difference, example_inputs, load_program, parts, write_tokenizer
from mvlm.tasks.load import load_model
from support.commands import run_python

pytestmark = pytest.mark.slow
TEXTS = ["a red square", "a", "a blue square on a white ground, and then some more words", "[MASK] naïve"]
SHAPES = [(1, 2), (1, 12), (4, 5), (7, 3)]


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int64 (B, L) and attention mask int64 (B, L) of rows of token ids."""
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return ids, mask


@pytest.mark.parametrize("format", ["pt2", pytest.param("onnx", marks=pytest.mark.extended)])
def test_programs_equal_the_plain_model_at_shapes_that_were_not_traced(programs, small, format):
    """The plain model encodes packed texts, each judged alone: it shares neither padding nor batches with programs."""
    network = load_model(small, "cpu", "fp32").network
    image, text, matcher = (load_program(programs(format) / f"{part.name}.{format}") for part in parts(network))
    for number, (batch, length) in enumerate(SHAPES):
        rng = np.random.default_rng(number)
        pixels = torch.from_numpy(rng.integers(0, 256, (batch, 3, 32, 32), dtype=np.uint8))
        rows = [rng.integers(5, 300, rng.integers(2, length + 1)).tolist() for _ in range(batch)]
        rows[0] = rng.integers(5, 300, length).tolist()
        ids, mask = padded(rows)
        image_embedding, image_features = image({"pixels": pixels})
        text_embedding, text_features = text({"input_ids": ids, "attention_mask": mask})
        given = {"image_features": image_features, "text_features": text_features, "attention_mask": mask}
        (log_odds,) = matcher(given)
        for b, row in enumerate(rows):
            with torch.no_grad():
                v = network.encode_image(pixels[b : b + 1])
                w, key_mask = network.encode_text(torch.tensor(row), torch.tensor([0, len(row)]).int(), len(row))
                logits = network.matching_logits(*network.fuse(v, w, key_mask))[0]
            for got, wanted in (
                (image_features[b], v[0]),
                (image_embedding[b], network.embed_image(v)[0]),
                (text_features[b, : len(row)], w[0]),
                (text_embedding[b], network.embed_text(w)[0]),
                (log_odds[b], logits[1] - logits[0]),
            ):
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 if format == "onnx" else 1e-5)


def test_programs_run_where_mvlm_is_not_installed(programs, small, tmp_path):
    """In a process that refuses to import anything of ours."""
    network = load_model(small, "cpu", "fp32").network
    inputs = example_inputs(network, 2, 5)
    torch.save(inputs, tmp_path / "inputs.pt")
    code = f"""
    import sys, warnings
    class Refuse:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0].startswith("mvlm"):
                raise ImportError(name)
    sys.meta_path.insert(0, Refuse())
    warnings.simplefilter("ignore")
    import torch
    inputs = torch.load({str(tmp_path / "inputs.pt")!r})
    found = {{}}
    for name, given in inputs.items():
        program = torch.export.load({str(programs("pt2"))!r} + f"/{{name}}.pt2").module()
        got = program(**given)
        found[name] = got[0] if isinstance(got, tuple) else got
    torch.save(found, {str(tmp_path / "found.pt")!r})
    assert not [name for name in sys.modules if name.startswith("mvlm")]
    """
    done = run_python("-c", textwrap.dedent(code))
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt")
    for part in parts(network):
        with torch.no_grad():
            wanted = part.module(**inputs[part.name])
        torch.testing.assert_close(found[part.name], wanted[0] if isinstance(wanted, tuple) else wanted)


@pytest.mark.extended
def test_onnx_names_its_inputs_outputs_and_axes(programs):
    onnx = pytest.importorskip("onnx")
    shapes = {}
    for file in programs("onnx").glob("*.onnx"):
        model = onnx.load(file)
        onnx.checker.check_model(model)
        assert {opset.domain for opset in model.opset_import} == {""}
        for value in [*model.graph.input, *model.graph.output]:
            dims = value.type.tensor_type.shape.dim
            shapes[file.stem, value.name] = [d.dim_param or d.dim_value for d in dims]
    ids = ["batch", "length"]
    assert shapes == {
        ("image_encoder", "pixels"): ["batch", 3, 32, 32],
        ("image_encoder", "image_embedding"): ["batch", 8],
        ("image_encoder", "image_features"): ["batch", 17, 16],
        ("text_encoder", "input_ids"): ids,
        ("text_encoder", "attention_mask"): ids,
        ("text_encoder", "text_embedding"): ["batch", 8],
        ("text_encoder", "text_features"): [*ids, 16],
        ("matching_head", "image_features"): ["batch", 17, 16],
        ("matching_head", "text_features"): [*ids, 16],
        ("matching_head", "attention_mask"): ids,
        ("matching_head", "log_odds"): ["batch"],
    }


def test_a_program_that_differs_is_found_and_refused(programs, small, tmp_path, monkeypatch):
    network = load_model(small, "cpu", "fp32").network
    inputs = example_inputs(network, 2, 5)["image_encoder"]
    part, run = parts(network)[0], load_program(programs("pt2") / "image_encoder.pt2")
    assert difference(part, run, inputs) < 1e-6
    with torch.no_grad():
        network.image_projection.bias[0] += 0.01
    assert 1e-4 < difference(part, run, inputs) < 0.1
    assert difference(part, lambda _: [torch.zeros(1), torch.zeros(1)], inputs) == float("inf")
    assert difference(part, lambda given: [x * torch.nan for x in run(given)], inputs) == float("inf")
    monkeypatch.setattr(module, "load_program", lambda file: run)
    monkeypatch.setattr(module, "parts", lambda network: [part])
    with pytest.raises(RunError, match=r"image_encoder.pt2: wanted outputs within 0.0001 of the network's, found"):
        module.write_programs(network, tmp_path, "pt2")


def test_a_part_too_large_for_an_onnx_file_is_refused_before_it_is_traced(small, tmp_path, monkeypatch):
    network = load_model(small, "cpu", "fp32").network
    monkeypatch.setattr(module, "need", lambda *_: None)
    monkeypatch.setattr(module, "exported_program", lambda *_: pytest.fail("traced"))
    image = parts(network)[0].module
    largest = sum(x.numel() * x.element_size() for x in (*image.parameters(), *image.buffers()))
    monkeypatch.setattr(module, "MOST_ONNX_BYTES", largest)
    with pytest.raises(ConfigError, match=r"onnx: wanted programs below .* GiB each, image_encoder has"):
        module.write_programs(network, tmp_path, "onnx")


def test_preprocess_json_describes_the_programs(programs, small):
    found = json.loads((programs("pt2") / "preprocess.json").read_text())
    assert found["model_sha256"] == load_model(small, "cpu").sha256
    assert found["logit_scale"] == pytest.approx(1 / 0.07)
    assert (found["image"]["size"], found["text"]["max_length"], found["text"]["cls_id"]) == (32, 12, 2)
    assert set(found["programs"]) == {"image_encoder", "text_encoder", "matching_head"}
    for program in found["programs"].values():
        assert program["largest_difference"] < 1e-4
        assert (programs("pt2") / program["file"]).is_file()


def test_tokenizer_json_gives_the_models_ids_and_masks(tokenizer, tmp_path):
    write_tokenizer(tokenizer, 12, tmp_path / "tokenizer.json")
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner.encode_special_tokens = True  # as ours does; the file cannot say so
    found = inner.encode_batch(TEXTS)
    assert {len(encoding.ids) for encoding in found} == {12}  # padded to the longest, which is truncated
    for text, encoding in zip(TEXTS, found, strict=True):
        ids = tokenizer.encode([text], 12)[0].tolist()
        assert encoding.ids == ids + [tokenizer.pad_id] * (12 - len(ids))
        assert encoding.attention_mask == [1] * len(ids) + [0] * (12 - len(ids))
    assert len(inner.encode_batch(["a"])[0].ids) == 3  # no longer than the longest text

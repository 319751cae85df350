# torch and timm type the children of a module as Tensor or Module, whatever they are.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
"""Image towers of timm with random weights, compared with timm's own modules.

    PYTHONPATH=tests python -m support.towers

walks over the models of timm that are a VisionTransformer or an Eva, with two layers and four patches a side, and over
their relatives. It writes benchmarks/results/towers-timm.csv and the last section of docs/reference/support.md. Of
models wider than 1,280 only the shape is compared.
"""

import csv
import logging
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
from torch import Tensor, nn

from mvlm.config.model import MaskVLMConfig
from mvlm.errors import ConfigError
from mvlm.model.towers.timm_tower import TimmTower, tower_settings

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "benchmarks" / "results" / "towers-timm.csv"
PAGE = ROOT / "docs" / "reference" / "support.md"
FIELDS = ("model", "class", "row 0", "width", "patch", "result")
FILES = (
    "vision_transformer", "eva", "deit", "vision_transformer_hybrid", "vision_transformer_relpos",
    "vision_transformer_sam", "vitamin", "beit", "naflexvit",
)  # fmt: skip
"""Files of timm whose models are walked over."""
FAMILIES = (
    "siglip", "clip", "dinov3", "dinov2", "eva02", "eva", "deit3", "deit", "pe_core", "pe_lang", "pe_spatial", "aimv2",
    "beit3", "sapiens2", "lingbot", "rope", "sam", "relpos", "vitamin", "beit", "naflexvit", "flexivit", "test_vit",
)  # fmt: skip
"""Parts of names that tell a family; the first counts. All others are plain ViTs."""
MOST_WIDTH = 1280


def tower_config(name: str, **changes: Any) -> MaskVLMConfig:
    """Configuration of a model with a tower of two layers, for images of four patches a side."""
    settings = tower_settings(f"timm:{name}")
    side = 4 * settings["patch_size"]
    sizes: dict[str, Any] = {
        "image_size": side, "mask_block": side // 2, "image_layers": 2, "text_layers": 1, "cross_layers": 1,
        "decoder_layers": 1, "vocab_size": 300, "mask_token_id": 4, "text_length": 12,
    }  # fmt: skip
    return MaskVLMConfig(**(settings | sizes | changes))


def timm_module(config: MaskVLMConfig) -> Any:
    """timm's module with the sizes of a tower and random weights that matter, in evaluation mode."""
    name = config.image_tower.removeprefix("timm:")
    module = timm.create_model(name, num_classes=0, img_size=config.image_size, depth=config.image_layers)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-0.1, 0.1) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn(len(parameter)))
    return module.eval()


def without_initialization() -> ExitStack:
    """Context in which timm's modules are made with zeros in place of their costly random weights."""
    stack = ExitStack()
    for name in ("vision_transformer", "eva"):
        stack.enter_context(patch(f"timm.models.{name}.trunc_normal_", lambda tensor, **_: tensor.data.zero_()))
    stack.enter_context(patch("torch.nn.init.kaiming_uniform_", lambda tensor, **_: tensor.data.zero_()))
    return stack


def masked_by_a_loop(module: Any, images: Tensor, masked: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """Features and pooled rows of timm's module whose embedded patches are replaced one by one where masked (B, N)."""

    def replace(_: nn.Module, __: Any, patches: Tensor) -> Tensor:
        rows = patches.clone().view(len(images), -1, patches.shape[-1])
        for image in range(len(images)):
            for place in range(rows.shape[1]):
                if masked[image, place]:
                    rows[image, place] = token
        return rows.view(patches.shape)

    handle = module.patch_embed.register_forward_hook(replace)
    try:
        features = module.forward_features(images)
    finally:
        handle.remove()
    return features, module.forward_head(features, pre_logits=True)


@torch.no_grad()
def difference(name: str) -> float:
    """Largest difference of a tower's features from timm's, relative to the largest, with and without masks."""
    torch.manual_seed(0)
    config = tower_config(name)
    with without_initialization():
        module, tower = timm_module(config), TimmTower(config).eval()
    tower.module.load_state_dict(module.state_dict())
    tower.mask_token.normal_()
    images = torch.randint(0, 256, (2, 3, config.image_size, config.image_size), dtype=torch.uint8)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (config.image_mean, config.image_std))
    pixels, largest = (images / 255 - mean) / std, 0.0
    for masked in (torch.zeros(2, 16, dtype=torch.bool), torch.rand(2, 16) < 0.5):
        features, pooled = masked_by_a_loop(module, pixels, masked, tower.mask_token)
        rows = features[:, module.num_prefix_tokens :]
        if isinstance(module.norm, nn.Identity):
            rows = module.fc_norm(rows)
        if module.cls_token is not None and module.attn_pool is None and isinstance(module.fc_norm, nn.Identity):
            pooled = features[:, 0]
        wanted, found = torch.cat([pooled[:, None], rows], dim=1), tower(images, masked if masked.any() else None)
        largest = max(largest, float((found - wanted).abs().max() / wanted.abs().max()))
    return largest


def names() -> list[str]:
    """Names of the models that are walked over."""
    files = {name: timm.models.model_entrypoint(name).__module__.rpartition(".")[2] for name in timm.list_models()}
    return [name for name, file in files.items() if file in FILES]


def row_of(name: str) -> dict[str, str]:
    """One model: what it is, and whether it is a tower that computes the same, or why not."""
    row = dict.fromkeys(FIELDS, "") | {"model": name}
    try:
        settings = tower_settings(f"timm:{name}")
    except ConfigError as error:
        return row | {"result": f"refused: {str(error).rpartition(f'{name}: ')[2]}"}
    wide = settings["width"] > MOST_WIDTH
    with torch.device("meta"):
        config = tower_config(name)
        tower = TimmTower(config)
        shape = tower(torch.empty(1, 3, config.image_size, config.image_size)).shape
    assert shape == (1, 17, config.width)
    module = tower.module
    own = module.attn_pool is not None or module.cls_token is None or not isinstance(module.fc_norm, nn.Identity)
    row |= {"class": type(module).__name__, "width": str(module.embed_dim), "patch": str(config.patch_size)}
    row["row 0"] = ("attention pooling" if module.attn_pool is not None else module.global_pool) if own else "[CLS]"
    if wide:
        return row | {"result": "shape"}
    return row | {"result": "equal" if difference(name) < 1e-5 else "different"}


def rows_of() -> list[dict[str, str]]:
    """Rows of all models."""
    logging.disable(logging.WARNING)
    try:
        with without_initialization():
            return [row_of(name) for name in names()]
    finally:
        logging.disable(logging.NOTSET)


def read_rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def section(rows: list[dict[str, str]]) -> str:
    """The section of the page on a walk: its towers by family, class and row 0, with counts, and what is refused."""
    counts: dict[tuple[str, ...], Counter[str]] = {}
    refused: Counter[str] = Counter()
    for row in rows:
        family = next((part for part in FAMILIES if part in row["model"]), "vit")
        kind = "hybrid" if "HybridEmbed" in row["result"] and family == "vit" else family
        if row["result"].startswith("refused"):
            refused[row["result"].removeprefix("refused: ") + f" ({kind})"] += 1
        else:
            counts.setdefault((kind, row["class"], row["row 0"]), Counter())[row["result"]] += 1
    lines = [f"| {' | '.join(key)} | {of['equal']} | {of['shape']} |" for key, of in sorted(counts.items())]
    table = "\n".join(lines)
    reasons = "\n".join(f"- {number}: {reason}" for reason, number in sorted(refused.items()))
    return f"""### Image towers

`--model.image-tower timm:NAME`, with a model of timm {timm.__version__}. `PYTHONPATH=tests python -m support.towers`
makes this section and [a table of each model](../../benchmarks/results/towers-timm.csv).

{len(rows) - refused.total()} of {len(rows)} models are towers. Each was built with two layers and random weights.
*row 0*: the feature of the whole image, in front of those of its patches.
*equal*: features, with masked patches and without, are those of timm's own forward pass, within 1e-5 of the largest.
*shape*: wider than {MOST_WIDTH:,}, so only the shape was compared.

| family | class of timm | row 0 | equal | shape |
|---|---|---|---|---|
{table}

The others are refused:

{reasons}
"""


def write_page() -> None:
    """Rewrite the section on image towers at the end of the page, from the committed rows of results."""
    before = PAGE.read_text().partition("\n### Image towers\n")[0]
    PAGE.write_text(f"{before}\n{section(read_rows(COMMITTED))}")


if __name__ == "__main__":
    with COMMITTED.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, FIELDS, lineterminator="\n")
        writer.writeheader()
        for model in names():
            writer.writerow(row_of(model))
            opened.flush()
    write_page()
    sys.exit(any(row["result"] == "different" for row in read_rows(COMMITTED)))

"""The method written out in numpy float64: one image and one caption at a time, without padding."""

import math
from itertools import pairwise

import numpy as np

from mvlm.model.maskvlm import MaskVLM
from mvlm_dataloading import Batch, Masks
from support.models import uniform_of_pair

ERF = np.vectorize(math.erf)


class Reference:
    """Formulas of the method on the weights of a model, by their names."""

    def __init__(self, model: MaskVLM) -> None:
        self.config = model.config
        self.weights = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name: str, x: np.ndarray, eps: float = 1e-5) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def mlp(self, name: str, x: np.ndarray) -> np.ndarray:
        return self.linear(f"{name}.down", gelu(self.linear(f"{name}.up", x)))

    def attention(self, name: str, x: np.ndarray, memory: np.ndarray) -> np.ndarray:
        query, key, value = (
            self.linear(f"{name}.{part}", rows) for part, rows in (("query", x), ("key", memory), ("value", memory))
        )
        width = self.config.width // self.config.heads
        heads = []
        for head in range(self.config.heads):
            part = slice(head * width, (head + 1) * width)
            scores = query[:, part] @ key[:, part].T / math.sqrt(width)
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(scores / scores.sum(-1, keepdims=True) @ value[:, part])
        return self.linear(f"{name}.out", np.concatenate(heads, -1))

    def patches(self, image: np.ndarray) -> np.ndarray:
        """Normalised pixels (N, 3*P*P) of an image uint8 (3, S, S)."""
        side, patch = self.config.image_size, self.config.patch_size
        mean, std = (
            np.asarray(values, np.float32).astype(np.float64)[:, None, None]  # the model keeps them in fp32
            for values in (self.config.image_mean, self.config.image_std)
        )
        normal = (image / 255 - mean) / std
        rows = []
        for top in range(0, side, patch):
            for left in range(0, side, patch):
                rows.append(normal[:, top : top + patch, left : left + patch].ravel())
        return np.stack(rows)

    def target(self, patch: np.ndarray) -> np.ndarray:
        """MIM's target of a patch (3*P*P)."""
        if self.config.mim_target == "pixels":
            return patch
        mean = sum(patch) / len(patch)
        variance = sum((x - mean) ** 2 for x in patch) / (len(patch) - 1)
        return (patch - mean) / math.sqrt(variance + 1e-6)

    def error(self, predicted: np.ndarray, patch: np.ndarray) -> np.ndarray:
        """MIM's errors of a predicted patch (3*P*P)."""
        difference = abs(predicted - self.target(patch))
        return difference if self.config.mim_loss == "l1" else difference * difference

    def image(self, image: np.ndarray, masked: list[int] | None = None) -> np.ndarray:
        x = self.linear("image_encoder.patch_projection", self.patches(image))
        for patch in masked or []:
            x[patch] = self.weights["image_encoder.mask_token"]
        x = np.concatenate([self.weights["image_encoder.cls_token"][None], x]) + self.weights["image_encoder.position"]
        return self.norm("image_encoder.norm", self.image_blocks(x), 1e-6)

    def image_blocks(self, x: np.ndarray) -> np.ndarray:
        for layer in range(self.config.image_layers):
            name = f"image_encoder.blocks.{layer}"
            y = self.norm(f"{name}.norm1", x, 1e-6)
            x = x + self.attention(f"{name}.attention", y, y)
            x = x + self.mlp(f"{name}.mlp", self.norm(f"{name}.norm2", x, 1e-6))
        return x

    def masked_image(self, image: np.ndarray, masked: list[int]) -> np.ndarray:
        """Features (1+N, C) of an image whose masked patches are replaced, or left out and filled in afterwards."""
        if self.config.mim_rows == "all":
            return self.image(image, masked)
        seen = [p for p in range(len(self.patches(image))) if p not in masked]
        x = self.linear("image_encoder.patch_projection", self.patches(image))
        x = np.concatenate([self.weights["image_encoder.cls_token"][None], x]) + self.weights["image_encoder.position"]
        x = self.norm("image_encoder.norm", self.image_blocks(x[[0, *(1 + p for p in seen)]]), 1e-6)
        rows = np.repeat(self.weights["image_encoder.mask_token"][None], 1 + len(self.patches(image)), 0)
        rows[[0, *(1 + p for p in seen)]] = x
        return rows + self.weights["image_encoder.position"]

    def text(self, tokens: list[int]) -> np.ndarray:
        x = self.weights["text_encoder.words.weight"][tokens] + self.weights["text_encoder.position"][: len(tokens)]
        x = self.norm("text_encoder.norm", x)
        for layer in range(self.config.text_layers):
            name = f"text_encoder.blocks.{layer}"
            x = self.norm(f"{name}.norm1", x + self.attention(f"{name}.attention", x, x))
            x = self.norm(f"{name}.norm2", x + self.mlp(f"{name}.mlp", x))
        return x

    def cross(
        self, stack: str, layers: int, x: np.ndarray, memory: np.ndarray, keys: np.ndarray | None = None
    ) -> np.ndarray:
        """x attends to itself, or to `keys` in its place, and to `memory`."""
        for layer in range(layers):
            name = f"{stack}.blocks.{layer}"
            if self.config.cross_norm == "pre":
                y = self.norm(f"{name}.norm1", x)
                own = y if keys is None else self.norm(f"{name}.norm1", keys)
                x = x + self.attention(f"{name}.self_attention", y, own)
                x = x + self.attention(f"{name}.cross_attention", self.norm(f"{name}.norm2", x), memory)
                x = x + self.mlp(f"{name}.mlp", self.norm(f"{name}.norm3", x))
            else:
                own = x if keys is None else keys
                x = self.norm(f"{name}.norm1", x + self.attention(f"{name}.self_attention", x, own))
                x = self.norm(f"{name}.norm2", x + self.attention(f"{name}.cross_attention", x, memory))
                x = self.norm(f"{name}.norm3", x + self.mlp(f"{name}.mlp", x))
        return self.norm(f"{stack}.norm", x) if self.config.cross_norm == "pre" else x

    def losses(self, batch: Batch, masks: Masks, seed: int, step: int) -> dict[str, float]:
        """The four losses of a batch, by name."""
        config, number = self.config, len(batch.images)
        images, starts = batch.images.numpy(), batch.cu_seqlens.tolist()
        captions = [batch.tokens[a:b].tolist() for a, b in pairwise(starts)]
        hidden = [
            [config.mask_token_id if start + i in masks.token_ids.tolist() else t for i, t in enumerate(caption)]
            for start, caption in zip(starts[:-1], captions, strict=True)
        ]
        v, w = [self.image(image) for image in images], [self.text(caption) for caption in captions]

        nats, errors = [], []
        for b in range(number):
            x = self.cross("text_cross", config.cross_layers, self.text(hidden[b]), v[b])
            for place, (was, token) in enumerate(zip(captions[b], hidden[b], strict=True)):
                if starts[b] + place in masks.token_ids.tolist():
                    assert token == config.mask_token_id
                    y = self.norm("language_head.norm", gelu(self.linear("language_head.dense", x[place])))
                    nats.append(-log_softmax(self.linear("language_head.vocabulary", y))[was])
            masked = masks.patch_ids[b].tolist()
            rebuilt = masked[: config.rebuilt_patches]
            x, patches = self.masked_image(images[b], masked), self.patches(images[b])
            if config.mim_rows == "masked":
                seen = x[[0, *(1 + p for p in range(len(patches)) if p not in masked)]]
                for p in rebuilt:  # alone: masked patches do not see each other
                    y = self.cross("image_cross", config.cross_layers, x[[1 + p]], w[b], seen)
                    y = self.cross("image_decoder", config.decoder_layers, y, w[b], seen)
                    errors.append(self.error(self.linear("pixel_head", y[0]), patches[p]))
                continue
            x = self.cross("image_cross", config.cross_layers, x, w[b])
            x = self.cross("image_decoder", config.decoder_layers, x, w[b])
            pixels = self.linear("pixel_head", x[1:])
            errors += [self.error(pixels[p], patches[p]) for p in rebuilt]

        a, t = (
            np.stack([unit(self.linear(name, features[0])) for features in stream])
            for name, stream in (("image_projection", v), ("text_projection", w))
        )
        logits = a @ t.T * np.exp(self.weights["log_scale"])
        itc = -np.mean([log_softmax(logits[i])[i] + log_softmax(logits[:, i])[i] for i in range(number)]) / 2

        terms = [(1.0, self.matching(v[i], w[i], 1)) for i in range(number)]
        for stream, table in ((0, logits), (1, logits.T)):
            for i in range(number):
                scores = {
                    j: table[i, j] - math.log(-math.log(uniform_of_pair(seed, step, stream, i, j)))
                    for j in range(number)
                    if batch.image_id[i] != batch.image_id[j] and batch.text_id[i] != batch.text_id[j]
                }
                if scores:
                    j = max(scores, key=scores.__getitem__)
                    pair = (v[i], w[j]) if stream == 0 else (v[j], w[i])
                    terms.append((1.0, self.matching(*pair, 0)))
        itm = sum(x * weight for weight, x in terms) / sum(weight for weight, _ in terms)
        return {"mlm": float(np.mean(nats)), "mim": float(np.mean(errors)), "itc": float(itc), "itm": float(itm)}

    def matching(self, v: np.ndarray, w: np.ndarray, label: int) -> float:
        """Cross-entropy of the matching head for one image and one caption."""
        layers = self.config.cross_layers
        joined = self.cross("image_cross", layers, v, w)[0] * self.cross("text_cross", layers, w, v)[0]
        return -log_softmax(self.linear("matching_head", joined))[label]


def gelu(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + ERF(x / math.sqrt(2)))


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).sum())

"""The pictures of a report: reconstructions, filled-in words, the best and the worst retrievals."""

import base64
import io
from html import escape

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mvlm.evaluation import rank, unseen_images
from mvlm.evaluation.cross_modal_gain import wrong_partners
from mvlm.inference.encode import EncodedSplit, eval_loader
from mvlm.inference.fill_mask import fill_mask
from mvlm.inference.images import hide_patches
from mvlm.inference.reconstruction import reconstruct
from mvlm.model.maskvlm import MaskVLM
from mvlm_dataloading import Batch, Dataset, Masks, Tokenizer

RECONSTRUCTIONS = 12
FILLED_CAPTIONS = 18
RETRIEVALS = 4  # of each kind


def picture(pixels: Tensor, alt: str) -> str:
    """uint8 (3, S, S) as an <img> that carries its PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(buffer, format="PNG")
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def chosen_samples(number: int, size: int, seed: int) -> list[int]:
    """A fixed random choice of samples, so that a report shows neither the best nor the first."""
    return sorted(np.random.default_rng(seed).permutation(size)[:number].tolist())


def one_pass(
    model: MaskVLM, tokenizer: Tokenizer, split: Dataset, wanted: list[int]
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Pictures uint8 (n, 3, S, S), masked patches (n, K), tokens and masked positions of each wanted sample."""
    images, patches, tokens, hidden = [], [], [], []
    for batch, masks in eval_loader(split, model, tokenizer):
        for row, sample in enumerate(batch.sample_id.tolist()):
            if sample in wanted:
                images.append(batch.images[row].cpu())
                patches.append(masks.patch_ids[row])
                row_tokens, row_hidden = caption_of(batch, masks, row)
                tokens.append(row_tokens)
                hidden.append(row_hidden)
    return torch.stack(images), torch.stack(patches), tokens, hidden


def caption_of(batch: Batch, masks: Masks, row: int) -> tuple[Tensor, Tensor]:
    """Tokens of one caption, and its masked positions within it."""
    start, end = batch.cu_seqlens[row : row + 2].tolist()
    inside = masks.token_ids[(masks.token_ids >= start) & (masks.token_ids < end)]
    return batch.tokens[start:end], inside - start


def reconstructions(model: MaskVLM, tokenizer: Tokenizer, split: Dataset) -> str:
    """Pictures, masked, and rebuilt with their own caption and with another's."""
    samples = chosen_samples(RECONSTRUCTIONS, len(split), seed=1)
    images, patch_ids, _, _ = one_pass(model, tokenizer, split, samples)
    partner = wrong_partners(len(split))
    captions = [split.captions(i)[0] for i in samples]
    wrong = [split.captions(int(partner[i]))[0] for i in samples]
    masked = hide_patches(images, patch_ids, model.config.patch_size)
    with_own = reconstruct(model, tokenizer, images, captions, patch_ids)
    with_wrong = reconstruct(model, tokenizer, images, wrong, patch_ids)
    strips = []
    for row in range(len(samples)):
        panels = (
            (images, "original"),
            (masked, "masked"),
            (with_own, captions[row]),
            (with_wrong, wrong[row]),
        )
        cells = [
            f"<figure>{picture(p[row], name)}<figcaption>{escape(name)}</figcaption></figure>" for p, name in panels
        ]
        strips.append(f'<div class="strip">{"".join(cells)}</div>')
    return (
        "<section><h2>Masked pictures, rebuilt</h2><p class='note'>Original; what the model sees; rebuilt with its "
        "caption; rebuilt with the caption of another picture. Chosen at random from the split.</p>"
        f"<div class='pictures'>{''.join(strips)}</div></section>"
    )


def filled_words(model: MaskVLM, tokenizer: Tokenizer, split: Dataset) -> str:
    """Masked captions, filled in with the right and with a wrong picture in view."""
    samples = chosen_samples(FILLED_CAPTIONS, len(split), seed=2)
    partner = wrong_partners(len(split))
    others = [int(partner[i]) for i in samples]
    images, _, tokens, hidden = one_pass(model, tokenizer, split, samples)
    by_sample = dict(zip(sorted(set(others)), one_pass(model, tokenizer, split, others)[0], strict=True))
    other_images = torch.stack([by_sample[i] for i in others])
    lengths = [len(t) for t in tokens]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    positions = torch.cat([h + int(s) for h, s in zip(hidden, starts[:-1], strict=True)])
    packed = torch.cat(tokens)
    guesses = [
        fill_mask(model, tokenizer, view, packed, lengths, positions)[0][:, 0] for view in (images, other_images)
    ]
    boxes, taken = [], 0
    for row in range(len(samples)):
        mine = slice(taken, taken + len(hidden[row]))
        taken = mine.stop
        shown = [
            marked_caption(tokenizer, tokens[row], hidden[row], None),
            marked_caption(tokenizer, tokens[row], hidden[row], guesses[0][mine]),
            marked_caption(tokenizer, tokens[row], hidden[row], guesses[1][mine]),
        ]
        lines = "".join(
            f"<p>{name}: {text}</p>" for name, text in zip(("hidden", "right", "wrong"), shown, strict=True)
        )
        pictures = picture(images[row], "right picture") + picture(other_images[row], "wrong picture")
        boxes.append(f'<div class="filled"><div>{pictures}</div><div>{lines}</div></div>')
    return (
        "<section><h2>Masked captions, filled in</h2><p class='note'>Above the caption's own picture, below a wrong "
        "one; the likeliest token for each gap with either in view. Green: the hidden token was found.</p>"
        f"<div class='fills'>{''.join(boxes)}</div></section>"
    )


def marked_caption(tokenizer: Tokenizer, tokens: Tensor, hidden: Tensor, guesses: Tensor | None) -> str:
    """A caption as HTML: gaps as blanks when there are no guesses, else the guesses, green when right."""
    pieces, gap = [], dict(zip(hidden.tolist(), range(len(hidden)), strict=True))
    inner = tokens.tolist()[1:-1]
    for position, token in enumerate(inner, 1):
        if position not in gap:
            pieces.append(escape(piece_text(tokenizer, token)))
        elif guesses is None:
            pieces.append(" ▢")
        else:
            guess = int(guesses[gap[position]])
            mark = "right" if guess == token else "wrong"
            pieces.append(f'<span class="{mark}">{escape(piece_text(tokenizer, guess))}</span>')
    return "".join(pieces)


def piece_text(tokenizer: Tokenizer, token: int) -> str:
    """A token's own text; byte-level BPE writes the blank before a word as Ġ."""
    blank = " " if tokenizer.token(token).startswith("Ġ") else ""
    return blank + tokenizer.decode([token])


def retrievals(model: MaskVLM, split: Dataset, train: Dataset, features: EncodedSplit) -> str:
    """The surest right answers and the most mistaken ones, in both directions."""
    parts = []
    unseen = unseen_images(split, train)
    for direction, title in (("tr", "Image to text"), ("ir", "Text to image")):
        ranks = rank(model, features, direction)
        pool, among = ranks.itm == 0, ""
        if unseen is not None:
            fresh = pool & (unseen if direction == "tr" else unseen[features.owner])
            if fresh.any():
                pool, among = fresh, ", among unseen concepts"
        best = ranks.score.masked_fill(~pool, float("-inf")).topk(min(RETRIEVALS, int(pool.sum()))).indices
        worst = ranks.itm.topk(min(RETRIEVALS, len(ranks.itm))).indices
        for name, chosen in (
            (f"best: right, and surest{among}", best),
            ("worst: the right answer ranked lowest", worst),
        ):
            rows = [
                retrieval_row(split, features, direction, int(q), ranks.top[q].tolist(), int(ranks.itm[q]))
                for q in chosen
            ]
            parts.append(f"<h3>{title}, {name}</h3>{''.join(rows)}")
    return f"<section><h2>Retrieval, best and worst</h2>{''.join(parts)}</section>"


def retrieval_row(
    split: Dataset, features: EncodedSplit, direction: str, query: int, answers: list[int], wrong_before: int
) -> str:
    """One query with its first five answers; right ones in green."""
    if direction == "tr":
        asked = thumbnail(split, query)
        cells = [mark(escape(features.captions[a]), int(features.owner[a]) == query) for a in answers]
    else:
        asked = f"<p>{escape(features.captions[query])}</p>"
        owner = int(features.owner[query])
        names = [mark(escape(split.captions(a)[0]), owner == a) for a in answers]
        cells = [
            f"<figure>{thumbnail(split, a)}<figcaption>{name}</figcaption></figure>"
            for a, name in zip(answers, names, strict=True)
        ]
    body = "".join(f"<div>{cell}</div>" for cell in cells)
    note = f"<p class='note'>right answer at rank {wrong_before + 1}</p>"
    return f'<div class="row"><div class="query">{asked}{note}</div><div class="answers">{body}</div></div>'


def mark(text: str, right: bool) -> str:
    return f'<span class="right">{text}</span>' if right else f"<span>{text}</span>"


def thumbnail(split: Dataset, sample: int, side: int = 96) -> str:
    """A picture of the split as an <img>."""
    with Image.open(io.BytesIO(split.image_bytes(sample))) as file:
        small = file.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    return picture(torch.from_numpy(np.array(small)).permute(2, 0, 1), split.captions(sample)[0])

"""`mvlm reconstruct` and `mvlm fill`: masked images and captions, filled in by a trained model."""

from pathlib import Path

# Commands import what they need when they run, so that --help and errors are immediate.


def reconstruct(
    *, checkpoint: Path, image: Path, caption: str, out: Path, wrong_caption: str | None = None, seed: int = 0
) -> None:
    """Mask an image and rebuild it from its visible patches and a caption.

    Args:
        checkpoint: Run folder, one of its checkpoints, or exported folder.
        image: Image file of any size.
        caption: Caption of the image.
        out: PNG to write: the image, masked, rebuilt with the caption and, if given, with the wrong one.
        wrong_caption: Caption of another image, to see the caption's contribution.
        seed: Seed of the mask.
    """
    import torch
    from PIL import Image

    from mvlm.errors import ConfigError
    from mvlm.inference.images import hide_patches, load_image
    from mvlm.inference.reconstruction import reconstruct as rebuild
    from mvlm.runs.load import load_model
    from mvlm_dataloading import draw_patch_masks

    if out.suffix.lower() != ".png" or out.is_dir():
        raise ConfigError(f"out: wanted a .png file to write, got {out}")
    if out.exists() and out.samefile(image):
        raise ConfigError(f"out: wanted another file than the image itself, got {out} for both")
    model, tokenizer = load_model(checkpoint)
    config = model.config
    pixels = load_image(image, config.image_size)[None]
    ids = draw_patch_masks(
        seed, 0, [0], image_size=config.image_size, patch_size=config.patch_size, mask_block=config.mask_block,
        ratio=config.image_mask_ratio,
    )  # fmt: skip
    ids = torch.from_numpy(ids)
    panels = [pixels, hide_patches(pixels, ids, config.patch_size)]
    panels += [rebuild(model, tokenizer, pixels, [text], ids) for text in (caption, wrong_caption) if text is not None]
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(torch.cat([p[0] for p in panels], dim=2).permute(1, 2, 0).numpy()).save(out)
    print(f"{out}: image, masked, rebuilt{' and rebuilt with the wrong caption' if wrong_caption else ''}")


def fill(*, checkpoint: Path, image: Path, caption: str, top: int = 5) -> None:
    """Guess the [MASK] tokens of a caption, given its image.

    Args:
        checkpoint: Run folder, one of its checkpoints, or exported folder.
        image: Image file of any size.
        caption: Caption with [MASK] for every token to guess, for example "flag of [MASK]".
        top: Guesses to print for each [MASK].
    """
    from mvlm.errors import ConfigError
    from mvlm.inference.fill_mask import fill_mask, tokens_with_masks
    from mvlm.inference.images import load_image
    from mvlm.runs.load import load_model

    model, tokenizer = load_model(checkpoint)
    if not 1 <= top <= tokenizer.vocab_size:
        raise ConfigError(f"top: wanted 1 to {tokenizer.vocab_size}, got {top}")
    tokens = tokens_with_masks(caption, tokenizer, model.config.text_length)
    ids = (tokens == tokenizer.mask_id).nonzero()[:, 0]
    if not len(ids):
        raise ConfigError(f'caption: wanted at least one [MASK], got {caption!r}; write it as in "flag of [MASK]"')
    pixels = load_image(image, model.config.image_size)[None]
    guesses, probabilities = fill_mask(model, tokenizer, pixels, tokens, [len(tokens)], ids, top)
    for number, (row, probability) in enumerate(zip(guesses.tolist(), probabilities.tolist(), strict=True), 1):
        shown = "  ".join(f"{tokenizer.decode([g])} {100 * p:.0f}%" for g, p in zip(row, probability, strict=True))
        print(f"[MASK] {number}: {shown}")

"""The figures of an evaluation as a table of text."""

from typing import Any


def format_table(figures: dict[str, Any]) -> str:
    """Recall, cross-modal gain and masked losses, as `mvlm eval retrieval` prints them."""
    parts = [(f"all {figures['n_images']} images, {figures['n_texts']} captions", figures)]
    if figures["unseen"]:
        parts.append((f"{figures['unseen']['n_images']} images of unseen concepts", figures["unseen"]))
    lines = [f"{'':<38}  image to text          text to image", f"{'':<38}" + "    R@1    R@5   R@10 " * 2]
    for name, part in parts:
        ways = [("re-ranked by ITC + ITM", part), ("by ITM alone", part["itm"]), ("ITC alone", part["itc"])]
        for how, found in ways if part["itm"] else ways[2:]:  # without ITM all ranks are ITC's
            cells = "".join(
                "".join(f"{found[direction][r]:7.1f}" for r in ("r1", "r5", "r10")) for direction in ("tr", "ir")
            )
            lines.append(
                f"{name + ', ' + how:<38}{cells}" if len(name + how) < 36 else f"{name}, {how}\n{'':<38}{cells}"
            )
    lines += [_describe_intervals(name, part) for name, part in parts]
    text, pixels = figures["gain_text_nats_95"], figures["gain_pixels_pct_95"]
    lines += [
        f"cross-modal gain, text     {figures['gain_text_nats']:.2f} nats per token "
        f"(95 %: {text[0]:.2f} to {text[1]:.2f})",
        f"cross-modal gain, pixels   {figures['gain_pixels_pct']:.2f} % (95 %: {pixels[0]:.2f} to {pixels[1]:.2f})",
        f"masked L1                  {figures['masked_l1']:.4f}; {describe_trivial_losses(figures)}",
        f"masked tokens              {figures['masked_nats']:.3f} nats per token",
    ]
    return "\n".join(lines)


def _describe_intervals(name: str, part: dict[str, Any]) -> str:
    """95 % intervals of the R@1 of one group of images, in words."""
    ends = {way: "{:.1f} to {:.1f}".format(*part[f"{way}_95"]["r1"]) for way in ("tr", "ir")}
    return f"R@1 of {name}, 95 %: {ends['tr']} image to text, {ends['ir']} text to image"


def describe_trivial_losses(figures: dict[str, Any]) -> str:
    """Masked L1 of the image-blind predictors, in words; the median is missing where the data have no train split."""
    median = figures["masked_l1_train_median"]
    white = f"constant white {figures['masked_l1_white']:.4f}"
    return white if median is None else f"{white}, training median {median:.4f}"

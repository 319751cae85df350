"""Precision and recall of the facts that captions state about composed scenes, whatever their words.

`mvlm_dataloading.scenes.facts` reads facts (objects, colours, numbers, sides) from a caption, and checks them.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeGuard

from mvlm_dataloading.scenes.facts import is_true, scene_facts, stated_facts

KINDS = ("object", "colour", "count", "relation")


def is_scene(value: Any) -> TypeGuard[dict[str, Any]]:
    """True for a composed scene; another data set may have a field of this name, such as scene: "kitchen"."""
    return isinstance(value, dict) and isinstance(value.get("objects"), list) and isinstance(value.get("size"), list)


def fact_figures(captions: Mapping[str, str], scenes: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Shares of facts over all captions, in per cent.

    Args:
        captions: a caption for each image id of `scenes`.
        scenes: {size: [width, height], objects: [{name, colour, box}]} of each image id, in pixels.

    Returns:
        fact_precision, the share of stated facts that are true; fact_recall, the share of the scenes' objects, colours
        and numbers that are stated; fact_f1, their harmonic mean; and the precision of each kind of fact that was
        stated. A repeated fact counts once. Captions that state no fact have a precision of 0.
    """
    stated, true = Counter[str](), Counter[str]()
    wanted = recalled = 0
    for image, scene in scenes.items():
        facts, complete = stated_facts(captions[image]), scene_facts(scene["objects"])
        stated.update(str(fact[0]) for fact in facts)
        true.update(str(fact[0]) for fact in facts if is_true(fact, scene))
        wanted += len(complete)
        recalled += len(complete & facts)
    precision = true.total() / stated.total() if stated else 0.0
    recall = recalled / wanted if wanted else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    figures = {"fact_precision": 100 * precision, "fact_recall": 100 * recall, "fact_f1": 100 * f1}
    return figures | {f"{kind}_precision": 100 * true[kind] / stated[kind] for kind in KINDS if stated[kind]}

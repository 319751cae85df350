"""Kinds of objects in scenes, their names in English, and the kinds that the texts of a split may ask about.

Nouns are names of emoji in the train split of the emoji data set, so a model that was pretrained on it has seen them.
Colours are never painted: Unicode has the same shape in several named colours.

Each of three things is kept for one split, which measures it:

- a fifth of the nouns, and the books among the shapes (split `concept`);
- three colours of each other shape; every colour and every shape stays in training (split `combo`);
- one side of each noun: where "the dog is left of ..." is held out, no text of the other splits says it (`combo`).
"""

import hashlib
import re
from dataclasses import dataclass

_LIST = """
    accordion, airplane, ambulance, anchor, ant, avocado, axe, backpack, badger, bagel, balloon, banjo, basket, bat,
    bathtub, bear, beaver, bed, bell pepper, bicycle, bison, bone, boomerang, broom, bucket, bus, butterfly, cactus,
    camel, camera, candle, canoe, carrot, castle, cat, chestnut, chicken, church, coconut, compass, cookie, cow,
    crab, crayon, crocodile, croissant, crown, cucumber, dog, dolphin, donkey, door, doughnut, dragon, duck, eagle,
    eggplant, elephant, envelope, evergreen tree, feather, ferris wheel, flashlight, flute, fly, fountain, fox,
    frog, gear, ghost, giraffe, goose, gorilla, hamburger, hammer, hedgehog, helicopter, hibiscus, hippopotamus,
    honeybee, horse, house, ice skate, jellyfish, kangaroo, kimono, koala, laptop, lemon, light bulb, lion,
    lipstick, lizard, llama, lollipop, magnet, mango, microscope, mosquito, mushroom, necktie, octopus, onion,
    orangutan, owl, paintbrush, palm tree, parachute, peach, pear, pen, pencil, penguin, pig, pineapple, pizza,
    plunger, potato, pretzel, purse, rabbit, raccoon, rat, razor, rhinoceros, rocket, roller skate, rooster, rose,
    sailboat, sandwich, saxophone, scarf, scorpion, scroll, seedling, skateboard, skunk, sled, snake, snowflake,
    snowman, soccer ball, spider, spoon, squid, star, strawberry, swan, syringe, t-shirt, taxi, teapot, teddy bear,
    telescope, television, tent, toilet, tomato, toolbox, tooth, top hat, tractor, tram, trombone, trophy, tulip,
    turkey, unicorn, violin, volcano, waffle, watch, watermelon, whale, window, wolf, zebra
"""
NOUNS = tuple(" ".join(noun.split()) for noun in _LIST.split(","))
HELD_COLOURS = {
    "circle": ("green", "purple", "white"),
    "square": ("blue", "brown", "red"),
    "heart": ("black", "orange", "yellow"),
}
"""Colours of each shape that only split `combo` asks about."""
SHAPES = {
    "circle": ("black", "blue", "brown", "green", "orange", "purple", "red", "white", "yellow"),
    "square": ("black", "blue", "brown", "green", "orange", "purple", "red", "white", "yellow"),
    "heart": ("black", "blue", "brown", "green", "orange", "pink", "purple", "red", "white", "yellow"),
    "book": ("blue", "green", "orange", "red"),
}
"""Shapes -> the colours in which Unicode has an emoji of the shape."""
COLOURS = tuple(sorted({colour for colours in SHAPES.values() for colour in colours}))
SIDES = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
NUMBERS = ("no", "one", "two", "three", "four", "five")
_PLURALS = {
    "bison": "bison", "goose": "geese", "snowman": "snowmen", "squid": "squid", "tooth": "teeth", "wolf": "wolves",
    "scarf": "scarves", "mosquito": "mosquitoes", "tomato": "tomatoes", "potato": "potatoes", "mango": "mangoes",
}  # fmt: skip


@dataclass(frozen=True, slots=True, order=True)
class Kind:
    """A noun, or a shape in one of its colours."""

    name: str
    colour: str | None = None

    @property
    def text(self) -> str:
        return self.name if self.colour is None else f"{self.colour} {self.name}"


TINTS = tuple(Kind(shape, colour) for shape, colours in SHAPES.items() for colour in colours)
"""All shapes in all their colours."""


def plural(text: str) -> str:
    """Plural of a kind's or a shape's text: red hearts, geese, evergreen trees."""
    *before, noun = text.split()
    if noun not in _PLURALS:
        ending = "es" if re.search(r"(s|x|z|ch|sh)$", noun) else "s"
        noun = f"{noun[:-1]}ies" if re.search(r"[^aeiou]y$", noun) else noun + ending
    return " ".join([*before, _PLURALS.get(noun, noun)])


def with_article(text: str) -> str:
    """A text with its indefinite article: a dog, an orange heart."""
    return f"an {text}" if text[0] in "aeiou" and not text.startswith("unicorn") else f"a {text}"


def is_unseen(noun: str) -> bool:
    """True for nouns of split `concept`, a fifth of them."""
    return _hash("held", noun) % 5 == 0


def held_side(noun: str) -> str:
    """Side of other objects (left, right, above or below) on which only texts of split `combo` place this noun."""
    return tuple(SIDES)[_hash("side", noun) % 4]


def _hash(purpose: str, noun: str) -> int:
    return int(hashlib.sha1(f"{purpose} {noun}".encode()).hexdigest(), 16)


SPLITS = ("train", "validation", "test", "combo", "concept", "artist")
"""Names of the splits that each task's data set has."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Kinds of objects that the scenes of a split may have and its texts may ask about."""

    nouns: tuple[Kind, ...]
    """Nouns that texts ask about."""
    tints: tuple[Kind, ...]
    """Shapes with their colours that texts ask about."""
    subjects: tuple[Kind, ...]
    """Nouns that stand on a side of another: "the SUBJECT is left of the anchor"."""
    anchors: tuple[Kind, ...]
    """Nouns beside which others stand: "the subject is left of the ANCHOR"."""
    fill: tuple[Kind, ...]
    """Kinds that may be in any scene of the split, whether its texts ask about them or not."""
    held_sides: bool = False
    """True if subjects stand on their held-out side, False if they never do."""

    @property
    def asked(self) -> tuple[Kind, ...]:
        return self.nouns + self.tints

    @property
    def all_tints(self) -> tuple[Kind, ...]:
        """Shapes with colours that may be in a scene."""
        return tuple(dict.fromkeys((*self.tints, *(kind for kind in self.fill if kind.colour))))

    def stands(self, subject: str, side: str) -> bool:
        """True if a text of the split may say that a `subject` is on this side of something."""
        return (held_side(subject) == side) == self.held_sides

    def sides(self, subject: Kind) -> list[str]:
        return [side for side in SIDES if self.stands(subject.name, side)]


def vocabulary(split: str) -> Vocabulary:
    """Kinds of objects that the scenes and texts of a split have."""
    seen = tuple(Kind(noun) for noun in NOUNS if not is_unseen(noun))
    unseen = tuple(Kind(noun) for noun in NOUNS if is_unseen(noun))
    books = tuple(tint for tint in TINTS if tint.name == "book")
    held = tuple(tint for tint in TINTS if tint.colour in HELD_COLOURS.get(tint.name, ()))
    plain = tuple(tint for tint in TINTS if tint not in books and tint not in held)
    if split == "combo":
        return Vocabulary((), held, seen, seen, seen + plain, held_sides=True)
    if split == "concept":
        return Vocabulary(unseen, books, seen, unseen, seen + plain)
    return Vocabulary(seen, plain, seen, seen, seen + plain)

import random

import pytest

from mvlm_dataloading.dataset.dali_index import IMAGE_EXTENSIONS, parse_index


def by_words(text: str) -> list[dict]:
    """A line-by-line parser of the documented format."""
    found = []
    for line in text.splitlines()[1:]:
        words, row = line.split(" "), {}
        for extension, offset, size, name in zip(*[iter(words)] * 4, strict=True):
            kind = (
                "image"
                if extension.lower() in IMAGE_EXTENSIONS
                else {"txt": "text", "json": "meta", "tok": "tokens"}.get(extension.lower())
            )
            if kind:
                row[kind] = (int(offset), int(size), name)
        row["key"] = words[3][: -len(words[0]) - 1]
        found.append(row)
    return found


def make(rows: int) -> str:
    rng = random.Random(0)
    lines = []
    for i in range(rows):
        kinds = [
            rng.choice(["jpg", "PNG", "jpeg", "WebP"]),
            "txt",
            *rng.sample(["json", "tok", "cls", "a.very.long.one"], rng.randint(0, 3)),
        ]
        rng.shuffle(kinds)
        key = rng.choice(["", "folder/"]) + f"{i}" + rng.choice(["", "_ö", "-猫"])
        lines.append(
            " ".join(f"{k} {rng.randrange(10 ** rng.randint(1, 13))} {rng.randrange(10**6)} {key}.{k}" for k in kinds)
        )
    return "\n".join([f"v1.2 {rows}", *lines]) + "\n"


@pytest.mark.parametrize("rows", [0, 1, 2, 300])
def test_index_columns_match_the_lines(rows):
    text = make(rows)
    index = parse_index(text.encode())
    wanted = by_words(text)
    assert len(index) == rows
    for i, row in enumerate(wanted):
        assert index.key(i) == row["key"]
        for kind, part in index.components.items():
            if kind in row:
                assert (part.offset[i], part.size[i]) == row[kind][:2]
            else:
                assert part.size[i] == -1
    without_end = parse_index(text.encode().rstrip(b"\n")) if rows else index
    assert (without_end.keys, without_end.key_end.tolist()) == (index.keys, index.key_end.tolist())


@pytest.mark.parametrize(
    "line, message",
    [
        ("jpg 1 2 a.jpg txt", "5 words in a line"),
        ("jpg  1 2 a.jpg", "an empty word"),
        ("jpg 1 2 a.jpg ", "an empty word"),
        ("jpg -1 2 a.jpg", "'-1' for a number"),
        ("jpg 1 0x2 a.jpg", "'0x2' for a number"),
        ("jpg 1 12345678901234567890 a.jpg", "a number of 20 digits"),
    ],
)
def test_malformed_index_lines_are_refused(line, message):
    with pytest.raises(ValueError, match=message):
        parse_index(f"v1.2 2\njpg 1 2 b.jpg\n{line}\n".encode())

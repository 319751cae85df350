"""Pieces of drawings that are rendered as they are read."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from mvlm_dataloading.sources.record import Piece, Record

PIECE_DRAWINGS = 256


@dataclass(frozen=True, slots=True)
class RenderedPiece:
    """A piece whose records hold drawings. Reading renders them."""

    split: str
    listed: Sequence[Record]
    size: int
    """Side of the square images in pixels."""
    render: Callable[[bytes, int], bytes]
    """Renders a drawing at a size as a PNG. ValueError or OSError for one that is blank or cannot be read."""

    @property
    def label(self) -> str:
        return f"{self.split} {len(self.listed)} from {self.listed[0].key} to {self.listed[-1].key}"

    def records(self, max_bytes: int) -> Iterator[Record]:
        for record in self.listed:
            assert isinstance(record.image, bytes)
            try:
                yield replace(record, image=self.render(record.image, self.size))
            except (ValueError, OSError):
                yield replace(record, image=None, fault="drawing is blank or cannot be rendered")


def rendered_pieces(
    records: dict[str, list[Record]], size: int, render: Callable[[bytes, int], bytes], number: int = PIECE_DRAWINGS
) -> list[Piece]:
    """Pieces of `number` drawings, from the drawings of each split."""
    return [
        RenderedPiece(split, listed[begin : begin + number], size, render)
        for split, listed in records.items()
        for begin in range(0, len(listed), number)
    ]

"""The images that the page of a micro model searches."""

import asyncio
from collections.abc import Iterator

import pytest

from mvlm.app.gallery import DatasetGallery


@pytest.fixture(scope="session")
def gallery(model, heldout_split) -> DatasetGallery:
    return DatasetGallery(model, heldout_split, "scenes")


@pytest.fixture(scope="module", autouse=True)
def no_forgotten_event_loops() -> Iterator[None]:
    """Close the event loops that gradio makes for its locks and forgets.

    Else a later test collects them, and their warning is that test's error.
    """
    made: list[asyncio.AbstractEventLoop] = []
    make = asyncio.new_event_loop

    def new_event_loop() -> asyncio.AbstractEventLoop:
        made.append(make())
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "new_event_loop", new_event_loop)
        yield
    asyncio.set_event_loop(None)
    for loop in made:
        if not loop.is_running():
            loop.close()

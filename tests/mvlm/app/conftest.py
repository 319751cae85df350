"""The images that the page of a micro model searches."""

import asyncio
import copy
from collections.abc import Callable, Iterator

import pytest
import torch

from mvlm.app.gallery import DatasetGallery
from mvlm.config.finetune import TaskOptions
from mvlm.inference.trained_model import TrainedModel
from mvlm.tasks.load import find_task


@pytest.fixture(scope="session")
def gallery(model, heldout_split) -> DatasetGallery:
    return DatasetGallery(model, heldout_split, "scenes")


@pytest.fixture(scope="session")
def answering(model) -> Callable[[str], TrainedModel]:
    """Function that gives a copy of the micro model the head of a task, all with random weights."""

    def make(name: str) -> TrainedModel:
        network, kind = copy.deepcopy(model.network), find_task(name)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            task = kind(network, TaskOptions(), {} if name == "retrieval" else kind.example(1)[0])
            for parameter in task.parameters():
                parameter += 0.1 * torch.randn(parameter.shape)
        task.set_tokenizer(model.tokenizer)
        return TrainedModel(network, model.tokenizer, "fp32", task=task.eval())

    return make


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

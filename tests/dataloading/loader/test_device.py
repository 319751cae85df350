"""Who owns an image on a GPU until the device has read it, also by a simulated device that waits for a sync."""

from contextlib import contextmanager
from itertools import islice
from types import SimpleNamespace
from typing import Any, cast
from weakref import finalize

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mvlm_dataloading import Loader
from mvlm_dataloading.loader import batches, device, segment
from mvlm_dataloading.loader.batches import Batches
from mvlm_dataloading.loader.segment import DecodedSegment, RawBatch
from support.loaders import make_loader

PIXELS = torch.arange(4 * 3 * 2 * 2, dtype=torch.uint8).view(4, 3, 2, 2)


class HeldBack(TorchDispatchMode):
    """A device that copies nothing before `catch_up`."""

    def __init__(self) -> None:
        super().__init__()
        self.queued: list[Any] = []
        self.runs = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.runs or func not in (torch.ops.aten.clone.default, torch.ops.aten.index_select.default):
            return func(*args, **(kwargs or {}))
        shape = func(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in args)).shape
        out = torch.zeros(shape, dtype=args[0].dtype)
        # The device knows addresses. The host may have dropped the tensors by the time it reads them.
        sources = [x.numpy() if isinstance(x, torch.Tensor) else x for x in args]
        self.queued.append(lambda: out.copy_(func(*map(_tensor, sources))))
        return out

    def catch_up(self) -> None:
        """Run what is queued."""
        self.runs = True
        for one in self.queued:
            one()
        self.queued.clear()
        self.runs = False


def _tensor(x: Any) -> Any:
    return torch.from_numpy(x) if isinstance(x, np.ndarray) else x


@pytest.fixture
def held_back(monkeypatch) -> HeldBack:
    """The device of the loader's thread, which ends its work at the end of a `working` block."""
    held = HeldBack()

    @contextmanager
    def working(_: torch.device):
        yield
        held.catch_up()

    for module in (device, segment, batches):
        monkeypatch.setattr(module, "working", working)
    return held


class Output:
    """An output of DALI, which overwrites its memory when nobody refers to the output any more."""

    def __init__(self, images: torch.Tensor) -> None:
        self.memory = images.clone()
        finalize(self, np.ndarray.fill, self.memory.numpy(), 255)

    def as_tensor(self) -> torch.Tensor:
        return self.memory


def test_an_image_is_copied_before_dali_may_overwrite_it(held_back, monkeypatch):
    valid = SimpleNamespace(as_tensor=lambda: np.ones(4))
    pipeline = SimpleNamespace(run=lambda: (Output(PIXELS), None, None, None, None, valid, None, None))
    monkeypatch.setattr(segment, "build_pipeline", lambda *_, **__: pipeline)
    monkeypatch.setattr(segment, "_delivered", lambda *_: [[], [], []])
    config: Any = SimpleNamespace(
        device_id=0, images=None, train=False, augment=None, geometry=SimpleNamespace(strip=1), seed=0, num_threads=1,
        decoding=None, stored_tokens=False,
    )  # fmt: skip
    ids, dataset = np.arange(3), cast(Any, None)
    read = DecodedSegment(dataset, ids, ids, config, 4, cast(Any, None), file_ends=None, prefetch=1)
    with held_back:
        found, _ = read.next()
    assert torch.equal(found.images, PIXELS[:3])


def test_distinct_images_are_chosen_before_their_batch_is_dropped(held_back):
    config: Any = SimpleNamespace(device_id=None, images=np.array([0, 0, 2, 2]))
    captions: Any = SimpleNamespace(
        tokens=np.arange(8), lengths=np.full(4, 2), text_id=[0, 1, 2, 3], image_id=[0, 0, 2, 2]
    )
    masks: Any = lambda *_: {"patch_ids": np.zeros((2, 1), np.int64), "token_ids": np.zeros(1, np.int64)}  # noqa: E731
    made = Batches(cast(Any, SimpleNamespace(config=config)), cast(Any, None), masks)
    raw = RawBatch(np.arange(4), np.zeros(4, np.int64), PIXELS.clone(), [], [], [], cast(Any, None))
    with held_back:
        batch, _ = made._each_image_once(raw, captions)
    assert torch.equal(batch.images, PIXELS[[0, 2]])


@pytest.mark.gpu
@pytest.mark.parametrize("per_image", [None, 1])
def test_batches_are_right_for_a_stream_that_is_held_back(waves_train, waves_tokenizer, per_image):
    """The host drops each batch before the device has read it, and the loader goes on."""

    def loader() -> Loader:
        return make_loader(waves_train, waves_tokenizer, device="cuda", per_image=per_image)

    wanted = []
    for batch, _ in islice(loader(), 20):
        wanted.append(batch.images.clone())
        torch.cuda.synchronize()
    found = []
    for batch, _ in islice(loader(), 20):
        torch.cuda._sleep(100_000_000)
        found.append(batch.images.clone())
        del batch
    torch.cuda.synchronize()
    assert all(map(torch.equal, found, wanted))

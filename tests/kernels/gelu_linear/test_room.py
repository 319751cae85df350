"""Room for saved GELUs on a GPU."""

import threading

import torch

from mvlm_kernels.gelu_linear import room
from mvlm_kernels.gelu_linear.room import Held, Room, saving_none


def test_gelus_are_saved_in_what_a_whole_step_and_its_optimizer_leave_free():
    free = [1000]
    found = Room(lambda: free[0])
    assert found.take(1) is None  # the first step
    found.note_update()
    found.note_update()  # a second optimizer
    free[0] = 100  # its state
    assert found.take(1) is None
    assert found.take(1) is None  # another microbatch
    found.note_update()
    first, second, third = (found.take(30) for _ in range(3))
    assert (first is None, second is None, third is None) == (False, False, True)  # 80 of 100
    assert first is not None
    first.release()
    del second  # its graph was dropped without a backward pass
    free[0] = 1
    found.note_update()
    assert found.take(30) is not None  # measured once, for all steps


def test_what_the_allocator_has_given_back_is_not_free(monkeypatch):
    """Of 100 bytes 40 are free now, but 25 of those were taken at the peak."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (40, 100))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 70)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 45)
    room._room.cache_clear()
    found = room._room(0)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], 0.1)
    taken: list[Held | None] = []
    for _ in range(3):
        taken.append(found.take(12))
        weight.grad = torch.ones(1)
        optimizer.step()
    room._room.cache_clear()
    assert [held is None for held in taken] == [True, True, False]
    assert found.take(1) is None


def test_inside_a_block_none_is_saved():
    gelu = torch.ones(2)
    assert room.save(gelu)[0]
    with saving_none():
        assert not room.save(gelu)[0]
    assert room.save(gelu)[0]


def test_a_saved_gelu_may_be_collected_while_room_is_asked_for():
    """Python may collect a graph at any moment, also of the thread that asks."""
    found = Room(lambda: (found.give_back(0), 30)[1])
    for _ in range(2):
        found.note_update()
        found.take(8)
    asking = threading.Thread(target=found.take, args=(8,), daemon=True)
    asking.start()
    asking.join(10)
    assert not asking.is_alive()

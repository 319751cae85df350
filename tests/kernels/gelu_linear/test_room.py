"""Room for saved GELUs on a GPU."""

import threading

from mvlm_kernels.gelu_linear.room import Room


def test_gelus_are_saved_on_a_gpu_as_far_as_earlier_steps_left_room():
    peak = [70]
    room = Room(lambda: (peak[0], 100))
    assert room.take(5) is None  # nothing is known in the first step
    room.give_back(0)
    first, second, third = (room.take(8) for _ in range(3))
    assert first is not None
    assert second is not None
    assert third is None  # 20 of 90 are left
    first.release()
    del second  # its graph was dropped without a backward pass
    peak[0] += 16  # the two that were saved
    assert room.take(20) is not None
    peak[0] += 40  # a longer step
    assert room.take(1) is None


def test_a_saved_gelu_may_be_collected_while_room_is_asked_for():
    """Python may collect a graph at any moment, also of the thread that asks."""
    room = Room(lambda: (room.give_back(0), (70, 100))[1])
    room.give_back(0)
    asking = threading.Thread(target=room.take, args=(8,), daemon=True)
    asking.start()
    asking.join(10)
    assert not asking.is_alive()

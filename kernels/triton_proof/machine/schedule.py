"""Control flow: which basic block runs next, and for which threads.

Every thread has a program counter, the number of a basic block. At each turn the block with the lowest number among all
threads that can run is executed for the threads that stand there. The others are masked. Compilers lay blocks out so
that threads which part meet again at a higher number. So a warp is whole again where the source says so; where it is
not, an instruction that takes the whole warp reports it. A barrier ends a block: a thread waits there until all threads
of its CTA have come.
"""

from typing import Any

import numpy as np

_END = 1 << 30  # program counter of a thread that has returned
_MOST_TURNS = 50_000_000


def execute(machine: Any) -> None:
    """Run the program of the machine for its CTAs, from the first block to the end of all threads."""
    _Schedule(machine).run()


class _Schedule:
    """Program counters of all threads.

    here: the block of all threads; None where they differ, and then ``pc`` says it. wait: 0, or 1 + the barrier that a
    thread waits at. wanted: threads that each barrier waits for; None means all that are still running.
    """

    def __init__(self, machine: Any) -> None:
        self.m = machine
        self.here: int | None = 0
        self.pc = np.zeros((1, 1), np.int64)
        self.wait = np.zeros((1, 1), np.int64)
        self.wanted: dict[int, int | None] = {}
        self.last_barrier: Any = None

    def run(self) -> None:
        blocks = self.m.program.blocks
        for _ in range(_MOST_TURNS):
            turn = self._next_turn()
            if turn is None:
                return
            number, mask = turn
            code = blocks[number]
            self.m.count_block(code.classes, mask)
            for step in code.steps:
                step(self.m, mask)
            self.m.fragments.clear()
            self._leave(number, code.end, mask)
        raise RuntimeError(f"{self.m.program.name} does not end: {_MOST_TURNS} blocks executed")

    def _next_turn(self) -> tuple[int, np.ndarray | None] | None:
        """Number of the next block and the threads that run it (None: all). None if all threads have returned."""
        if self.here is not None:
            return None if self.here >= _END else (self.here, None)
        standing = np.where(self.wait > 0, _END, self.pc)
        number = int(standing.min())
        while number >= _END:
            if not (self.wait > 0).any():
                return None
            self.m.find("barrier", self.last_barrier, "threads wait at a barrier that the others never reach", 1)
            self.pc = np.where(self.wait > 0, self.pc, _END)
            self.wait = np.zeros((1, 1), np.int64)
            standing = self.pc
            number = int(standing.min())
        mask = standing == number
        if mask.all():
            self.here = number
            return number, None
        return number, mask

    def _leave(self, number: int, end: Any, mask: np.ndarray | None) -> None:
        """Move the threads on from a block, by how it ends."""
        if end.kind == "barrier":
            self._arrive(number, end, mask)
            return
        target = {"next": number + 1, "jump": end.target}.get(end.kind, _END)
        if end.kind == "trap":
            self.m.find("trap", end.instruction, "trap reached", 1)
        taken = None if end.predicate is None else end.predicate(self.m)
        if mask is None and (taken is None or taken.all()):
            self.here = target
            return
        if mask is None and taken is not None and not taken.any():
            self.here = number + 1
            return
        moved = target if taken is None else np.where(taken, target, number + 1)
        self.pc = np.asarray(moved) if mask is None else np.where(mask, moved, self.pc)
        if target == _END:
            self._release()
        self._meet()

    def _arrive(self, number: int, end: Any, mask: np.ndarray | None) -> None:
        self.last_barrier = end.instruction
        if mask is None:
            self.m.barrier(None)
            self.here = number + 1
            return
        self.m.whole_warps(end.instruction, mask)
        self.wanted[end.barrier] = end.threads
        self.wait = np.where(mask, end.barrier + 1, self.wait)
        self.pc = np.where(mask, number + 1, self.pc)
        self._release()
        self._meet()

    def _meet(self) -> None:
        together = not (self.wait > 0).any() and (self.pc == self.pc.flat[0]).all()
        self.here = int(self.pc.flat[0]) if together else None

    def _release(self) -> None:
        """Let go the CTAs whose threads have all come to the barrier that they wait at."""
        for ident in [int(x) for x in np.unique(self.wait) if x > 0]:
            pc, wait = self.m.full(self.pc), self.m.full(self.wait)
            waiting = wait == ident
            arrived, wanted = waiting.sum(1), self.wanted.get(ident - 1)
            if wanted is None:
                wanted = self.m.threads - ((pc >= _END) & (wait == 0)).sum(1)
            free = (arrived > 0) & (arrived >= wanted)
            if not free.any():
                continue
            low, high = np.where(waiting, pc, _END).min(1), np.where(waiting, pc, -1).max(1)
            if ((low != high) & free).any():
                self.m.find("barrier", self.last_barrier, "threads of one CTA wait at different barriers", 1)
            self.m.barrier(free)
            self.wait = np.where(free[:, None] & waiting, 0, wait)

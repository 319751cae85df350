"""The machine: runs a program for all threads of many thread blocks (CTAs) in lockstep.

Values are arrays of shape (CTAs or 1, threads or 1). A mask is a bool array of such a shape, or None where all threads
are active. Times are steps: a step is one executed memory instruction.
"""

import time
from typing import Any

import numpy as np

from triton_proof.machine.copies import Copies
from triton_proof.machine.global_memory import GlobalMemory
from triton_proof.machine.layout import PATTERN
from triton_proof.machine.products import Products
from triton_proof.machine.schedule import execute
from triton_proof.machine.shared_memory import SharedMemory
from triton_proof.ptx.syntax import Instruction
from triton_proof.report import Finding, Launch

Mask = np.ndarray | None
Lanes = tuple[np.ndarray | None, tuple[int, int]]  # flat positions of active lanes (None: all) within a shape

# A register that nobody wrote: a NaN in every float type.
_UNDEFINED = {
    1: np.zeros((1, 1), bool), 8: np.full((1, 1), PATTERN, np.uint8), 16: np.full((1, 1), 0x7FFB, np.uint16),
    32: np.full((1, 1), 0x7FFBFBFB, np.uint32), 64: np.full((1, 1), 0x7FFBFBFBFBFBFBFB, np.uint64),
}  # fmt: skip


class Machine:
    """One launch of one program.

    checks: look for uninitialised reads and races; accesses out of bounds are always found. counting: count sectors and
    bank passes. lockstep: most threads that run together; at least one CTA does.
    """

    def __init__(
        self, program: Any, arch: str, warps: int, shared: int, checks: bool = True, counting: bool = True,
        lockstep: int = 4096,
    ) -> None:  # fmt: skip
        self.program, self.arch = program, arch
        self.warps, self.threads = warps, 32 * warps
        self.groups = max(1, warps // 4)  # warpgroups
        self.shared_size = max(shared, program.static_shared)
        self.checks, self.counting, self.lockstep = checks, counting, lockstep
        self.memory = GlobalMemory(self)
        self.atomic = False  # True while an atomic instruction accesses memory: races are not looked for
        for name, at, size, _ in program.globals:
            self.memory.add(at, at + size, name, 1)

    def run(self, grid: tuple[int, int, int], params: bytes) -> Launch:
        """Run all CTAs of a grid. ``params`` is the parameter memory. Returns counters and findings."""
        started = time.perf_counter()
        self.launch = Launch(self.program.name, self.arch, grid, self.threads, self.shared_size)
        self._found: dict[tuple, Finding] = {}
        self.params = np.frombuffer(params.ljust(self.program.param_bytes + 16, b"\0"), np.uint8)
        self.nctaid = tuple(np.array([[n]], np.uint32) for n in grid)
        self.tid = np.arange(self.threads, dtype=np.uint32)[None, :]
        self.ntid = np.array([[self.threads]], np.uint32)
        self.zero, self.one = np.zeros((1, 1), np.uint32), np.ones((1, 1), np.uint32)
        total = grid[0] * grid[1] * grid[2]
        together = max(1, min(self.lockstep // self.threads, (64 << 20) // max(1, self.shared_size)))
        with np.errstate(all="ignore"):
            for first in range(0, total, together):
                self._run_ctas(first, min(together, total - first), grid)
        self.launch.seconds = time.perf_counter() - started
        self.launch.findings = list(self._found.values())
        return self.launch

    def _run_ctas(self, first: int, count: int, grid: tuple[int, int, int]) -> None:
        self.ctas, self.first_cta = count, first
        linear = np.arange(first, first + count)[:, None]
        at = (linear % grid[0], linear // grid[0] % grid[1], linear // (grid[0] * grid[1]))
        self.ctaid = tuple((x if (x != x[0]).any() else x[:1]).astype(np.uint32) for x in at)
        self.registers: list[np.ndarray] = [_UNDEFINED[r.bits] for r in self.program.function.registers]
        self.shared = SharedMemory(self, count, self.shared_size, self.program.granule)
        width = -(-self.program.local_size // 16) * 16
        self.local = np.full((count * self.threads, width), PATTERN, np.uint8)
        self.fragments: dict[tuple, Any] = {}  # decoded matrix operands of the basic block that runs
        self.step = 1
        self.copies, self.products = Copies(self), Products(self)
        execute(self)

    # -- synchronisation

    def barrier(self, ctas: np.ndarray | None) -> None:
        """Note that all threads of ``ctas`` (bool, None for all) have met."""
        if self.checks:
            self.step += 1
            self.shared.last_barrier[slice(None) if ctas is None else ctas] = self.step

    def warp_barrier(self, mask: Mask) -> None:
        """Note that the threads of the active warps have met."""
        if self.checks:
            self.step += 1
            warps = self.active_warps(mask)
            met = np.ones(self.ctas * self.warps, bool) if warps is None else warps
            self.shared.last_warp_sync[met.reshape(self.ctas, self.warps)] = self.step

    def proxy_fence(self, mask: Mask) -> None:
        """Note that the active threads made their stores visible to asynchronous reads."""
        if self.checks:
            self.step += 1
            self.shared.last_fence[slice(None) if mask is None else self.full(mask)] = self.step

    # -- masks and shapes

    def full(self, x: np.ndarray) -> np.ndarray:
        """x (CTAs or 1, threads or 1) as (CTAs, threads)."""
        shape = (self.ctas, self.threads)
        return x if x.shape == shape else np.broadcast_to(x, shape)

    def by_warp(self, x: np.ndarray) -> np.ndarray:
        """x (CTAs or 1, threads or 1) as (warps of all CTAs, 32)."""
        return self.full(x).reshape(self.ctas * self.warps, 32)

    def active_warps(self, mask: Mask) -> np.ndarray | None:
        """Warps with an active thread, bool (warps of all CTAs,); None for all."""
        return None if mask is None else np.any(self.by_warp(mask), axis=1)

    def whole_warps(self, ins: Instruction, mask: Mask) -> None:
        """Report warps of which only a part executes an instruction that takes the whole warp."""
        if mask is None or mask.shape[1] == 1:
            return
        active = self.by_warp(mask)
        split = active.any(1) & ~active.all(1)
        if split.any():
            warp = int(np.flatnonzero(split)[0])
            self.find("warp", ins, f"not all threads of warp {warp} are here", int(split.sum()))

    def lanes(self, mask: Mask, shape: tuple[int, ...]) -> Lanes:
        """Active lanes within the smallest shape that holds ``shape`` and the mask."""
        if mask is None:
            return None, shape  # pyright: ignore[reportReturnType]
        shape = np.broadcast_shapes(shape, mask.shape)
        active = np.broadcast_to(mask, shape)
        return (None if active.all() else np.flatnonzero(active)), shape  # pyright: ignore[reportReturnType]

    def all_lanes(self, lanes: np.ndarray | None) -> np.ndarray:
        """Flat positions within (CTAs, threads), all of them for None."""
        return np.arange(self.ctas * self.threads) if lanes is None else lanes

    def cta_and_thread(self, lanes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """CTA within the batch, and thread within the CTA, of flat positions within (CTAs, threads)."""
        return lanes // self.threads, lanes % self.threads

    # -- reporting

    def find(self, kind: str, ins: Instruction | None, detail: str, count: int) -> None:
        """Add a finding, or ``count`` to one of the same kind at the same instruction."""
        key = (kind, id(ins), detail.split(":")[0][:40])
        if key in self._found:
            self._found[key].count += count
        else:
            text, where = ("", ()) if ins is None else (ins.text, ins.where)
            self._found[key] = Finding(kind, self.program.name, where, text, detail, count, self.launch)

    def count_block(self, classes: dict[str, int], mask: Mask) -> None:
        """Count the instructions of a basic block, by class, for the active warps."""
        warps = self.active_warps(mask)
        active = self.ctas * self.warps if warps is None else int(warps.sum())
        for name, n in classes.items():
            self.launch.instructions[name] += n * active

    def add_flops(self, of_a_warp: int, mask: Mask) -> None:
        warps = self.active_warps(mask)
        self.launch.flops += of_a_warp * (self.ctas * self.warps if warps is None else int(warps.sum()))

"""Asynchronous matrix products: what unfinished ``wgmma`` instructions read and write.

A product is computed when it is issued. Until it is waited for, its operands in shared memory count as being read, and
its accumulators as being written.
"""

from typing import Any

import numpy as np

from triton_proof.machine.shared_memory import MANY


class Products:
    """Operands of the products that are open, by commit group."""

    def __init__(self, machine: Any) -> None:
        self.m = machine
        self._open: list[np.ndarray] = []
        self._groups: list[list[np.ndarray]] = []
        self._open_results: set[int] = set()
        self._results: list[set[int]] = []  # registers that the products of each group write

    def note_operand(self, ins: Any, warpgroups: np.ndarray, granules: np.ndarray) -> None:
        """Check and note that ``warpgroups`` read these granules of their CTA's shared memory."""
        m, s = self.m, self.m.shared
        cta, group = warpgroups // m.groups, warpgroups % m.groups
        at = cta[:, None] * (s.stride // s.granule) + granules[None, :]

        def report(kind: str, bad: np.ndarray, detail: Any) -> None:
            if bad.any():
                k, j = np.argwhere(bad)[0]
                byte = f"wgmma reads byte {int(granules[j]) * s.granule} of shared memory"
                m.find(kind, ins, f"{byte}, {detail(k, j)}, in CTA {m.first_cta + int(cta[k])}", int(bad.sum()))

        report("uninitialised", ~s.written[at], lambda k, j: "which nobody wrote")
        report("async", s.arriving[at] > 0, lambda k, j: "which an unfinished cp.async writes")
        step, writer = s.write_step[at], s.write_thread[at]
        late = step > s.last_barrier[cta][:, None]

        def since_barrier(k: int, j: int) -> str:
            own = " (of the same warpgroup)" if writer[k, j] >> 7 == group[k] else ""
            return f"stored by thread {int(writer[k, j])} since the last barrier{own}"

        report("race", late, since_barrier)
        # The writer fences its own stores, or the reader fences what a barrier made visible to it.
        by_writer = s.last_fence[cta[:, None], writer]
        by_reader = s.last_fence[cta, group * 128][:, None]
        unfenced = (step >= 0) & (by_writer < step) & ((by_reader < step) | late)
        for kind, verb, hit in (
            ("proxy", "stored", unfenced & ~s.copied[at]),
            ("copy-proxy", "copied", unfenced & s.copied[at]),
        ):
            text = f"{verb} by thread %d with no fence.proxy.async in between"
            report(kind, hit, lambda k, j, text=text: text % int(writer[k, j]))
        s.being_read[at] += 1
        s.read_step[at], s.read_thread[at] = m.step, MANY
        self._open.append(at)

    def note_results(self, registers: set[int]) -> None:
        """Note that a product writes these registers."""
        self._open_results |= registers

    def check_registers(self, ins: Any, registers: set[int]) -> None:
        """Report an instruction that touches registers which an unfinished product writes."""
        if any(registers & results for results in (self._open_results, *self._results)):
            self.m.find("async", ins, "access to registers that an unfinished wgmma writes", 1)

    def commit(self) -> None:
        """Close the group of the products issued so far."""
        self._groups.append(self._open)
        self._results.append(self._open_results)
        self._open, self._open_results = [], set()

    def wait(self, keep: int) -> None:
        """Finish all groups but the ``keep`` latest."""
        s = self.m.shared
        while len(self._groups) > keep:
            self._results.pop(0)
            for at in self._groups.pop(0):
                s.being_read[at] -= 1
                self.m.step += 1
                s.read_step[at], s.read_thread[at] = self.m.step, MANY

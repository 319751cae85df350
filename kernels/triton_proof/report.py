"""Report of a launch: its findings (faults) and counters."""

from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

from triton_proof.ptx.syntax import Place

SECTOR = 32  # bytes of global memory that are moved together
SPACES = ("global load", "global store", "shared load", "shared store")


class EmulationError(RuntimeError):
    """A launch did something that a GPU would fault on, or whose result it would leave undefined."""

    def __init__(self, findings: "list[Finding]") -> None:
        super().__init__("\n".join(str(f) for f in findings))
        self.findings = findings


@dataclass
class Finding:
    """One fault at one instruction of a launch: its kind, the first thread that had it, and how often it was made.

    ``where``, ``text`` and ``launch`` are empty where a kernel was interpreted.
    """

    kind: str
    kernel: str
    where: Place
    text: str
    detail: str
    count: int = 1
    launch: "Launch | None" = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        first = f"{self.kind}: {self.kernel}: {self.detail}"
        if not self.text:  # an interpreted kernel has no instructions
            return first
        times = "" if self.count == 1 else f" ({self.count} times)"
        return f"{first}{times}\n    at {place_name(self.where)}: {self.text[:160]}"


REMEDIES = {
    "out-of-bounds": "mask the access (`mask=offsets < n`); then look at the grid, the strides and the last tile",
    "misaligned": "the pointer, a stride or an offset is no multiple of what the kernel was told to assume: look at "
    "`tl.multiple_of`, and at views that start in the middle of a tensor",
    "uninitialised": "store every element before it is read: allocate with `torch.zeros`, or let the grid cover them",
    "race": "put `tl.debug_barrier()` between accesses of different threads of a block",
    "reduction-bits": "no race, but bits that differ between lanes, and may between runs: a product was fused into the "
    "sum; launch the kernel with `enable_fp_fusion=False`",
    "global-race": "let one program own each element, or use `tl.atomic_add`; a kernel that works in place must load a "
    "tile before it stores any of it",
    "barrier": "let all threads of a block reach the same barriers: no barrier or reduction where they branch apart",
    "warp": "let whole warps take a branch that holds a reduction or a product",
    "trap": "the kernel's own assertion failed: see its condition",
}
"""Advice against a finding, one sentence for each kind."""
_COMPILER = "Triton orders these accesses itself: try `num_stages=1` to confirm, another Triton, and report it there"


def remedy(finding: "Finding") -> str:
    """Advice against a finding, one sentence."""
    return REMEDIES.get(finding.kind, _COMPILER)


def summary(findings: "list[Finding]") -> str:
    """Findings of several launches, one for each kind and line of the source, with what to do; empty without any."""
    by_line: dict[tuple, list[Finding]] = defaultdict(list)
    for finding in findings:
        by_line[finding.kind, finding.kernel, finding.where].append(finding)
    lines, told = [], set()
    for same in by_line.values():
        # A line of the source is several instructions, one for each vector of a thread.
        lines.append(str(replace(same[0], count=sum(x.count for x in same))))
        launches = len({id(x.launch if x.launch is not None else x) for x in same})
        if launches > 1:
            lines.append(f"    in {launches} launches")
        if (advice := remedy(same[0])) not in told:
            lines.append(f"    {advice}")
            told.add(advice)
    return "\n".join(lines)


def place_name(where: Place) -> str:
    """ "file:line < caller:line", innermost first."""
    return " < ".join(f"{Path(file).name}:{line}" for file, line in where) or "?"


@dataclass
class Access:
    """Traffic of a memory instruction. units: sectors of 32 bytes, or passes over the banks; ideal: fewest possible."""

    requests: int = 0
    units: int = 0
    ideal: int = 0
    bytes: int = 0

    def add(self, requests: int, units: int, ideal: int, bytes: int) -> None:
        self.requests += requests
        self.units += units
        self.ideal += ideal
        self.bytes += bytes

    def efficiency(self, space: str) -> float:
        """Bytes asked for over bytes of the sectors touched (global), or fewest passes over passes (shared)."""
        if not self.units:
            return 1.0
        return self.bytes / (SECTOR * self.units) if space.startswith("global") else self.ideal / self.units


@dataclass
class Launch:
    """Everything known about one launch. instructions: of warps, by class. accesses: by space, place and text.

    numbers: integer arguments by name. masks: whether a lane was masked, by the place of each masked access of global
    memory.
    """

    kernel: str
    arch: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    seconds: float = 0.0
    findings: list[Finding] = field(default_factory=list)
    instructions: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    flops: int = 0
    accesses: dict[tuple[str, Place, str], Access] = field(default_factory=lambda: defaultdict(Access))
    numbers: dict[str, int] = field(default_factory=dict)
    masks: dict[Place, bool] = field(default_factory=lambda: defaultdict(bool))

    def total(self, space: str) -> Access:
        """Traffic of one of the SPACES."""
        out = Access()
        for x in self.by_line(space).values():
            out.add(x.requests, x.units, x.ideal, x.bytes)
        return out

    def by_line(self, space: str) -> dict[Place, Access]:
        """Traffic of one of the SPACES by source line: the instructions of a line are one access of the source."""
        lines: dict[Place, Access] = defaultdict(Access)
        for (kind, where, _), x in self.accesses.items():
            if kind == space:
                lines[where].add(x.requests, x.units, x.ideal, x.bytes)
        return lines

    def inefficient(self, below: float = 0.8, share: float = 0.1) -> list[str]:
        """Lines less efficient than ``below`` that make more than ``share`` of the launch's traffic of their space."""
        out = []
        for space in SPACES:
            total = self.total(space).units
            unit = "sectors" if space.startswith("global") else "passes"
            for where, x in self.by_line(space).items():
                quality = x.efficiency(space)
                if quality < below and x.units > share * total and x.units > 8:
                    out.append(
                        f"{space} {quality:.0%} efficient, {x.units} {unit} for {x.bytes} bytes in {x.requests} "
                        f"requests ({x.units / total:.0%} of the launch's): {place_name(where)}"
                    )
        return out

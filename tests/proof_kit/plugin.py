"""Plugin of pytest that runs tests of Triton kernels on a CPU under one proof.

    PYTHONPATH=<this repository>/tests pytest -p proof_kit.plugin --proof interpreted --of my_kernels TESTS
    PYTHONPATH=<this repository>/tests pytest -p proof_kit.plugin --proof sm_90 --of my_kernels TESTS

The tests call kernels with CPU tensors and compare values; see :class:`Proof` for the fixture ``proof``. Under
``interpreted`` what the package allocates holds NaN between guard bands. Under ``sm_80`` and ``sm_90`` its kernels are
compiled for that GPU, assembled, and emulated under checks. A test fails on a finding, a spill, or a touched guard
band. Findings that are known go into a marker, ``@pytest.mark.finding("race")``: the test then fails without them.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest

if TYPE_CHECKING:
    from torch import Tensor

    from emulator.report import Launch
    from proof_kit.ptxas import Cost

PROOFS = ("interpreted", "sm_80", "sm_90")


class Proof:
    """Fixture ``proof`` of a test. name: the proof that runs. launches: emulated launches of the test so far."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.launches: list[Launch] = []

    def guarded(self, x: "Tensor") -> "Tensor":
        """A copy of x, with its strides, between bands of NaN: a read past either end poisons the result."""
        from support.kernels.guards import guarded

        return guarded(x)

    def bytes_moved(self) -> int | None:
        """Bytes of global memory that the launches so far asked for; None where kernels are interpreted."""
        if self.name == "interpreted":
            return None
        return sum(x.total(space).bytes for x in self.launches for space in ("global load", "global store"))

    def repeats(self, call: Callable[[], Any], times: int = 3) -> None:
        """Assert that ``call()``, a tensor or a sequence of tensors, has the same bits every time."""
        import torch

        def raw() -> list[Any]:
            out = call()
            tensors = [out] if isinstance(out, torch.Tensor) else list(out)
            return [x.detach().clone().contiguous().flatten().view(torch.uint8) for x in tensors]

        first = raw()
        for _ in range(times - 1):
            for a, b in zip(first, raw(), strict=True):
                assert torch.equal(a, b), "two calls with the same inputs gave different bits"


PROOF = pytest.StashKey[Proof]()
COSTS: dict[tuple[str, str], "Cost"] = {}  # by kernel and the text's hash, in this process
LAUNCHES: list["Launch"] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("proofs of Triton kernels")
    group.addoption("--proof", choices=PROOFS, help="run kernels interpreted, or emulated as compiled for this GPU")
    group.addoption("--of", default="", metavar="PACKAGE", help="package whose allocations are watched")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "finding(kind, ...): findings of the emulator that a test is known to make")


def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Choose between interpreter and compiler before anything imports Triton."""
    name = early_config.known_args_namespace.proof
    if name:
        os.environ["TRITON_INTERPRET"] = "1" if name == "interpreted" else "0"
        os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


@pytest.fixture
def proof(request: pytest.FixtureRequest) -> Proof:
    found = request.node.stash.get(PROOF, None)
    if found is None:
        raise pytest.UsageError(f"the fixture `proof` needs --proof, one of {', '.join(PROOFS)}")
    return found


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.config.getoption("proof"):
        item.stash[PROOF] = Proof(str(item.config.getoption("proof")))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    found = pyfuncitem.stash.get(PROOF, None)
    if found is None:
        return (yield)
    under = _interpreted if found.name == "interpreted" else _emulated
    known = {kind for marker in pyfuncitem.iter_markers("finding") for kind in marker.args}
    with under(found, str(pyfuncitem.config.getoption("of")), known):
        return (yield)


@contextmanager
def _interpreted(found: Proof, package: str, known: set[str]) -> Iterator[None]:
    import torch

    from support.kernels.guards import Poison

    poison = Poison(package)
    with ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            stack.enter_context(patch.object(owner, name, poison.wrap(getattr(owner, name))))
        yield
    poison.check()


@contextmanager
def _emulated(found: Proof, package: str, known: set[str]) -> Iterator[None]:
    from emulator.driver import install, recorded
    from emulator.library import watched_allocations

    spills: list[str] = []

    def assemble(text: str) -> str:
        from proof_kit.ptxas import assemble

        name = (re.findall(r"\.entry\s+([\w$]+)", text) or ["?"])[0]
        cost = COSTS[name, text] = assemble(text, found.name)
        if cost.spilled:
            spills.append(f"{name} spills {cost.spilled} bytes")
        return text

    install(found.name)
    with recorded(on_fault="collect", edit=assemble) as found.launches, watched_allocations(package):
        try:
            yield
        except AssertionError as error:
            error.add_note("\n".join(str(f) for x in found.launches for f in x.findings))
            raise
    LAUNCHES.extend(found.launches)
    findings = [f for x in found.launches for f in x.findings]
    faults = [*(str(f) for f in findings if f.kind not in known), *spills]
    assert not faults, "\n".join(faults)
    assert {f.kind for f in findings} == known, f"known findings that were not made: {known}"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print one row for each kernel that ran: launches, bytes of the last one, the worst cost of its variants."""
    if not LAUNCHES:
        return
    terminalreporter.section(f"kernels on {config.getoption('proof')}")
    columns = ("kernel", "launches", "bytes loaded", "efficiency", "stored", "efficiency", "registers", "shared")
    terminalreporter.write_line(f"| {' | '.join(columns)} |")
    terminalreporter.write_line("|---" * len(columns) + "|")
    for name in sorted({x.kernel for x in LAUNCHES}):
        of_kernel = [x for x in LAUNCHES if x.kernel == name]
        last, spaces = of_kernel[-1], ("global load", "global store")
        cells = [f"{last.total(s).bytes} | {last.total(s).efficiency(s):.0%}" for s in spaces]
        registers = max((cost.registers for (kernel, _), cost in COSTS.items() if kernel == name), default=0)
        terminalreporter.write_line(
            f"| {name} | {len(of_kernel)} | {' | '.join(cells)} | {registers} | {max(x.shared for x in of_kernel)} |"
        )

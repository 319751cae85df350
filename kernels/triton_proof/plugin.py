"""Plugin of pytest that runs tests of Triton kernels on a CPU under one proof.

    pytest -p triton_proof.plugin --proof interpreted TESTS
    pytest -p triton_proof.plugin --proof sm_90 TESTS

The tests call kernels with CPU tensors and compare values; see :class:`Proof` for the fixture ``proof``. Under
``interpreted`` what host code allocates holds NaN between guard bands. Under ``sm_80`` and ``sm_90`` kernels are
compiled for that GPU, assembled, and emulated under checks. A test fails on a finding, a spill, or a touched guard
band. Findings that are known go into a marker, ``@pytest.mark.finding("reduction-bits")``: the test then fails without
them.

A test that launches kernels of ``@triton.autotune`` runs once for each of their configurations. With ``--vary`` it runs
again on inputs of other strides or sizes.
"""

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest

if TYPE_CHECKING:
    from torch import Tensor

    from triton_proof.allocations import Poison
    from triton_proof.ptxas import Cost
    from triton_proof.report import Finding, Launch

PROOFS = ("interpreted", "sm_80", "sm_90")
VARIANTS = ("strides", "sizes")


class Proof:
    """Fixture ``proof`` of a test. name: the proof that runs. launches: emulated launches of the test so far."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.launches: list[Launch] = []
        self.prepare: Callable[[Tensor], Tensor] | None = None
        self._poison: Poison | None = None
        self._findings: list[Finding] = []
        self._spills: set[str] = set()

    def guarded(self, x: "Tensor") -> "Tensor":
        """A copy of x, with its strides, between bands of NaN: a read past either end poisons the result.

        A band is 4,096 elements; a read further away is not seen.
        """
        from triton_proof.allocations import guarded

        x = x if self.prepare is None else self.prepare(x)
        return guarded(x) if self._poison is None else self._poison.copy(x)

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
    group.addoption(
        "--vary", default="", metavar="strides,sizes",
        help="run each test again on rows that lie apart (strides), or with its even parameters made odd (sizes)",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    if unknown := [name for name in _variants(config) if name not in VARIANTS]:
        raise pytest.UsageError(f"--vary: wanted {' or '.join(VARIANTS)}, or both, got {unknown[0]!r}")
    config.addinivalue_line("markers", "finding(kind, ...): findings of the emulator that a test is known to make")


def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Choose between interpreter and compiler before anything imports Triton."""
    name = early_config.known_args_namespace.proof
    if name:
        os.environ["TRITON_INTERPRET"] = "1" if name == "interpreted" else "0"
        os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
        # `pytest` leaves the folder that it is started in out of the path, `python -m pytest` does not.
        sys.path.insert(0, str(early_config.invocation_params.dir))


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
    """Run the test under its proof, once for each configuration of its autotuned kernels."""
    found = pyfuncitem.stash.get(PROOF, None)
    if found is None:
        return (yield)
    with _one_turn(found, 0) as turn:
        result = yield
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    for number in range(1, turn.most):
        with _one_turn(found, number):
            pyfuncitem.obj(**arguments)
    for variant in _variants(pyfuncitem.config):
        _run_variant(pyfuncitem, found, variant, arguments)
    known = {kind for marker in pyfuncitem.iter_markers("finding") for kind in marker.args}
    _judge(found, known)
    return result


def _variants(config: pytest.Config) -> list[str]:
    return [name for name in str(config.getoption("vary")).split(",") if name]


def _run_variant(item: pytest.Function, found: Proof, variant: str, arguments: dict[str, Any]) -> None:
    """Run the test on inputs of a variant; not if the variant leaves all of them as they are."""
    import torch

    from triton_proof.variants import Gaps, odd_sizes

    if variant == "sizes":
        own = item.callspec.params if hasattr(item, "callspec") else {}
        changed = odd_sizes({name: value for name, value in own.items() if name in arguments})
        if changed:
            with _one_turn(found, 0, variant):
                item.obj(**arguments | changed)
        return
    found.prepare = gaps = Gaps()
    apart = {name: gaps(x) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    try:
        with gaps.inside(item.function.__module__), _one_turn(found, 0, variant):
            item.obj(**apart)
    finally:
        found.prepare = None


@contextmanager
def _one_turn(found: Proof, number: int, variant: str = "") -> Iterator[Any]:
    from triton_proof.autotune import one_configuration

    under = _interpreted if found.name == "interpreted" else _emulated
    with one_configuration(number) as turn, under(found):
        try:
            yield turn
        except Exception as error:
            if variant:
                error.add_note(f"in the variant {variant}")
            if isinstance(error, AssertionError):
                for note in _notes(found, str(turn) if turn.most > 1 else "", error):
                    error.add_note(note)
            raise


def _notes(found: Proof, turn: str, error: AssertionError) -> Iterator[str]:
    from triton_proof.report import summary

    if turn:
        yield f"with the configuration {turn}"
    last = traceback.extract_tb(error.__traceback__)[-1].line or ""
    if "cuda" in last:
        yield "proofs run on CPU tensors: host code that asks for a CUDA device has to let them pass"
    if text := summary([*found._findings, *(f for x in found.launches for f in x.findings)]):
        yield text


def _judge(found: Proof, known: set[str]) -> None:
    """Fail the test if it has faults beside the `known` kinds, which its markers name, or lacks one of these."""
    from triton_proof.report import summary

    made = {f.kind for f in found._findings}
    faults = [summary([f for f in found._findings if f.kind not in known]), *sorted(found._spills)]
    # Interpreted, only stores past a buffer show.
    if found.name != "interpreted" and (gone := known - made):
        faults.append(f"known findings that were not made: {', '.join(sorted(gone))}")
    if any(faults):
        guide = "docs/guides/prove_your_kernel.md says what each finding means."
        pytest.fail("\n".join([*filter(None, faults), guide]), pytrace=False)


@contextmanager
def _interpreted(found: Proof) -> Iterator[None]:
    from triton.runtime.interpreter import GridExecutor

    from triton_proof.allocations import Poison
    from triton_proof.report import Finding

    poison = found._poison = Poison()
    launch = GridExecutor.__call__

    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = launch(self, *args, **kwargs)
        for buffer, fault in poison.faults():
            named = [*zip(self.arg_names, args, strict=False), *kwargs.items()]
            names = [name for name, x in named if _in_storage(x, buffer.storage)]
            detail = f"{fault}, {names[0]}" if names else fault
            found._findings.append(Finding("out-of-bounds", self.fn.__name__, (), "", detail))
            poison.buffers.remove(buffer)
        return result

    try:
        with patch.object(GridExecutor, "__call__", checked), poison.inside():
            yield
    finally:
        found._poison = None


def _in_storage(x: Any, storage: "Tensor") -> bool:
    return hasattr(x, "untyped_storage") and x.untyped_storage().data_ptr() == storage.untyped_storage().data_ptr()


@contextmanager
def _emulated(found: Proof) -> Iterator[None]:
    from triton_proof.driver import install, recorded, watched_allocations
    from triton_proof.ptxas import assemble

    def assembled(text: str) -> str:
        name = (re.findall(r"\.entry\s+([\w$]+)", text) or ["?"])[0]
        cost = COSTS[name, text] = assemble(text, found.name)
        if cost.spilled:
            found._spills.add(f"{name} spills {cost.spilled} bytes of registers to memory: smaller tiles or more warps")
        return text

    install(found.name)
    with recorded(on_fault="collect", edit=assembled) as found.launches, watched_allocations():
        yield
    LAUNCHES.extend(found.launches)
    found._findings += [f for x in found.launches for f in x.findings]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print a row for each kernel: launches, bytes of the last one, the worst cost of its variants. Then hints."""
    if not LAUNCHES:
        return
    from triton_proof.coverage import hints

    terminalreporter.section(f"kernels on {config.getoption('proof')}")
    columns = ("kernel", "launches", "bytes loaded", "efficiency", "stored", "efficiency", "registers", "shared")
    terminalreporter.write_line(f"| {' | '.join(columns)} |")
    terminalreporter.write_line("|---" * len(columns) + "|")
    kernels = {name: [x for x in LAUNCHES if x.kernel == name] for name in sorted({x.kernel for x in LAUNCHES})}
    for name, of_kernel in kernels.items():
        last, spaces = of_kernel[-1], ("global load", "global store")
        cells = [f"{last.total(s).bytes} | {last.total(s).efficiency(s):.0%}" for s in spaces]
        registers = max((cost.registers for (kernel, _), cost in COSTS.items() if kernel == name), default=0)
        terminalreporter.write_line(
            f"| {name} | {len(of_kernel)} | {' | '.join(cells)} | {registers} | {max(x.shared for x in of_kernel)} |"
        )
    for name, of_kernel in kernels.items():
        for hint in hints(of_kernel):
            terminalreporter.write_line(f"hint: {name}: {hint}")

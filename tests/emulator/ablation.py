"""Measure of how much the emulator notices: compiled kernels with one instruction taken out at a time.

    PYTHONPATH=tests TRITON_INTERPRET=0 python -m emulator.ablation sm_80 [--select REGEX] [--most N]

Runs each kernel of some cases without one barrier, one wait or fence, or one guard of an access to global memory. Is
the kernel without it reported, does it only compute other values, or is nothing seen? What is not seen may be redundant
with these inputs. Those lines are printed.
"""

import argparse
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from emulator import driver
from emulator.cases import all_cases
from emulator.library import on_gpu, watched_allocations
from emulator.program.program import Program

CASES = (
    r"attention/sides/(both|lengths|long-lengths|packed-both)/bf16/whole$"
    r"|attention/sides/(long-packed-q|long-index)/bf16/splits$|pixel_losses/linear/bf16/mse/\w+/p(7|16)/D(67|128)"
    r"|gather_patches/(bf16|uint8)/strided/p7|masked/bf16/smooth_l1/normalized/none/p7|(visible|masked)/bf16/2x5x130$"
)
PLANTS = {  # lines of the text, and what is taken out of them; None: the line
    "barrier": (r"^\s*bar(rier)?\.sync\b", None),
    "wait for copies": (r"^\s*cp\.async\.wait", None),
    "proxy fence": (r"^\s*fence\.proxy", None),
    "wait for products": (r"^\s*wgmma\.wait_group", None),
    "guard of a load": (r"^\s*@!?%p\d+\s+ld\.global", r"@!?%p\d+\s+"),
    "guard of a store": (r"^\s*@!?%p\d+\s+st\.global", r"@!?%p\d+\s+"),
    "size of a copy": (
        r"^\s*cp\.async\.c[ag]\.shared\.global .*,\s*(0x[0-9a-f]+|\d+),\s*%r\d+\s*;",
        r",\s*%r\d+\s*(?=;)",
    ),
}


def variants(text: str, most: int) -> Iterator[tuple[str, str, str]]:
    """(plant, line, text without it) for at most ``most`` places of each plant, spread over the text."""
    lines = text.splitlines()
    for plant, (line_pattern, part) in PLANTS.items():
        places = [i for i, line in enumerate(lines) if re.search(line_pattern, line)]
        for i in places[:: max(1, len(places) // most)][:most]:
            left = "" if part is None else re.sub(part, "", lines[i], count=1)
            yield plant, f"line {i}: {lines[i].strip()}", "\n".join([*lines[:i], left, *lines[i + 1 :]])


class Ablation:
    """Replacement of :func:`emulator.driver.launch` that also runs the variants of each kernel when it is new."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.seen: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)  # by (kernel, plant)
        self.unseen: list[str] = []
        self._launch = driver.launch
        self._done: set[str] = set()

    def __call__(self, program: Program, arch: int, warps: int, shared: int, grid: Any, arguments: list[Any]) -> Any:
        rest = (arch, warps, shared, grid, arguments)
        if program.text in self._done:
            return self._launch(program, *rest)
        self._done.add(program.text)
        storages = [x.untyped_storage() for _, _, x in arguments if isinstance(x, Tensor) and x.numel()]
        before = [s.clone() for s in storages]
        done = self._launch(program, *rest)
        after = [s.clone() for s in storages]
        for plant, line, text in variants(program.text, self.most):
            for storage, old in zip(storages, before, strict=True):
                storage.copy_(old)
            verdict = self._verdict(Program(text, program.name), rest, storages, after)
            self.seen[program.name, plant][verdict] += 1
            if verdict == "nothing":
                self.unseen.append(f"{program.name} {line}")
        for storage, new in zip(storages, after, strict=True):
            storage.copy_(new)
        return done

    def _verdict(self, program: Program, rest: Any, storages: list[Any], wanted: list[Any]) -> str:
        try:
            with driver.recorded(on_fault="collect"):
                kinds = {f.kind for f in self._launch(program, *rest).findings}
        except (RuntimeError, ValueError, IndexError) as error:
            return f"refused ({type(error).__name__})"
        if kinds:
            return "+".join(sorted(kinds))
        same = all(torch.equal(_bytes(a), _bytes(b)) for a, b in zip(storages, wanted, strict=True))
        return "nothing" if same else "other values"


def _bytes(storage: Any) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def main() -> None:
    arguments = argparse.ArgumentParser(prog="python -m emulator.ablation", description=(__doc__ or "").split("\n")[0])
    arguments.add_argument("arch", choices=list(driver.ARCHS))
    arguments.add_argument("--select", default=CASES, help="regex over the names of cases")
    arguments.add_argument("--most", type=int, default=4, help="places of one kind that are tried in a kernel")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    ablation = Ablation(options.most)
    for name, case in all_cases().items():
        if re.search(options.select, name):
            torch.manual_seed(0)
            with patch.object(driver, "launch", ablation), on_gpu(options.arch), watched_allocations():
                case()
            print(f"done: {name}", flush=True)
    print("| kernel | taken out | seen as |\n|---|---|---|")
    for (kernel, plant), verdicts in sorted(ablation.seen.items()):
        print(f"| {kernel} | {plant} | {', '.join(f'{kind}: {n}' for kind, n in verdicts.most_common())} |")
    print(f"\nnothing seen ({len(ablation.unseen)}):", *ablation.unseen, sep="\n    ")


if __name__ == "__main__":
    main()

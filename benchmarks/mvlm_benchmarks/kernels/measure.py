"""Measurement of one contender at one case. Whatever is timed is checked, on the inputs on which it was timed."""

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mvlm_benchmarks.clock import Clock, Prepare, Refused, Results, Step, Timing, WrongValue, copied
from mvlm_benchmarks.kernels.checks import (
    check_kernels,
    difference,
    exchange_values,
    expected_kernels,
    gpu_events,
    poison,
    same_bits,
)
from mvlm_benchmarks.kernels.reference import CaseData, passes_of
from mvlm_benchmarks.machine import gpu_arch
from mvlm_benchmarks.unavailable import one_line
from mvlm_kernels.case import as_results

Function = Callable[..., Any]
"""A call of a contender: the leaves in order -> a tensor or several."""


@dataclass(frozen=True)
class Outcome:
    """Status of a pass, and a note."""

    status: str
    """ok, missing, not applicable, torch, error, WRONG or REFUSED."""
    note: str = ""


class LocalContender:
    """A contender in this process, whose results are compared with those of the reference.

    Args:
        functions: one function for each set of inputs, which takes its leaves in order. Always called inside `context`.
    """

    def __init__(
        self,
        data: CaseData,
        functions: list[Function],
        clock: Clock,
        context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self.passes, self.context = passes_of(data.case), context
        self._data, self._functions, self._clock = data, functions, clock
        self._sets, self._expected, self._limit = data.sets, data.expected, data.limit

    @property
    def has_kernels(self) -> bool:
        """False for an op of torch's operations alone, of which no kernel's name is known."""
        return self._data.case.has_kernels

    def step(self, name: str, number: int = 0, gradients_of: int | None = None) -> Step:
        """Make a function that runs a pass once, on the set with this number, and returns all that it computed.

        For `backward`, this method runs the forward pass itself, and the function runs the backward pass alone.
        gradients_of: the set whose incoming gradients are used, if it is another one.
        """
        function, leaves = self._functions[number], list(self._sets[number].leaves.values())
        incoming: list[Tensor] = []

        def gradients(outs: Results, **options: Any) -> Results:
            if not incoming:  # cast once, before anything is timed
                wanted = self._expected[number if gradients_of is None else gradients_of].incoming
                incoming.extend(x.to(out.dtype) for x, out in zip(wanted, outs, strict=True))
            return torch.autograd.grad(outs, leaves, incoming, **options)

        if name == "forward":
            return lambda: as_results(function(*leaves))
        if name == "backward":
            outs = as_results(function(*leaves))
            return lambda: gradients(outs, retain_graph=True)

        def both() -> Results:
            outs = as_results(function(*leaves))
            return (*outs, *gradients(outs))

        return both

    def run(self, name: str, number: int = 0, gradients_of: int | None = None) -> Results:
        """Run a pass once and return its results. The arguments are those of `step`."""
        with self.context():
            return self.step(name, number, gradients_of)()

    def check(self) -> dict[str, Outcome]:
        """Run forward and backward once and compare them with the reference, before anything is timed.

        Returns:
            The outcome of each pass. A wrong output fails all passes; a wrong gradient fails `backward` and `both`.
        """
        outcomes = dict.fromkeys(self.passes, Outcome("ok"))
        # Without gradients there is no backward pass.
        for first, name in enumerate(self.passes[:2]):
            with warnings.catch_warnings(record=True) as caught:
                try:
                    problem = difference(self.run(name), self._expected[0].of(name), self._limit, _NOUNS[name])
                    failure = Outcome("WRONG", problem) if problem else None
                except Exception as error:
                    failure = Outcome("error", _with_warnings(error, caught))
            if self._data.restore():
                return dict.fromkeys(self.passes, Outcome("REFUSED", "the inputs were changed"))
            if failure is not None:
                return outcomes | dict.fromkeys(self.passes[first:], failure)
        return outcomes

    def time(self, name: str) -> Timing:
        """Time a pass.

        Raises:
            WrongValue: the last timed result of a set of inputs is wrong.
            Refused: the inputs were changed (they are restored), or a timer was replaced.
        """
        with self.context():
            steps = [self.step(name, number) for number in range(len(self._sets))]
            timing, results = self._clock.time(steps, self._prepare(name, steps[0]()))
        if self._data.restore():
            raise Refused("the inputs were changed")
        self.check_timed(name, results, "timed")
        return timing

    def graph(self, name: str) -> float | None:
        """Time a pass inside a CUDA graph. WrongValue if the results that it left are wrong. None on a CPU."""
        with self.context():
            found = self._clock.graph(lambda: [self.step(name, number) for number in range(len(self._sets))])
        if found is None:
            return None
        self.check_timed(name, found[1], "graph's")
        return found[0]

    def peak_mb(self, name: str) -> float | None:
        with self.context():
            return self._clock.peak_mb(self.step(name))

    def check_kept_results(self, name: str) -> None:
        """Exchange the values of the first two sets, in place, and run again. Refused if a result is an earlier one."""
        exchange_values(*self._sets[:2])
        try:
            for number in (0, 1):
                poison(self.run(name, 1 - number))
                found = self.run(name, number, 1 - number)
                wanted = self._expected[1 - number].of(name)
                problem = difference(found, wanted, self._limit, "result")
                if problem:
                    raise Refused(f"after new values were written into the inputs, the {problem}")
        finally:
            exchange_values(*self._sets[:2])

    def repeats(self, name: str, count: int) -> str:
        """Repeat a pass on the first inputs, and compare the bits with the first result's.

        Returns:
            "50 of 50 equal", or fewer, with the number of the first repeat that differs.
        """
        first, different = copied(self.run(name)), []
        for number in range(count):
            poison(first)
            if not all(same_bits(a, b) for a, b in zip(self.run(name), first, strict=True)):
                different.append(number + 1)
        note = f", the first that differs: {different[0]}" if different else ""
        return f"{count - len(different)} of {count} equal{note}"

    def kernels(self, name: str) -> str:
        """Names of the kernels that a pass runs on the GPU. Refused unless they are those of our op."""
        self.run(name)  # compiles
        wanted = expected_kernels(lambda: self.run(name), gpu_arch())
        seen = [(event.name, event.device_resource_id) for event in gpu_events(lambda: self.run(name))]
        return check_kernels(wanted, seen)

    def check_timed(self, name: str, results: list[Results], what: str) -> None:
        """Compare timed results, one for each set of inputs, with the reference's. WrongValue if one is off."""
        for number, found in enumerate(results):
            wanted = self._expected[number].of(name)
            problem = difference(found, wanted, self._limit, f"the {what} result of inputs {number + 1}")
            if problem:
                raise WrongValue(problem)

    def _prepare(self, name: str, like: Results) -> Prepare:
        """Before each timed call: poison free memory, and mark the inputs as modified.

        Results are allocated in memory that was full of NaN, so a call that leaves out its work shows. A result that is
        kept for unmodified inputs is never found. A backward pass has saved its inputs, and refuses modified ones.
        """
        like = copied(like)

        def prepare(number: int) -> None:
            poison(like)
            if name != "backward":
                torch.autograd.graph.increment_version(self._sets[number].tensors())

        return prepare


_NOUNS = {"forward": "output", "backward": "gradient"}


def _with_warnings(problem: Exception, caught: list[warnings.WarningMessage]) -> str:
    """Text of an exception and the warnings before it. torch says in warnings why an SDPA backend refused a call."""
    text = " ".join(dict.fromkeys(str(w.message).split(" (Triggered", 1)[0] for w in caught))
    return f"{one_line(problem)} {text}".strip()[:600]

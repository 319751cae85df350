"""Names, modules and budgets of the stages. Imports nothing, so that a launcher can read it without torch."""

from typing import NamedTuple


class Plan(NamedTuple):
    """A stage: the module whose `run(stage)` it is, its budget in seconds, and one line about it."""

    module: str
    seconds: float
    what: str


STAGES = {
    "correct": Plan("mvlm_benchmarks.gpu.correct", 360, "values, repeats, captures; ceilings of memory and products"),
    "sweep": Plan("mvlm_benchmarks.gpu.sweep", 240, "tiles and launch options of each kernel; exceptions to the rules"),
    "kernels": Plan("mvlm_benchmarks.gpu.kernels", 400, "every op against every other implementation"),
    "step": Plan("mvlm_benchmarks.gpu.step", 360, "a training step against the baselines; GPU time by category"),
    "compiled": Plan("mvlm_benchmarks.gpu.compiled", 180, "the step with blocks compiled, then as a whole"),
}

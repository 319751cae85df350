"""Names, modules and budgets of the stages. Imports nothing, so that a launcher can read it without torch."""

from typing import NamedTuple


class StageSpec(NamedTuple):
    """A stage of measurements: the module whose `run(stage)` it is, its budget in seconds, and one line about it."""

    module: str
    seconds: float
    what: str


STAGES = {
    "first": StageSpec("mvlm_benchmarks.gpu.first", 560, "what is worth most first, part by part, in one archive"),
    "correct": StageSpec(
        "mvlm_benchmarks.gpu.correct", 360, "values, repeats, captures; ceilings of memory and products"
    ),
    "sweep": StageSpec(
        "mvlm_benchmarks.gpu.sweep", 240, "tiles and launch options of each kernel; exceptions to the rules"
    ),
    "kernels": StageSpec("mvlm_benchmarks.gpu.kernels", 400, "every op against every other implementation"),
    "step": StageSpec("mvlm_benchmarks.gpu.step", 360, "a training step against the baselines; GPU time by category"),
    "compiled": StageSpec("mvlm_benchmarks.gpu.compiled", 180, "the step with blocks compiled, then as a whole"),
}

# Of stage `first`, in their order: processes with at most so many seconds. Names of stages are those with --quick.
PARTS = {
    "machine": StageSpec("mvlm_benchmarks.gpu.machine", 60, "ceilings, while all kernels are compiled"),
    "correct": StageSpec(
        "mvlm_benchmarks.gpu.correct", 70, "values of every op and of the step's calls; the loader's images"
    ),
    "step": StageSpec("mvlm_benchmarks.gpu.step", 100, "steps at 128, 64 and 32 pairs, a CUDA graph, time by category"),
    "compiled": StageSpec("mvlm_benchmarks.gpu.compiled", 180, "the peer compiled in three ways, beside ours"),
    "kernels": StageSpec("mvlm_benchmarks.gpu.kernels", 65, "norms, GELU and attention against other libraries"),
    "profiles": StageSpec("mvlm_benchmarks.gpu.profiles", 35, "two reports of Nsight Compute"),
}
GRACE = 8.0
"""Seconds that a part of stage `first` has to end by itself, beyond its own."""

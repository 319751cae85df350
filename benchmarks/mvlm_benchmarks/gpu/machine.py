"""Part `machine` of stage `first`: what GPU this is, and the rates that it reaches, while its kernels are compiled."""

from mvlm_benchmarks.gpu.correct import measure_ceilings, write_output
from mvlm_benchmarks.gpu.stage import Stage
from mvlm_benchmarks.gpu.warm import warming


def run(stage: Stage) -> None:
    """Run part `machine`. Writes nvidia-smi.txt, ceilings.csv and warm.txt."""
    with warming(stage):
        if not stage.rehearse:
            write_output(stage, "nvidia-smi.txt", ["nvidia-smi", "-q"], 30)
        measure_ceilings(stage)

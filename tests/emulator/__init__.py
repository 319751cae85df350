"""Emulator of NVIDIA GPUs for Triton kernels: compiled PTX is run on the CPU under checks, and its traffic is counted.

    from emulator.driver import install, recorded

    install("sm_80")                      # or "sm_90"; before the first launch, in a process with TRITON_INTERPRET=0
    with recorded() as launches:
        kernel[grid](x, y, n, BLOCK=128)  # CPU tensors

A launch that had faults raises EmulationError. docs/explain/kernel_proofs.md says what is found and what is not.

    ptx/      text, read into basic blocks          driver.py   Triton's driver: compiled text in, emulated launches out
    scalar/   what one scalar instruction computes  report.py   findings and counters of a launch
    program/  instructions as Python functions      library.py  mvlm_kernels on the emulator
    machine/  threads in lockstep, and memory       cases/      calls of every op of mvlm_kernels
"""

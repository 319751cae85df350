"""``mvlm_kernels`` under the emulator of ``triton_proof``: every op, compiled for sm_80 and sm_90 and run on the CPU.

library.py       the library, told that CPU tensors are a GPU's
cases/           calls of every op, with their checks
test_kernels.py  all of them (`make emulate`)
counters.py      traffic of the kernels as compiled
"""

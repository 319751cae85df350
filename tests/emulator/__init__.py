"""``mvlm_kernels`` under the emulator of ``triton_proof``: every op, compiled for sm_80 and sm_90 and run on the CPU.

library.py       the library, told that CPU tensors are a GPU's
edges/           calls beyond the cases of the ops, such as ids out of range
test_kernels.py  the cases of the ops, and the edges (`make emulate`)
counters.py      traffic of the kernels as compiled
"""

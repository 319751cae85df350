"""Constants of the emulated memory."""

from triton_proof.scalar.formats import UNSIGNED

# Unsigned NumPy dtype by bytes.
WORDS = {bits // 8: dtype for bits, dtype in UNSIGNED.items() if bits >= 8}
# A byte that nobody wrote. Four of them are -2.6e36 as float32, two are -65376 as float16, one is -5 as int8.
PATTERN = 0xFB
# First address of shared memory.
SHARED_BASE = 1024
# Generic addresses: shared and local memory lie in windows above all global memory.
LOCAL_WINDOW, SHARED_WINDOW = 1 << 60, 1 << 61

"""The emulated kernels are not collected in a process that interprets kernels: see tests/triton_proof/conftest.py."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "0" else ["test_*"]

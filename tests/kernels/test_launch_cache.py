"""Known launches pass what Triton's own pass, and their kinds tell apart whatever it compiles apart.

Triton specialises arguments only in a process that does not interpret. Its driver is one that records.
"""

import json
import os
import subprocess
import sys

import pytest

LAUNCHES = """
import json, random

import torch

from mvlm.costs.step_kernels import launches_of
from mvlm.config.model import MaskVLMConfig

launches = launches_of(MaskVLMConfig.preset("base", vocab_size=64, mask_token_id=4, text_length=16), 64, "sm_90")
room = torch.zeros(64)


def real(x, misaligned=False):
    # A small tensor of the dtype: Triton looks at nothing else of a pointer but its address.
    if isinstance(x, tuple):
        return tuple(real(y, misaligned) for y in x)
    if isinstance(x, torch.Tensor):
        return torch.zeros(64, dtype=x.dtype)[1 if misaligned else 0 :]
    return x
"""

KINDS = """
from mvlm_kernels.aot import signature
from mvlm_kernels.launch_cache import kinds

INTS = [0, 1, 2, 16, 17, 48, -1, -16, 2**31 - 1, 2**31, 2**31 + 8, -(2**31), -(2**31) - 16, 2**40, 2**63, 2**63 + 16]
draw, found, compiled = random.Random(0), {}, set()


def changed(x):
    if isinstance(x, tuple):
        return tuple(changed(y) for y in x)
    if isinstance(x, torch.Tensor):
        return real(x, draw.random() < 0.5) if draw.random() < 0.9 else torch.nn.Parameter(room[draw.randrange(2) :])
    if type(x) is int:
        return draw.choice(INTS)
    return x


for launch in launches:
    for _ in range(200):
        args = changed(launch.args)
        text = signature(launch.kernel, args, launch.meta, "sm_90")
        key = launch.kernel.__name__, kinds(args), str(launch.meta)
        assert key[1] is not None and hash(key[1]) is not None
        found.setdefault(key, set()).add(text)
        compiled.add(text)
both = {key: texts for key, texts in found.items() if len(texts) > 1}
kinds_told = [len(launches), len(compiled), [str(key) for key in both][:3]]
"""

DRIVER = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import LazyDict

from mvlm_kernels import launch_cache

passed = []


class Utils:
    def load_binary(self, name, kernel, shared, device):
        return name, f"handle of {name}", 32, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}

    def __getattr__(self, name):
        return lambda *args: None


class Launcher:
    def __init__(self, source, metadata):
        self.name = metadata.name

    def __call__(self, *args):
        passed.append((self.name, *args))


class Driver:
    utils, launcher_cls = Utils(), Launcher

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 7

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


triton.runtime.driver.set_active(Driver())
names = {"add_norm_kernel", "column_sum_kernel", "short_kv_forward"}
chosen = list({x.kernel.__name__: x for x in launches if x.kernel.__name__ in names}.values())
equal, derived = [], []
for launch in chosen:
    run = type(launch.kernel).run
    for grid in ((3,), (3, 2), (3, 2, 5)):
        passed.clear()
        args = real(launch.args)
        launch.kernel[grid](*args, **launch.meta)
        for _ in range(2):
            launch_cache.launch(launch.kernel, grid, args, launch.meta, 0)
        type(launch.kernel).run = lambda *a, **k: derived.append(1)
        launch_cache.launch(launch.kernel, grid, args, launch.meta, 0)
        type(launch.kernel).run = run

        rows = [[x.get() if isinstance(x, LazyDict) else x for x in row] for row in passed]
        # Tensors are the same objects: `==` of lists does not compare what is identical.
        equal += [row == rows[0] for row in rows]
print(json.dumps([kinds_told, [len(chosen), equal, len(derived)]]))
"""


@pytest.fixture(scope="module")
def told():
    """What a process finds that compiles kernels: about kinds, and about what reaches the launcher."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", LAUNCHES + KINDS + DRIVER]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_launches_of_one_kind_are_compiled_once(told):
    launches, compiled, both = told[0]
    assert launches > 10
    assert compiled > 4 * launches  # the changes make Triton specialise
    assert both == []


@pytest.mark.slow
def test_a_known_launch_passes_what_triton_passes_and_derives_nothing(told):
    kernels, equal, derived = told[1]
    assert kernels == 3
    assert equal == [True] * (kernels * 3 * 4)
    assert derived == 0

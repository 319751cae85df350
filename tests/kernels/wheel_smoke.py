"""Check of an installed wheel, run by `make wheel-smoke` in an environment with the wheel, torch and Triton only.

Every op computes by its reference, by its interpreted kernel, and without Triton. One kernel is compiled for a GPU.
What needs an extra says which.
Each part runs in its own process, because Triton decides at import whether it interprets.
"""

import os
import subprocess
import sys

OPS = """
import sys
{before}
import torch
import mvlm_kernels as mk
assert "site-packages" in mk.__file__, mk.__file__

def outputs():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 2, 32, requires_grad=True) for n in (19, 7, 7))
    images, ids = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8), torch.tensor([[3, 0], [1, 2]])
    pred, weight = torch.randn(2, 2, 48, requires_grad=True), torch.randn(48, 48, requires_grad=True)
    tokens, row, positions = (torch.randn(*s, requires_grad=True) for s in ((2, 4, 16), (16,), (5, 16)))
    masked = torch.tensor([[True, False, False, True]] * 2)
    found = [
        mk.cross_attention(q, k, v, key_lengths=torch.tensor([7, 3])),
        mk.gather_patches(images, ids, 4, mean=[0.5] * 3, std=[0.5] * 3),
        mk.masked_pixel_loss(pred, images, ids, 4),
        mk.masked_pixel_loss(pred @ weight.T, images, ids, 4, kind="mse"),
        mk.place_tokens(tokens, row, positions, row, masked=masked),
    ]
    leaves = [q, k, v, pred, weight, tokens, row, positions]
    return found + list(torch.autograd.grad(sum(x.square().sum() for x in found), leaves))

reference = outputs()
{after}
"""
INTERPRETED = """
with mk.use_backend("triton"):
    kernels = outputs()
for a, b in zip(kernels, reference, strict=True):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
"""
NO_TRITON = "sys.modules['triton'] = None\nimport importlib.util\nfind = importlib.util.find_spec\n" + (
    "importlib.util.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)"
)
EXPLAINED = """
assert "triton is not installed" in str(mk.explain(mk.gather_patches, torch.zeros(1, 3, 4, 4), None, 2))
"""
FACE = """
import mvlm, mvlm_kernels
assert mvlm.__version__ == mvlm_kernels.__version__
try:
    mvlm.load_model
except ImportError as error:
    assert str(error).endswith("which is not installed; pip install 'mvlm[train]'"), error
else:
    raise AssertionError("the extra `train` is installed")
"""
COMMANDS = """
import subprocess, sys
call = lambda *words: subprocess.run([sys.executable, "-m", "mvlm", *words], capture_output=True, text=True)
listed, refused = call("--help"), call("pretrain", "tiny")
assert (listed.returncode, listed.stderr) == (0, ""), listed
assert "mvlm pretrain" in listed.stdout
assert refused.returncode == 2, refused
assert refused.stderr == "mvlm: wanted the package tyro, which is not installed; pip install 'mvlm[train]'\\n", refused
"""


def run(name: str, code: list[str], **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, *code], capture_output=True, text=True, env=os.environ | environment, check=False
    )
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    print(f"{name}: ok")


def main() -> None:
    run("references", ["-c", OPS.format(before="", after="")])
    run("interpreted kernels", ["-c", OPS.format(before="", after=INTERPRETED)], TRITON_INTERPRET="1")
    run("without Triton", ["-c", OPS.format(before=NO_TRITON, after=EXPLAINED)])
    run("names that need an extra", ["-c", FACE])
    run("commands without an extra", ["-c", COMMANDS])
    select = "cross_attention/bfloat16/64/32/lengths$"
    run("compiled for sm_90", ["-m", "mvlm_kernels.aot", "--arch", "sm_90", "--select", select])


if __name__ == "__main__":
    main()

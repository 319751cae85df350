"""timm's own tests on swapped models, beside the same tests without a swap.

    PYTHONPATH=tests python -m support.kernels.hosts_timm CHECKOUT [Model ...]

`make test-hosts TIMM=CHECKOUT` runs it. The tests are those of `tests/test_models.py` of a checkout of timm that need
no network: forward, backward, features, torch.fx, TorchScript. Models are the smallest of every family that has a part
to swap. The ops are forced to torch. The exit code is 1 if a test fails with the swap alone, or if no test ran.

This module is also the plugin of pytest that swaps what `timm.create_model` returns.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SWAPS, RESULT, CHOSEN = "HOSTS_SWAP", "HOSTS_RESULT", "HOSTS_MODELS"
NEED_NETWORK = ("test_model_inference", "test_model_load_pretrained", "test_model_features_pretrained")
MODELS = [
    "test_vit", "test_vit2", "test_vit3", "test_vit4", "cait_xxs24_224", "coat_tiny", "convit_tiny",
    "crossvit_tiny_240", "davit_tiny", "deit_tiny_patch16_224", "edgenext_xx_small", "efficientformer_l1",
    "eva02_tiny_patch14_224", "gcvit_xxtiny", "gmlp_ti16_224", "hiera_tiny_224", "maxvit_pico_rw_256",
    "mobilevit_xxs", "mvitv2_tiny", "nest_tiny", "pit_ti_224", "sequencer2d_s", "swin_tiny_patch4_window7_224",
    "swinv2_cr_tiny_224", "swinv2_tiny_window8_256", "tnt_s_legacy_patch16_224", "twins_svt_small", "visformer_tiny",
    "vit_srelpos_small_patch16_224", "vit_tiny_r_s16_p8_224", "vitamin_small_224", "volo_d1_224",
    "xcit_nano_12_p8_224",
]  # fmt: skip

_found: dict[str, Any] = {"passed": [], "failed": {}, "parts": 0}


def pytest_configure(config: Any) -> None:
    """Swap the models that timm makes from now on; before a test imports `create_model`."""
    if os.environ[SWAPS] == "0":
        return
    import timm

    from mvlm_kernels import use_backend
    from mvlm_kernels.integrations.blocks import swap_blocks
    from mvlm_kernels.integrations.timm import swap

    make = timm.create_model

    def create_model(*args: Any, **kwargs: Any) -> Any:
        model = make(*args, **kwargs)
        _found["parts"] += len(swap_blocks(model).swapped) + len(swap(model).swapped)
        return model

    timm.create_model = create_model
    use_backend("torch").__enter__()  # until the process ends


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    chosen = os.environ[CHOSEN].split()
    items[:] = [
        item
        for item in items
        if item.originalname not in NEED_NETWORK
        and (not hasattr(item, "callspec") or item.callspec.params.get("model_name", chosen[0]) in chosen)
    ]


def pytest_runtest_logreport(report: Any) -> None:
    name = report.nodeid.split("::")[-1]
    if report.failed:
        _found["failed"][name] = str(getattr(report.longrepr, "reprcrash", report.longrepr)).splitlines()[0]
    elif report.when == "call" and report.passed:
        _found["passed"].append(name)


def pytest_sessionfinish() -> None:
    Path(os.environ[RESULT]).write_text(json.dumps(_found))


def outcomes(checkout: Path, models: list[str], swaps: bool) -> dict[str, Any]:
    """Passed and failed tests of a run in a process of its own, and the number of swapped parts."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        paths = os.pathsep.join([str(checkout), *(path for path in sys.path if path)])
        own = {SWAPS: str(int(swaps)), RESULT: str(result), CHOSEN: " ".join(models), "PYTHONPATH": paths}
        command = [sys.executable, "-m", "pytest", "tests/test_models.py", "-q", "--tb=short", "-W", "ignore"]
        options = ["-p", __spec__.name, "-p", "no:cacheprovider"]
        subprocess.run([*command, *options], cwd=checkout, env={**os.environ, **own}, check=False)
        return json.loads(result.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description="timm's own tests with swapped models and without a swap.")
    parser.add_argument("checkout", type=Path)
    parser.add_argument("models", nargs="*", default=MODELS)
    options = parser.parse_args()
    without, swapped = (outcomes(options.checkout.resolve(), options.models, swaps) for swaps in (False, True))
    for title, found in (("without the swap", without), ("with the swap", swapped)):
        print(f"\n{title}: {len(found['passed'])} passed, {len(found['failed'])} failed")
        for name, reason in found["failed"].items():
            print(f"  {name}: {reason}")
    alone = swapped["failed"].keys() - without["failed"].keys()
    print(f"\n{swapped['parts']} parts were swapped. Fail with the swap alone: {', '.join(sorted(alone)) or 'none'}")
    return int(bool(alone) or not swapped["passed"] or not swapped["parts"])


if __name__ == "__main__":
    sys.exit(main())

"""The description of the machine, and which GPUs have a roofline."""

from mvlm_kernels.hardware import GPUS, peak_rates


def test_only_gpus_of_the_table_have_peak_rates() -> None:
    known = {"NVIDIA H100 80GB HBM3": "H100", "NVIDIA A100-SXM4-80GB": "A100", "NVIDIA H200": "H200"}
    known |= {"NVIDIA B200": "B200"}
    for name, found in known.items():
        assert peak_rates(name) is GPUS[found]
    for name in (
        "NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA A100-SXM4-40GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GH200 480GB", "NVIDIA GeForce RTX 4090",
    ):  # fmt: skip
        assert peak_rates(name) is None

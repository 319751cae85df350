"""The build for the Kernel Hub: two versions of it in one process, beside the installed package."""

import ast
import importlib
import importlib.util
import json
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import mvlm_kernels
from mvlm_kernels import layers, registration

KERNELS = Path(mvlm_kernels.__file__).parents[1]


def load(name: str, file: Path) -> ModuleType:
    """Import a package or a script from any path, as the Hub's client does."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, str, Any]]:
    """Of versions 1 and 2: the folder, the namespace of its ops, and the imported package."""
    builder = load("build_for_hub", KERNELS / "build_for_hub.py")
    made = []
    for version in (1, 2):
        out = tmp_path_factory.mktemp("hub")
        namespace = builder.build(out, version)
        folder = out / "build" / "torch-noarch"
        made.append((out, namespace, load(f"hub_copy_{version}", folder / "__init__.py")))
    return made


@pytest.mark.slow
def test_both_copies_and_the_installed_package_give_the_same_bits(copies: list[tuple[Path, str, Any]]):
    q, k = torch.randn(2, 9, 4, 24), torch.randn(2, 5, 2, 24)
    options: dict[str, Any] = {"key_lengths": torch.tensor([5, 3]), "dropout_p": 0.2, "seed": 3}
    found = []
    for package in (mvlm_kernels, *(package for _, _, package in copies)):
        with package.use_backend("triton"):
            query = q.clone().requires_grad_()
            out = package.cross_attention(query, k, k, **options)
            out.square().sum().backward()
            assert package.explain(package.cross_attention, query, k, k, **options).backend == "triton"
        assert package.explain(package.cross_attention, query, k, k).backend == "torch"  # a switch of each copy
        found.append((out, query.grad))
    for out, grad in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(grad, found[0][1])


@pytest.mark.slow
def test_each_copy_has_ops_of_its_own(copies: list[tuple[Path, str, Any]]):
    namespaces = {registration.NAMESPACE, *(namespace for _, namespace, _ in copies)}
    assert len(namespaces) == 3
    schemas = {s.name for s in torch._C._jit_get_all_schemas()}
    for namespace in namespaces:
        assert {f"{namespace}::cross_attention", f"{namespace}::place_tokens_backward"} <= schemas
    for folder, namespace, _ in copies:
        metadata = json.loads((folder / "build" / "torch-noarch" / "metadata.json").read_text())
        assert metadata["id"] == namespace
        assert metadata["python-depends"] == []


@pytest.mark.slow
def test_a_copy_knows_its_version_without_a_distribution(
    copies: list[tuple[Path, str, Any]], monkeypatch: pytest.MonkeyPatch
):
    wanted = mvlm_kernels.__version__
    monkeypatch.setattr("importlib.metadata.version", lambda name: pytest.fail(f"asked for {name}"))
    assert [package.__version__ for _, _, package in copies] == [wanted, wanted]


def test_no_module_of_a_copy_needs_the_installed_package(copies: list[tuple[Path, str, Any]]):
    folder, _, package = copies[0]
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert (node.module or "").split(".")[0] != "mvlm_kernels", f"{file}:{node.lineno}"
            assert not (isinstance(node, ast.Import) and any("mvlm" in name.name for name in node.names))
    for _, name, _ in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if "integrations" not in name:
            importlib.import_module(name)


def test_layers_of_a_copy_take_the_state_of_the_installed_ones(copies: list[tuple[Path, str, Any]]):
    theirs = importlib.import_module(f"{copies[1][2].__name__}.layers")
    assert set(theirs.__all__) == set(layers.__all__)
    ours = layers.CrossAttention(32, 4, kv_heads=2)
    copied = theirs.CrossAttention(32, 4, kv_heads=2)
    assert not isinstance(copied, layers.CrossAttention)
    copied.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 32)
    assert torch.equal(copied(x), ours(x))


def test_the_card_lists_every_op_and_layer(copies: list[tuple[Path, str, Any]]):
    card = (copies[1][0] / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: kernels\n")
    assert "version=2" in card
    for name in (*layers.__all__, *set(mvlm_kernels.__all__) - {"Explanation"}):
        assert f"`{name}`" in card, name

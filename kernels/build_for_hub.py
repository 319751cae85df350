"""Build the kernels for the Kernel Hub of Hugging Face, from the sources beside this file.

    python kernels/build_for_hub.py OUT [--version 1]

OUT gets ``build/torch-noarch``, a package that needs torch and Triton alone, and the card ``README.md``. The Hub loads
several versions of a package into one process, from any path. So imports of the copy are relative, and its ops have a
namespace of their own, which ends in the hash of sources and version. What only measures kernels is left out.
"""

import argparse
import ast
import hashlib
import json
import shutil
import tomllib
from pathlib import Path

NAME = "mvlm_kernels"
SOURCE = Path(__file__).parent / NAME
# Modules that compile or list kernels for measurements, and name other modules in strings.
LEFT_OUT = {
    "aot.py",
    "aot_cases.py",
    "hardware.py",
}
CARD = """---
library_name: kernels
license: apache-2.0
tags:
- kernel
---

# mvlm_kernels

Fused training kernels for masked vision-and-language models, in Triton, each with a torch reference that runs where no
kernel does: on CPUs, on other devices, in float64.

```python
from kernels import get_kernel

mvlm_kernels = get_kernel("OWNER/mvlm_kernels", version={version})
out = mvlm_kernels.cross_attention(q, k, v, key_lengths=lengths)  # (batch, length, heads, width)
print(mvlm_kernels.explain(mvlm_kernels.cross_attention, q, k, v))  # the backend, and the reasons for it
```

| op | |
|---|---|
{ops}

Layers, in `mvlm_kernels.layers`: {layers}. Their state dicts are those of torch's layers.

Kernels run on NVIDIA GPUs of compute capability 8.0 and later.
Python 3.11, torch 2.11 and Triton 3.6 are the oldest that are tested.
"""


def relative(source: str, package: tuple[str, ...]) -> str:
    """Source with imports of the package made relative. package: path of the module's own package inside it."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(name.name.split(".")[0] == NAME for name in node.names):
            raise ValueError(f"line {node.lineno} must import from {NAME}, got {lines[node.lineno - 1].strip()!r}")
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == NAME:
            inside = "." * (1 + len(package)) + node.module[len(NAME) + 1 :]
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = line.replace(f"from {node.module} ", f"from {inside} ", 1)
    return "".join(lines)


def sources() -> dict[str, str]:
    """Rewritten source of each module, by its path inside the package."""
    found = {}
    for file in sorted(SOURCE.rglob("*.py")):
        path = file.relative_to(SOURCE)
        if path.as_posix() not in LEFT_OUT:
            found[path.as_posix()] = relative(file.read_text(), path.parent.parts)
    return found


def public(module: str) -> list[tuple[str, str]]:
    """(name, first line of its docstring) of each public function and class that a module defines."""
    return [
        (node.name, (ast.get_docstring(node) or "").split("\n")[0])
        for node in ast.parse((SOURCE / module).read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]


def package_version() -> str:
    """Version of the package, as pyproject.toml states it."""
    return tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text())["project"]["version"]


def card(version: int) -> str:
    """Card of the kernel, made from the docstrings."""
    documented: dict[str, str] = {}
    for file in sorted(SOURCE.rglob("*.py")):
        for name, line in public(str(file.relative_to(SOURCE))):
            documented[name] = documented.get(name) or line  # an overload has no docstring, and a reference comes later
    face = next(
        node.value
        for node in ast.parse((SOURCE / "__init__.py").read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    ops = [name for name in ast.literal_eval(face) if name in documented]
    return CARD.format(
        version=version,
        ops="\n".join(f"| `{name}` | {documented[name].replace(':func:', '')} |" for name in ops),
        layers=", ".join(f"`{name}`" for name, _ in public("layers.py")),
    )


def build(out: Path, version: int) -> str:
    """Write build and card into ``out``, replacing a build that is there. Returns the namespace of the ops."""
    modules = sources()
    content = json.dumps([version, modules], sort_keys=True).encode()
    namespace = f"_{NAME}_{hashlib.sha256(content).hexdigest()[:8]}"
    own = f'NAMESPACE = "{NAME}"'
    assert modules["registration.py"].count(own) == 1
    modules["registration.py"] = modules["registration.py"].replace(own, f'NAMESPACE = "{namespace}"')
    installed = 'return version("mvlm")'  # a copy has no distribution to ask
    assert modules["__init__.py"].count(installed) == 1
    modules["__init__.py"] = modules["__init__.py"].replace(installed, f'return "{package_version()}"')
    folder = out / "build" / "torch-noarch"
    if folder.exists():
        shutil.rmtree(folder)
    for path, source in modules.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(source)
    (folder / "configs").mkdir()
    for table in SOURCE.glob("configs/*.json"):
        shutil.copy(table, folder / "configs" / table.name)
    metadata = {"id": namespace, "version": version, "license": "apache-2.0", "python-depends": []}
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    (out / "README.md").write_text(card(version))
    return namespace


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the kernel's repository")
    parser.add_argument("--version", type=int, default=1)
    options = parser.parse_args()
    print(f"{options.out}: ops in torch.ops.{build(options.out, options.version)}")


if __name__ == "__main__":
    main()

"""NVIDIA's interface as stub files: TensorRT 11.4 from its own bindings, 10.13 from the package tensorrt-stubs.

The bindings link to three libraries, which no package index has. Ten entry points in three empty libraries stand in for
them, enough to import the bindings and to read every class and signature; nothing of TensorRT can be run that way.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ENTRIES = {
    "nvinfer": [
        "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry", "getPluginRegistry",
    ],
    "nvinfer_plugin": ["initLibNvInferPlugins"],
    "nvonnxparser": ["createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getNvOnnxParserVersion"],
}  # fmt: skip
OLDER = Path(sys.prefix) / "stubs"
"""Where the Makefile puts tensorrt-stubs, which must not be importable."""
VERSIONS = ["11", "10.13"]
FRONT = "from tensorrt_bindings.tensorrt import *\n__version__: str\ndef nptype(trt_type: DataType) -> type: ...\n"


def stand_in(folder: Path) -> dict[str, str]:
    """An environment in which tensorrt_bindings can be imported. Skips where it is not installed."""
    if importlib.util.find_spec("tensorrt_bindings") is None:
        pytest.skip("TensorRT's interface was not checked: pip install tensorrt-cu13-bindings")
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("TensorRT's interface was not checked: no C compiler")
    for library, names in ENTRIES.items():
        source = folder / f"{library}.c"
        source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in names))
        name = f"lib{library}.so.11"
        options = ["-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name)]
        subprocess.run([compiler, str(source), *options], check=True)
    return os.environ | {"LD_LIBRARY_PATH": str(folder)}


def stubs(version: str, folder: Path) -> Path:
    """A directory with stubs of the package tensorrt, 11 or 10.13. Skips where they cannot be had."""
    if version == "10.13":
        if not (OLDER / "tensorrt_bindings").is_dir():
            pytest.skip(f"TensorRT 10.13's interface was not checked: no tensorrt-stubs in {OLDER} (make venv)")
        return OLDER
    environment = stand_in(folder)
    target = folder / "stubs"
    stubgen = str(Path(sys.executable).parent / "stubgen")
    command = [stubgen, "-m", "tensorrt_bindings.tensorrt", "--inspect-mode", "-q", "-o", str(target)]
    subprocess.run(command, check=True, env=environment, cwd=folder)
    (target / "tensorrt").mkdir()
    (target / "tensorrt" / "__init__.pyi").write_text(FRONT)
    (target / "tensorrt_bindings" / "__init__.pyi").write_text("")
    inner = target / "tensorrt_bindings" / "tensorrt.pyi"
    # stubgen does not see the buffer protocol, by which the older stubs and NVIDIA's documentation let it be read
    buffer = "class IHostMemory:\n    def __buffer__(self, flags: int, /) -> memoryview: ...\n"
    inner.write_text(inner.read_text().replace("class IHostMemory:\n", buffer))
    return target


def members(folder: Path) -> dict[str, dict[str, list[list[str]]]]:
    """Class -> member -> parameter names of each overload without self, ["*"] where unknown; none for a property."""
    text = (folder / "tensorrt_bindings" / "tensorrt.pyi").read_text()
    # the stubs are no Python in two places: a parameter is called in, and one without default follows defaults
    tree = ast.parse(re.sub(r"\bin: ", "in_: ", re.sub(r" = (None|\.\.\.)(?=[,)])", "", text)))
    result: dict[str, dict[str, list[list[str]]]] = {}
    for name, node in _classes(tree.body, ""):
        found = result.setdefault(name, {})
        for item in node.body:
            if isinstance(item, ast.FunctionDef):
                found.setdefault(item.name, [])
                if not any(isinstance(d, ast.Name) and d.id == "property" for d in item.decorator_list):
                    known = [argument.arg for argument in item.args.args[1:]]
                    found[item.name].append(["*"] if item.args.vararg else known)
            elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                found[item.target.id] = []
    return result


def _classes(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.ClassDef]]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield prefix + node.name, node
            yield from _classes(node.body, f"{prefix}{node.name}.")

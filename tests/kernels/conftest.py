"""The CUDA sources built by g++ over the emulated card."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

EMULATION = Path(__file__).parent / "emulation"
SOURCES = Path(__file__).parents[2] / "kernels" / "csrc"

# Any undefined behaviour ends the process: a float4 off its alignment, an index beyond an array, an overflow.
FLAGS = ["-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-fno-strict-aliasing", "-fvisibility=hidden"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
FLAGS += ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The C ABI of mcheads_cuda.h, the operator of ONNX Runtime and the emulation's own functions.

    TRIVIUM_CUBLASLT names an emulated cuBLASLt.
    """
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on the PATH: no emulation to build")
    folder = tmp_path_factory.mktemp("emulation")
    gemm, heads = folder / "libcublaslt.so", folder / "libheads.so"
    sources = [SOURCES / "ort_tensor.cpp", SOURCES / "ort_cuda.cpp", SOURCES / "cuda_run.cu"]
    sources += [SOURCES / f"cuda_{part}.cpp" for part in ("model", "gemm", "abi")]
    sources += [EMULATION / "emulation.cpp", EMULATION / "ort.cpp"]
    for target, parts in ((gemm, [EMULATION / "cublaslt.cpp"]), (heads, sources)):
        command = ["g++", *FLAGS, f"-I{EMULATION}", f"-I{SOURCES}", "-x", "c++", *map(str, parts), "-o", str(target)]
        result = subprocess.run([*command, "-ldl"], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIVIUM_CUBLASLT", str(gemm))
        yield heads

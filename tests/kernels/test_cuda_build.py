"""The CUDA sources compile for every architecture without a warning, without spills, against cuBLASLt's real header."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "kernels" / "csrc"
ARCHITECTURES = (80, 90, 100)
KERNELS = {
    "expand_kernel<float>",
    "expand_kernel<unsigned short>",
    "statistics_kernel<1>",
    "statistics_kernel<8>",
    "rows_kernel",
    "means_kernel",
    "divergence_kernel",
}

nvcc = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(nvcc is None, reason="nvcc is not on the PATH: no CUDA source can be compiled")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], str]:
    """What ptxas reports of each kernel and architecture; all warnings of nvcc, ptxas and g++ are errors."""
    command = [str(nvcc), "-std=c++17", "-O3", "-c", str(SOURCES / "cuda_run.cu")]
    command += ["-o", str(tmp_path_factory.mktemp("cuda") / "cuda_run.o")]
    command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    command += ["-Xptxas=-v", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror,-fPIC"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    named = subprocess.run(["c++filt"], input=result.stderr, capture_output=True, text=True, check=True).stdout
    reports = re.split(r"ptxas info\s*: Compiling entry function ", named)[1:]
    found = {}
    for report in reports:
        match = re.match(r"'(?:void )?trivium::([^(]+)\(.*' for 'sm_(\d+)'", report)
        assert match, report
        found[match[1], int(match[2])] = report
    return found


@needs_nvcc
def test_every_kernel_is_compiled_for_every_architecture(compiled: dict[tuple[str, int], str]) -> None:
    assert set(compiled) == {(kernel, a) for kernel in KERNELS for a in ARCHITECTURES}


@needs_nvcc
def test_no_kernel_spills(compiled: dict[tuple[str, int], str]) -> None:
    for kernel, report in compiled.items():
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
        assert frame, report
        assert frame.groups() == ("0", "0", "0"), (kernel, report)


@needs_nvcc
def test_cublaslt_is_declared_as_its_header_has_it(tmp_path: Path) -> None:
    """The values and the struct of cuda_gemm.h against cublasLt.h, where a package of NVIDIA's brings it."""
    (tmp_path / "check.cpp").write_text(
        """
        #include <cublasLt.h>
        #include "cuda_gemm.h"
        using namespace trivium;
        static_assert(kCublasOk == CUBLAS_STATUS_SUCCESS);
        static_assert(kReal32 == CUDA_R_32F && kRealBfloat16 == CUDA_R_16BF);
        static_assert(kCompute32 == CUBLAS_COMPUTE_32F && kTransposeA == CUBLASLT_MATMUL_DESC_TRANSA);
        static_assert(CUBLAS_OP_T == 1 && sizeof(cublasOperation_t) == 4);
        static_assert(kBatchCount == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT);
        static_assert(kBatchStride == CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET);
        static_assert(kMaxWorkspace == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES);
        static_assert(kAlignmentA == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES);
        static_assert(kAlignmentA + 1 == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES);
        static_assert(kAlignmentA + 2 == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES);
        static_assert(kAlignmentA + 3 == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES);
        static_assert(sizeof(GemmAlgorithm) == sizeof(cublasLtMatmulAlgo_t));
        static_assert(sizeof(GemmHeuristic) == sizeof(cublasLtMatmulHeuristicResult_t));
        static_assert(offsetof(GemmHeuristic, workspace_bytes) ==
                      offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize));
        static_assert(offsetof(GemmHeuristic, status) == offsetof(cublasLtMatmulHeuristicResult_t, state));
        """
    )
    command = [str(nvcc), "-std=c++17", "-c", f"-I{SOURCES}", *(f"-I{folder}" for folder in nvidia_headers())]
    command += [str(tmp_path / "check.cpp"), "-o", str(tmp_path / "check.o")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cublasLt.h: No such file" in result.stderr:
        pytest.skip("cublasLt.h is not installed")
    assert result.returncode == 0, result.stderr


def nvidia_headers() -> list[Path]:
    """Folders of the headers that NVIDIA's wheels bring; nvcc knows its own."""
    spec = importlib.util.find_spec("nvidia")
    places = (spec.submodule_search_locations or []) if spec else []
    return [folder for place in places for folder in Path(place).glob("*/include")]

"""The CUDA kernels over torch tensors: building them, running them, and timing whatever runs on the card."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from trivium.kernels import HeadStatistics
from trivium.kernels.cuda import ALL_STAGES, BFLOAT16, FLOAT16, FLOAT32, CudaLibrary, CudaModel, Shape

ROOT = Path(__file__).parents[2]
FEATURE_TYPES = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}
GUARD = 64
"""Floats on either side of an output that no kernel may touch."""
POISON = 12345.0


class Problem(SystemExit):
    """What keeps the check from running: its line, and exit status 1."""


def build(folder: Path) -> CudaLibrary:
    """Compile the CUDA sources for the card at hand into folder."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise Problem("gpu-check: nvcc is not on the PATH")
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        raise Problem(f"gpu-check: compute capability 8.0 is needed, this card has {major}.{minor}")
    folder.mkdir(parents=True, exist_ok=True)
    target, sources = folder / "libtrivium_cuda.so", ROOT / "kernels" / "csrc"
    command = [nvcc, "-std=c++17", "-O3", "-shared", f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}"]
    command += ["-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    command += [str(sources / name) for name in ("cuda_run.cu", "cuda_model.cpp", "cuda_gemm.cpp", "cuda_abi.cpp")]
    command += ["-o", str(target), "-ldl"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise Problem(f"gpu-check: the kernels do not compile\n{result.stderr}")
    return CudaLibrary(target)


class UnwrittenOutput(Exception):
    """A kernel wrote too little of an output, or beyond it."""


class Heads:
    """A packed model with buffers for one batch size, so that a run allocates nothing and can be captured."""

    def __init__(
        self,
        library: CudaLibrary,
        features: torch.Tensor,
        weights: NDArray[np.float32],
        bias: NDArray[np.float32],
        temperature: NDArray[np.float32],
        masks: NDArray[np.uint8],
        keep: float,
        arithmetic: int,
    ) -> None:
        k, c, d = weights.shape
        b = len(features)
        shape = Shape(k, 1 if features.ndim == 2 else k, c, d, len(masks))
        w, b_, tau, m = (a.ctypes.data for a in (weights, bias, temperature, masks))
        self.model = CudaModel(library, shape, keep, arithmetic, w, b_, tau, m, current_stream(features.device))
        self.features = features
        self.shapes = ((b, k, c), (b, k), (b, k), (b, k, k), (b, k))
        counts = [int(np.prod(s)) + 2 * GUARD for s in self.shapes]
        self.buffers = [torch.full((n,), POISON, device=features.device) for n in counts]
        self.bytes = self.model.workspace_bytes(b)
        # 0xff in every byte: what was never written reads as NaN.
        self.workspace = torch.full((self.bytes + 256,), 255, dtype=torch.uint8, device=features.device)

    def __enter__(self) -> Heads:
        return self

    def __exit__(self, *_: object) -> None:
        if self.features.is_cuda:
            torch.cuda.synchronize()
        self.model.close()

    def run(self, stages: int = ALL_STAGES) -> None:
        """Enqueue on torch's current stream."""
        first, *others = (b.data_ptr() + 4 * GUARD for b in self.buffers)
        second, third, fourth, fifth = others
        self.model.run(
            self.features.data_ptr(),
            FEATURE_TYPES[self.features.dtype],
            len(self.features),
            (first, second, third, fourth, fifth),
            -(-self.workspace.data_ptr() // 256) * 256,
            self.bytes,
            current_stream(self.features.device),
            stages,
        )

    def poison(self) -> None:
        for buffer in self.buffers:
            buffer.fill_(POISON)

    def statistics(self) -> HeadStatistics:
        """What the last run wrote. Raises: UnwrittenOutput."""
        arrays = [b.cpu().numpy() for b in self.buffers]
        for array, name in zip(arrays, HeadStatistics._fields, strict=True):
            margins = np.concatenate([array[:GUARD], array[-GUARD:]])
            if (margins != POISON).any():
                raise UnwrittenOutput(f"{name}: written beyond its end")
            if (array[GUARD:-GUARD] == POISON).any():
                raise UnwrittenOutput(f"{name}: not written in whole")
        return HeadStatistics(*(a[GUARD:-GUARD].reshape(s) for a, s in zip(arrays, self.shapes, strict=True)))


def current_stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def capture(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The replay of run as a CUDA graph, after a warm-up; run itself where there is no card."""
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream(device)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def median_us(run: Callable[[], object], device: torch.device, budget_ms: float = 60.0) -> float:
    """Median microseconds of a run: graph replays, each series of them between two events."""
    replay = capture(run, device)
    if device.type != "cuda":
        start = time.perf_counter()
        replay()
        return (time.perf_counter() - start) * 1e6

    def series(count: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(count):
            replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / count

    once = min(series(3) for _ in range(3))
    count = max(1, min(50, int(budget_ms * 1e3 / 15 / max(once, 1.0))))
    return statistics.median(series(count) for _ in range(15))

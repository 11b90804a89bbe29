"""make gpu-check: build the CUDA kernels, prove them against the reference, time them, write kernels/GPU.md.

Needs a CUDA card of compute capability 8.0 or newer, nvcc with g++ on the PATH, and a Python with torch (CUDA) and
numpy; compute-sanitizer is used where it is there. Needs no network, no installed trivium:

    PYTHONPATH=.namespace python3 -m tests.gpu_check
"""

from __future__ import annotations

import importlib.util
import sys

if __name__ == "__main__":
    missing = [name for name in ("torch", "numpy", "trivium") if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"gpu-check: {sys.executable} has no {' and no '.join(missing)}; make gpu-check PYTHON=... picks another"
        )

    from .report import main

    main(str(__doc__))

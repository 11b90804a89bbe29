"""What every peer's worker runs: the bundle's graph in ONNX Runtime with our operators, as our own workers run it.

Modules of this folder are executed by the peers' environments and know nothing of trivium. They are told by environment
variables: TRIVIUM_MODEL and TRIVIUM_OPERATORS are files, TRIVIUM_WORKERS a number.
"""

from __future__ import annotations

import os

import numpy as np
import onnxruntime
from numpy.typing import NDArray

OUTPUTS = ["probabilities", "predictive_entropy", "mutual_information", "divergence", "energy"]
WORKERS = int(os.environ.get("TRIVIUM_WORKERS", "2"))


class Heads:
    """A session with one thread."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        if operators := os.environ.get("TRIVIUM_OPERATORS"):
            options.register_custom_ops_library(operators)
        self._session = onnxruntime.InferenceSession(os.environ["TRIVIUM_MODEL"], options)
        self._shape = [1, *self._session.get_inputs()[0].shape[1:]]

    def run(self, image: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        """From uint8 [1, H, W, 3] to the outputs in their order."""
        return self._session.run(OUTPUTS, {"image": image})

    def answer(self, pixels: bytes) -> bytes:
        """From the bytes of uint8 [H, W, 3] to the outputs' bytes, one behind the other."""
        image = np.frombuffer(pixels, np.uint8).reshape(self._shape)
        return b"".join(values.tobytes() for values in self.run(image))

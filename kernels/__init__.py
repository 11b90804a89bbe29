"""Monte-Carlo-dropout statistics of a multi-headed classifier: the definition, its masks, and the fast kernels."""

from .heads import KernelCounts, MCHeads, backend, kernel_counts, mc_heads
from .masks import dropout_masks
from .onnx_op import custom_ops_library, pays
from .reference import HeadStatistics, check_shapes, mc_heads_ref

__all__ = [
    "HeadStatistics",
    "KernelCounts",
    "MCHeads",
    "backend",
    "check_shapes",
    "custom_ops_library",
    "dropout_masks",
    "kernel_counts",
    "mc_heads",
    "mc_heads_ref",
    "pays",
]

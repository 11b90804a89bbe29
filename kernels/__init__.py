"""Monte-Carlo-dropout statistics of a multi-headed classifier: the definition, its masks, and the fast kernels."""

from .masks import dropout_masks
from .reference import HeadStatistics, check_shapes, mc_heads_ref

__all__ = ["HeadStatistics", "check_shapes", "dropout_masks", "mc_heads_ref"]

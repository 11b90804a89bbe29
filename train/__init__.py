"""Training: from a pretrained classifier and pictures to a three-headed robust student."""

import os

# Read when torch loads OpenMP: threads that spin at barriers burn several times the CPU where cores are contended.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if "TORCHELASTIC_RUN_ID" in os.environ:
    # Read when torch is loaded too: DDP warns in every process that it looks for parameters without gradient.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

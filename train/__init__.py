"""Training: from a pretrained classifier and pictures to a three-headed robust student."""

import os

# Read when torch loads OpenMP: threads that spin at barriers burn several times the CPU where cores are contended.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

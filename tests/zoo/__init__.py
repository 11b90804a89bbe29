"""Architectures of timm, at random weights, through the export: what it takes and what it refuses."""

"""Guarantees: what a bundle may promise of its answers, found and verified on calibration pictures."""

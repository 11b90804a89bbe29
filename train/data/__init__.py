"""Labelled pictures: sources, fixed splits, batches as serving sees them."""

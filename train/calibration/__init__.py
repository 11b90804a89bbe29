"""Temperatures, routing rules and the choice among them."""

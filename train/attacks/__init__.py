"""Attacks: pictures changed within a ball so that a classifier is wrong about them."""

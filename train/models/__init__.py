"""Classifiers: timm models cut into stages, students with heads, small networks."""

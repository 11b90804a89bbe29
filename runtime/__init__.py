"""Serving: from picture bytes to a routed, uncertainty-aware answer."""

"""Kernels and per-target emission."""

"""Diagnostics: what calibration data shows of every attention head and residual sublayer, for a
person who chooses rewrites. `diagnose` measures, a `Diagnosis` is what it gives."""

"""Diagnostics: what calibration data shows of every attention head and residual sublayer, for a
person who chooses rewrites."""

from attnopt.compiler.diagnostics.diagnose import OutOfTime, diagnose
from attnopt.compiler.diagnostics.diagnosis import Diagnosis, SiteDiagnosis, SublayerDiagnosis

__all__ = ["Diagnosis", "OutOfTime", "SiteDiagnosis", "SublayerDiagnosis", "diagnose"]

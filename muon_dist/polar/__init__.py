"""The polar factor of a matrix: coefficient schedules and the iterations that use them."""

from muon_dist.polar.coefficients import Schedule, schedule
from muon_dist.polar.newton_schulz import default_dtype, polar_factor, workspace_elements

__all__ = ["Schedule", "default_dtype", "polar_factor", "schedule", "workspace_elements"]

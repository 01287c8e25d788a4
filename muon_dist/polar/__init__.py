"""The polar factor of a matrix: coefficient schedules and the iterations that use them."""

from muon_dist.polar.coefficients import Schedule, schedule
from muon_dist.polar.newton_schulz import polar_factor

__all__ = ["Schedule", "polar_factor", "schedule"]

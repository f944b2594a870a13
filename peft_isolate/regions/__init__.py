"""WHERE a model may change: names, shapes, indices. No autograd, no PEFT."""

from .region import Region, base_parameters, shapes_of
from .roles import ROLES, Role, roles
from .selection import Selection, strided

__all__ = ["ROLES", "Region", "Role", "Selection", "base_parameters", "roles", "shapes_of", "strided"]

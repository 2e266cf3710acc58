"""What every package of the project shares. Imports nothing of the project, and no torch."""

from maskgit.common.errors import RunError, UserError, nearest, pick

__all__ = ["RunError", "UserError", "nearest", "pick"]

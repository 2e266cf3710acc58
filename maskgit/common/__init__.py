"""What every package of the project shares. Imports nothing of the project, and no torch."""

from maskgit.common.errors import UserError, nearest, pick

__all__ = ["UserError", "nearest", "pick"]

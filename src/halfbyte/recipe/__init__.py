"""What the user asked for."""

from halfbyte.recipe.schema import Recipe

__all__ = ["Recipe"]

"""What the user asked for."""

from halfbyte.recipe.load import Recipe

__all__ = ["Recipe"]

"""Rows dropped and mended by the filters of a recipe, before anything else is done with them."""

from halfbyte.data.cleaning.funnel import Cleaned, clean
from halfbyte.data.cleaning.write import write_cleaned

__all__ = ["Cleaned", "clean", "write_cleaned"]

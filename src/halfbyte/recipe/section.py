"""What every group of settings has in common."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

Auto = Literal["auto"]
PositiveInt = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """Base of every section: unknown keys and silent type conversions are errors."""

    model_config = ConfigDict(
        extra="forbid", strict=True, validate_assignment=True, allow_inf_nan=False
    )


def rule(key: str, sentence: str) -> PydanticCustomError:
    """A rule that pydantic has no word for; ``key`` is the setting to look at."""
    return PydanticCustomError("rule", "{sentence}", {"key": key, "sentence": f"{key} {sentence}"})

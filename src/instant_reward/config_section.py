"""What every section of a config has in common: no unknown keys, finite numbers, and short forms."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """What every section has in common: no unknown keys, finite numbers, and a short form where ``short`` is set."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_assignment=True, validate_default=True)
    short: ClassVar[str | None] = None

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, values: Any) -> Any:
        """A bare word stands for the section with only its main key."""
        return {cls.short: values} if cls.short and isinstance(values, str) else values

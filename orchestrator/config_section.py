"""What the sections of a recipe have in common: frozen, strict, documented by the text under each field."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def settled_path(path: str) -> str:
    """Absolute, so that workers and later commands mean the same place.

    `${site_packages}` and s3:// stay as written.
    """
    if "://" in path or path.startswith("${"):
        return path
    try:
        return str(Path(path).expanduser().absolute())
    except (RuntimeError, ValueError) as error:
        raise ValueError(str(error)) from None


InputPath = Annotated[str, Field(min_length=1), AfterValidator(settled_path)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

"""What every request body has in common: strict fields, and refusals that name the field.

A field that a body does not have is refused by name. ``null`` and an empty list ask for
nothing, so they are taken for absent.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic_core import PydanticCustomError, core_schema

MAX_UNKNOWN = 32
MAX_METADATA = 16  # OpenAI's own limit
INERT = "accepted; changes nothing"  # said of a field that cannot change the answer
MANY_TOKENS = 2**31 - 1


def refused(param: str, why: str) -> PydanticCustomError:
    """The fault of one field that only the whole body shows."""
    return PydanticCustomError("not_supported", "{why}", {"param": param, "why": why})


class only:
    """Refuse, at the field itself, every value but these; the API description lists them."""

    def __init__(self, *allowed: Any, why: str = "") -> None:
        self._allowed, self._why = allowed, why

    def _check(self, value: Any) -> Any:
        if any(value == one and type(value) is type(one) for one in self._allowed):
            return value
        shown = " or ".join(repr(one) for one in self._allowed)
        context = {"why": f"only {shown} is supported{self._why}"}
        raise PydanticCustomError("not_supported", "{why}", context)

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": list(self._allowed)}


def at_most(count: int) -> BeforeValidator:
    """Refuse a larger object before its entries are looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > count:
            context = {"why": f"at most {count} entries are taken, this has {len(value)}"}
            raise PydanticCustomError("too_many", "{why}", context)
        return value

    return BeforeValidator(check)


class Ask(BaseModel):
    """Base of every request object: strict types, no unknown field, null asks for nothing."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, data: Any) -> Any:
        if isinstance(data, dict):
            unknown = [name for name in data if name not in cls.model_fields]
            if len(unknown) > MAX_UNKNOWN:  # a million of them would be a million error objects
                raise refused(str(unknown[0])[:64], f"{len(unknown)} fields are not honoured")
            return {name: value for name, value in data.items() if value not in (None, [])}
        return data


def _encodable(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("not_text", "holds half a surrogate pair") from None
    return value


def _list_form(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Item = TypeVar("Item")
Many = Annotated[list[Item], Field(fail_fast=True)]  # one fault is enough to know of a long list
Text = Annotated[str, AfterValidator(_encodable)]
ModelName = Annotated[Text, Field(min_length=1, max_length=1024)]
StopText = Annotated[Text, Field(min_length=1, max_length=1024)]
StopTexts = Annotated[list[StopText], BeforeValidator(_list_form), Field(max_length=4)]
Metadata = Annotated[dict[str, str], at_most(MAX_METADATA)]

"""Where settings come from: `CLIPRD_NAME`, or the file that `CLIPRD_NAME_FILE` names, as secrets are mounted into containers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

PREFIX = "CLIPRD_"


class EnvironmentSettings(BaseSettings):
    """Settings from arguments, environment variables and files, in this order of precedence; a variable and its file exclude each other."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003  (pydantic-settings passes all of its own)
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, FilesNamedByVariables(settings_cls)


class FilesNamedByVariables(PydanticBaseSettingsSource):
    """Reads `database_url` from the file that `CLIPRD_DATABASE_URL_FILE` names, and so on; the line end at its end doesn't count.

    pydantic-settings' own `secrets_dir` takes a file that isn't there for a setting that isn't made, and its default in place: a service
    whose secret was not mounted would start with an empty SQLite. Here that is an error.
    """

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:  # noqa: ARG002  (as the base class has it)
        """
        Raises:
            SettingsError: the variable is set as well, or the file can't be read or is empty.
        """
        variable = f"{PREFIX}{field_name}".upper()
        file_variable = f"{variable}_FILE"
        name = os.environ.get(file_variable)
        if name is None:
            return None, field_name, False
        if variable in os.environ:
            raise SettingsError(f"{variable} and {file_variable} are both set; unset one of them")
        try:
            value = Path(name).read_text(encoding="utf-8").removesuffix("\n").removesuffix("\r")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise SettingsError(f"{file_variable}: {name!r} can't be read ({reason}); name a file that holds the value") from error
        if not value:
            raise SettingsError(f"{file_variable}: {name!r} is empty; write the value into it")
        return value, field_name, False

    def __call__(self) -> dict[str, Any]:
        found = {name: self.get_field_value(field, name)[0] for name, field in self.settings_cls.model_fields.items()}
        return {name: value for name, value in found.items() if value is not None}

"""Errors that speak to the user: what is wrong, where, and what to do about it."""


class InputError(ValueError):
    """Something the user gave is wrong. The command line prints it as one line and exits with status 2."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(InputError):
    """A configuration value that cannot be. `key` is the dotted name of the field, from where the reader stands."""

    def __init__(self, key: str, message: str, hint: str = "") -> None:
        super().__init__(f"`{key}`: {message}", hint)
        self.key = key
        self.reason = message

    def inside(self, prefix: str) -> "ConfigError":
        """The same error, told from outside the section `prefix`."""
        return ConfigError(f"{prefix}.{self.key}" if self.key else prefix, self.reason, self.hint)


def check(holds: bool, key: str, message: str, hint: str = "") -> None:
    """Raise a ConfigError about the field `key` unless `holds`."""
    if not holds:
        raise ConfigError(key, message, hint)


def check_positive(config: object, *keys: str) -> None:
    """Raise a ConfigError unless each named field of `config` is above zero."""
    for key in keys:
        value = getattr(config, key)
        check(value > 0, key, f"{value} must be above 0")


def check_not_negative(config: object, *keys: str) -> None:
    """Raise a ConfigError if a named field of `config` is below zero."""
    for key in keys:
        value = getattr(config, key)
        check(value >= 0, key, f"{value} must not be negative")

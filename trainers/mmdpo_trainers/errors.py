"""The errors that are the user's to mend: the command line prints their one line, without a traceback."""

from __future__ import annotations


class MmdpoError(ValueError):
    """Base of every error whose message names what was wrong, what was expected and the remedy."""


class ConfigError(MmdpoError):
    """A configuration file or flag that is not valid."""


class RunFolderError(MmdpoError):
    """A run folder that cannot be continued, read or locked."""


class DataError(MmdpoError):
    """Input data of which nothing can be used."""


class StageError(MmdpoError):
    """A stage that cannot run on what it was given."""


class StaleCacheError(MmdpoError):
    """Stored results that belong to something else than what they are asked for."""

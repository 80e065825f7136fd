"""Every error a user of cpo-arabic can cause or meet.

::

    CPOArabicError
    ├── ConfigError          a value, key, variable or flag of the configuration (one or many problems)
    ├── DataError            a file, row or column of the preference data
    ├── ModelError           a model, tokenizer or adapter that cannot be loaded or does not fit
    ├── RunDirectoryError    an output directory that is used, read-only or outside its place
    ├── CheckpointError      a checkpoint that is missing, damaged or of another run
    └── TrainingError        a run that cannot go on (non-finite numbers, no memory)

The message is complete by itself: what, where, the value, the rule, the remedy. The command line
shows it without a traceback and exits with status 2.
"""

from __future__ import annotations


class CPOArabicError(Exception):
    """Base of all errors that are reported to the user by message alone."""


class ConfigError(CPOArabicError, ValueError):
    """The configuration cannot be used. See :mod:`cpo_arabic.config` for the problems it carries."""


class DataError(CPOArabicError, ValueError):
    """The preference data cannot be used."""


class ModelError(CPOArabicError, ValueError):
    """A model, tokenizer or adapter cannot be loaded, or does not fit the configuration."""


class RunDirectoryError(CPOArabicError, OSError):
    """The output directory cannot be used."""


class CheckpointError(CPOArabicError, ValueError):
    """A checkpoint cannot be resumed from."""


class TrainingError(CPOArabicError, RuntimeError):
    """Training cannot go on."""

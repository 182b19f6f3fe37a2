"""The errors this project raises.

LvmError
├── InputError      a file, record, option or array is missing or invalid
├── IdentityError   two artefacts come from different codecs and must not be combined
├── OutputError     an output folder cannot be written, or was made with other settings
├── TrainingError   a loss or gradient became NaN or infinite
├── DatabaseError   the database cannot be reached, or rejected a command
└── StorageError    object storage cannot be reached, or rejected a request

Messages say what was expected, what was found and what to do. The command line prints them as one line; set
LATENT_TRACEBACK=1 for the traceback.
"""


class LvmError(Exception):
    """Base of all errors a user can act on."""


class InputError(LvmError):
    """A file, record, option or array is missing or invalid."""


class IdentityError(LvmError):
    """Two artefacts come from different codecs and must not be combined."""


class OutputError(LvmError):
    """An output folder cannot be written, or was made with other settings."""


class TrainingError(LvmError):
    """A loss or gradient became NaN or infinite."""


class DatabaseError(LvmError):
    """The database cannot be reached, or rejected a command."""


class StorageError(LvmError):
    """Object storage cannot be reached, or rejected a request."""

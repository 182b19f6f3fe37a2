"""Every error this project raises on purpose.

LvmError
├── InputError      a file, record, option or array is not what it must be
├── IdentityError   two artefacts come from different codecs and may not be joined
├── OutputError     an output directory was made with other settings, or is half written
├── TrainingError   a loss or a gradient is no longer a number
├── DatabaseError   the database does not answer, or refuses
└── StorageError    object storage does not answer, or refuses

Messages say what was expected, what came, and what to do. The command line prints them as one line;
set LATENT_TRACEBACK=1 to see where they came from.
"""


class LvmError(Exception):
    """Base of all errors a user can act on."""


class InputError(LvmError):
    """A file, record, option or array is not what it must be."""


class IdentityError(LvmError):
    """Two artefacts come from different codecs and may not be joined."""


class OutputError(LvmError):
    """An output directory was made with other settings, or is half written."""


class TrainingError(LvmError):
    """A loss or a gradient is no longer a number."""


class DatabaseError(LvmError):
    """The database does not answer, or refuses."""


class StorageError(LvmError):
    """Object storage does not answer, or refuses."""

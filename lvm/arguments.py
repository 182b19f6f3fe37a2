"""Checks of what users pass to the public functions: an InputError says what was expected and what was got."""

import operator
from typing import TYPE_CHECKING, Any

from lvm.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def whole(name: str, value: Any, least: int = 1, most: int | None = None, otherwise: str = "") -> int:
    """The integer `value`, from `least` to `most`; NumPy's integers are taken, True, 1.5 and "1" are not.

    otherwise: what else may be given, for the message (", or None"). Raises InputError.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        limits = f"{least} or more" if most is None else f"{least} to {most}"
        raise InputError(f"{name} is {value!r}; expected an integer of {limits}{otherwise}")
    return number


def floats(what: str, value: Any, expected: str) -> "NDArray[np.float32]":
    """Numbers as a C-contiguous float32 array of any shape. expected: what they should be, for the message.

    Raises InputError on anything but numbers: texts, ragged lists, generators.
    """
    import numpy as np

    try:
        given = np.asarray(value)
        if given.dtype.kind not in "fiu":
            raise TypeError(f"{given.dtype} values" if given.ndim else f"{type(value).__name__}")
        return np.ascontiguousarray(given, np.float32) if given.ndim else given.astype(np.float32)
    except (TypeError, ValueError, RuntimeError) as err:
        raise InputError(f"got {type(value).__name__} as {what} ({err}); expected {expected}") from err

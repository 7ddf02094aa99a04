# SPDX-License-Identifier: Apache-2.0
"""The exception types, each with the situation it stands for.

Every message has five parts: subject, value, constraint, place, remedy. `compose` puts them in order, so that
all messages of the library read alike.
"""

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "InputError",
    "QuattuorError",
    "UnsupportedError",
    "compose",
]


class QuattuorError(Exception):
    """Base of every error that Quattuor raises on purpose."""


class InputError(QuattuorError, ValueError):
    """A value that no part of Quattuor could accept: a wrong width, shape, name, path or range."""


class UnsupportedError(QuattuorError):
    """A sensible request that is not implemented; the message names the nearest thing that is."""


class CalibrationError(QuattuorError):
    """Data that cannot support the method: too short, empty, not finite."""


class CheckpointError(QuattuorError):
    """Files that do not hold what they promise: missing, truncated, altered, or of another model."""


def compose(*, subject: str, value: object, constraint: str, place: str, remedy: str) -> str:
    """Join the five parts of an error message.

    Args:
        subject: What is wrong, usually the name of an argument.
        value: The offending value, shown with `repr` unless it is a string.
        constraint: What the value violates, as a verb phrase ("does not divide in_features=4096").
        place: Where: a layer, a file, a function.
        remedy: What to do, as an imperative ("use 32, 64 or 128").
    """
    shown = value if isinstance(value, str) else repr(value)
    return f"{place}: {subject}={shown} {constraint}; {remedy}"

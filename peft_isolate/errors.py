"""The errors this library raises for a user's mistake: the value, the reason, the remedy.

They are `ValueError`s, so code that already guards a PEFT call with `except ValueError` keeps working.
"""


class IsolateError(ValueError):
    """Base of every error that `peft_isolate` raises on purpose."""


class RegionError(IsolateError):
    """A region does not fit: the model, another region, or itself."""


class FormatError(IsolateError):
    """A file is not what it claims to be: truncated, altered, or of an unknown format."""


class BaseMismatchError(IsolateError):
    """An adapter's base is another model than the one at hand, as far as its fingerprint can tell."""

"""The project's own error type: a user's mistake or a damaged file, told in one line."""


class SaegridError(ValueError):
    """A mistake that the user can mend. Its message is one line; no traceback is shown for it.

    In a notebook the cell shows the message alone (`_render_traceback_` is IPython's hook for that),
    and papermill ends its stderr with it.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class ConfigError(SaegridError):
    """A parameter that is unknown, of the wrong type, out of range, or at odds with another."""


class StoreError(SaegridError):
    """An activation store that is missing, damaged or made from other parameters."""


class SaeFileError(SaegridError):
    """An SAE file that can't be read, or does not hold what it says."""

"""The two ways a run can fail, and the exit status each one gives."""


class _OneLine(Exception):
    """Its message, in which what a file said cannot break the line or steer a terminal."""

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


class RefusedError(_OneLine):
    """Input or flags are not usable; nothing was written. Exit status 2. The message is one line:
    file, fault, remedy."""


class TaskError(_OneLine):
    """A task failed while copying; nothing was published. Exit status 3. The message names file,
    tensor and reason."""

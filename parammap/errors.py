"""The two ways a run can fail, and the exit status each one gives."""


class RefusedError(Exception):
    """Input or flags are not usable; nothing was written. Exit status 2. The message is one line:
    file, fault, remedy."""


class TaskError(Exception):
    """A task failed while copying; nothing was published. Exit status 3. The message names file,
    tensor and reason."""

"""What ends a build."""


class BuildError(ValueError):
    """The build cannot go on; the message names the next step."""

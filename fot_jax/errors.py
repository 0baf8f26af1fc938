"""The one exception that bad input raises."""


class UserError(ValueError):
    """Bad input or a full disk: what is wrong, where, and how to mend it, in one line.

    The command line prints the message and exits with code 2.
    """

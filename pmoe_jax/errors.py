"""The one error type that users see: a message, no traceback."""


class PmoeError(Exception):
    """Bad input from the user: config, data, checkpoint or command line.

    The message is one line that names what was wrong, what is allowed and what
    to do. The command line prints it and exits with `exit_code`; library users
    catch it like any exception.
    """

    exit_code = 2

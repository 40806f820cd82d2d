"""The one exception that means: the input is at fault, not the program."""


class InputError(Exception):
    """Bad input from the user. The message is one line - what was found, what was expected, what to do.

    Entry points print it without a traceback and end with exit code 2.
    """

"""What only an extra of the package installs, asked for before any work is done."""

import importlib.util

from chtconv.errors import ConfigurationError


def need(what: str, *packages: str, extra: str) -> None:
    """Refuses where one of the packages is not installed.

    Args:
        what: what needs them, as the sentence begins that says so.
        packages: names to import them by.
        extra: of this package, that installs them.

    Raises:
        ConfigurationError: naming the first that is missing, and the way to get it.

    >>> need("it", "no_such_package", extra="plot")
    Traceback (most recent call last):
    chtconv.errors.ConfigurationError: it needs no_such_package, which is not installed: pip install 'chtconv[plot]'
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ConfigurationError(f"{what} needs {package}, which is not installed: pip install 'chtconv[{extra}]'")

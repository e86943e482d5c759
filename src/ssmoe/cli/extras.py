"""Optional packages, asked for where a command needs them."""

from importlib.util import find_spec


def require(package: str, extra: str) -> None:
    """Raise ModuleNotFoundError with the remedy where a package is not installed."""
    if find_spec(package) is None:
        raise ModuleNotFoundError(f"this needs {package}: pip install 'ssmoe[{extra}]'", name=package)

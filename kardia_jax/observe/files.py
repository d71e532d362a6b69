"""Small files that are complete or are not there."""

import os
import pathlib


def write_whole(path: pathlib.Path, text: str) -> None:
    """Writes beside the target and renames, so that a full disk or a kill leaves the old file or none.

    Raises OSError with the path when it cannot.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, "utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error

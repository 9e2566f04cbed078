"""Access to the cache, local folders and the Hub; each failure is reported in one line."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import socket
import stat
import sys
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from saegrid.errors import ConfigError, DiskError, first_line
from saegrid.storage.atomic import disk_errors, write_text

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
SMALL = 64 << 20
"""Files up to this many bytes are hashed each time; hashes of larger ones are cached."""
HUB_TIMEOUT = 3.0
"""Seconds to wait when checking whether the Hub can be reached."""


def expanded(path: str) -> Path:
    """A path with its leading `~` or `~user` expanded. Raises `ValueError` if there is no such home folder."""
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise ValueError("there is no such home folder; name the whole path, or ./~ for a folder of that name")
    return Path(found)


def can_write(path: Path) -> bool:
    """Whether a folder, or its nearest existing parent, is writable."""
    existing = next((part for part in (path, *path.parents) if os.path.exists(part)), path)
    return os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK)


def cache_dir() -> Path:
    """Folder for what is fetched or converted once: `SAEGRID_CACHE`, else `~/.cache/saegrid`.

    Without a writable home, it is a folder under the system's temporary one, and a message says so.
    """
    given = os.environ.get("SAEGRID_CACHE")
    try:
        folder = expanded(given or "~/.cache/saegrid")
    except ValueError as error:
        if given:
            raise ConfigError(f"SAEGRID_CACHE = {given!r}: {error}") from None
        return _temporary_cache()
    return folder if given or can_write(folder) else _temporary_cache()


def own_cache_dir() -> Path:
    """`cache_dir`, or the temporary cache if that is a shared folder which this user may only read."""
    return folder if can_write(folder := cache_dir()) else _temporary_cache()


@functools.cache
def _temporary_cache() -> Path:
    """This user's cache under the system's temporary folder. Raises `DiskError` if another user owns it."""
    folder = Path(tempfile.gettempdir()) / f"saegrid-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"
    with disk_errors(folder), contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700, parents=True)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or (hasattr(os, "getuid") and facts.st_uid != os.getuid()):
        raise DiskError(f"{folder}: belongs to somebody else; set SAEGRID_CACHE to a folder that you can write to")
    print(f"the cache is not writable: using {folder}; SAEGRID_CACHE sets another", file=sys.stderr, flush=True)
    return folder


def local_folder(parameter: str, name: str) -> Path | None:
    """The local folder that a parameter names, or None if it can only be a Hub id.

    Raises:
        ConfigError: neither an existing folder nor in the form of a Hub id.
    """
    try:
        path = expanded(name)
    except ValueError as error:
        raise ConfigError(f"{parameter} = {name!r}: {error}") from None
    if path.is_dir():
        return path
    if path.exists():
        raise ConfigError(f"{parameter} = {name!r}: a file; must be a folder or a Hub id")
    if not HUB_ID.fullmatch(name):
        raise ConfigError(f"{parameter} = {name!r}: no such folder")
    return None


def files_sha256(paths: Sequence[Path]) -> str:
    """SHA-256 of the files' concatenated contents, in the given order, as `cat … | sha256sum` gives it.

    If one is large, as weights are, the hash is cached under the files' path, device, inode, size, mtime and ctime.
    The ctime can't be set back.
    """
    stats = [path.stat() for path in paths]
    if all(one.st_size <= SMALL for one in stats):
        return _sha256(paths)
    facts = [
        (str(path.resolve()), one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns)
        for path, one in zip(paths, stats, strict=True)
    ]
    name = hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
    for folder in dict.fromkeys((cache_dir(), own_cache_dir())):
        with contextlib.suppress(OSError):
            if len(known := (folder / "hashes" / name).read_text(encoding="utf-8")) == 64:
                return known
    digest = _sha256(paths)
    with contextlib.suppress(DiskError):  # a full disk: computed again next time
        write_text(own_cache_dir() / "hashes" / name, digest)
    return digest


def _sha256(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


@contextlib.contextmanager
def hub_errors(parameter: str, name: str, revision: str = "") -> Iterator[None]:
    """Read from the Hub inside this block: its own errors become one line.

    If the Hub can't be reached, the block runs in the Hub library's offline mode: cached files are used at once,
    others fail at once.

    Raises:
        ConfigError: names the parameter, its value and what the Hub said.
    """
    from huggingface_hub import constants, errors

    offline, reachable = constants.HF_HUB_OFFLINE, not constants.HF_HUB_OFFLINE and _reachable(constants.ENDPOINT)
    constants.HF_HUB_OFFLINE = not reachable
    where = f"{parameter} = {name!r}"
    try:
        yield
    except errors.GatedRepoError:
        raise ConfigError(f"{where}: gated: accept its terms on the Hub, then log in (`hf auth login`)") from None
    except errors.RepositoryNotFoundError:
        raise ConfigError(
            f"{where}: no such folder here, and no such repository on the Hub (a private one needs `hf auth login`)"
        ) from None
    except errors.RevisionNotFoundError:
        raise ConfigError(f"{parameter}_revision = {revision!r}: the Hub's {name} has no such revision") from None
    except errors.HFValidationError:
        raise ConfigError(f"{where}: no such folder, and not a Hub id (name or organisation/name)") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError) as error:
        why = "HF_HUB_OFFLINE is set" if offline else "the Hub can't be reached"
        if reachable:  # the Hub's client reports other failures as "not in the cache"
            why = f"the Hub answered: {first_line(error.__cause__ or error)}"
        raise ConfigError(f"{where}: no such folder, not in the Hub's local cache, and {why}") from None
    except errors.EntryNotFoundError as error:
        raise ConfigError(f"{where}: a file is missing on the Hub: {first_line(error)}") from None
    except errors.HTTPError as error:
        raise ConfigError(f"{where}: the Hub answered: {first_line(error)}") from None
    finally:
        constants.HF_HUB_OFFLINE = offline


def _reachable(endpoint: str) -> bool:
    """Whether the Hub's host accepts connections; assumed if a proxy is set."""
    url = urllib.parse.urlsplit(endpoint)
    if urllib.request.getproxies().get(url.scheme):
        return True
    try:
        port = url.port or (80 if url.scheme == "http" else 443)
        socket.create_connection((url.hostname, port), timeout=HUB_TIMEOUT).close()
    except OSError:
        return False
    return True

"""Who may do what, and what a name or path may be."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Iterable
from pathlib import Path

from peftk.checkpoints.files import CONFIG_FILE
from peftk.checkpoints.peft import WEIGHTS_FILE
from peftk.serve.http.errors import APIError

ADMIN_PATHS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
OPEN_PATHS = ("/health",)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Keys:
    """The secrets that requests show as `Authorization: Bearer SECRET`.

    Args:
        api: for every endpoint but /health and those of admins; None lets everybody in.
        admin: for the endpoints that load and unload adapters; None closes these.

    Raises ValueError for a secret of fewer than 8 characters, or with others than printable ASCII.
    """

    def __init__(self, api: str | None = None, admin: str | None = None) -> None:
        for name, secret in (("api key", api), ("admin token", admin)):
            if secret is not None and not (len(secret) >= 8 and secret.isascii() and secret.isprintable()):
                raise ValueError(f"{name}: expected 8 or more printable ASCII characters, got others, or fewer")
        self._api, self._admin = (None if secret is None else _digest(secret.encode()) for secret in (api, admin))

    @property
    def guarded(self) -> bool:
        """Whether requests need the API key."""
        return self._api is not None

    def check(self, path: str, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Raises APIError if a request with these headers must not have this path."""
        if path in OPEN_PATHS:
            return
        expected = self._api
        if path in ADMIN_PATHS:
            expected = self._admin
            if expected is None:
                raise APIError(403, "This server was started without an admin token.", code="admin_off")
        if expected is None:
            return
        given = [value for name, value in headers if name == b"authorization"]
        scheme, _, secret = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        # of digests, which are equally long: the time tells nothing about the secret
        same = hmac.compare_digest(_digest(secret.strip()), expected)
        if scheme.lower() != b"bearer" or not same:
            raise APIError(401, "Expected a valid key in the header Authorization: Bearer.", code="invalid_api_key")


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()


def check_new_name(name: str) -> None:
    """Raises APIError unless a client may give an adapter this name: letters, digits, '.', '_', '-', 128 at most."""
    if not _NAME.fullmatch(name):
        raise APIError(
            400, "lora_name: expected 1 to 128 letters, digits, '.', '_' or '-', the first no sign", param="lora_name"
        )


def checkpoint_folder(root: Path, path: str) -> Path:
    """The folder of a checkpoint inside `root` that a client names, with all links followed.

    Raises APIError if it, or a file of the checkpoint, lies elsewhere, whether or not there is anything.
    """
    outside = APIError(400, "lora_path: expected a folder inside of the adapters folder", param="lora_path")
    if not path or not path.isprintable() or "\\" in path:
        raise outside
    try:
        top = root.resolve(strict=True)
        folder = Path(os.path.realpath(top / path))
        inside = [folder, *(Path(os.path.realpath(folder / name)) for name in (CONFIG_FILE, WEIGHTS_FILE))]
    except (OSError, ValueError):
        raise outside from None
    if folder == top or not all(one.is_relative_to(top) for one in inside):
        raise outside
    return folder

"""Whether the Hugging Face hub answers: without it, its client retries for a minute and more."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

NOT_HERE = "the hub does not answer, and its cache on this machine does not have it"
PATIENCE = 5.0  # seconds
PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


def hub_answers() -> bool:
    """Whether the hub's host accepts a connection; behind a proxy, assumed."""
    from huggingface_hub import constants

    if any(os.environ.get(name) for name in PROXIES):
        return True
    place = urlsplit(constants.ENDPOINT)
    port = place.port or (443 if place.scheme == "https" else 80)
    try:
        socket.create_connection((place.hostname or "", port), PATIENCE).close()
    except OSError:
        return False
    return True


@contextmanager
def cache_if_unreachable() -> Iterator[bool]:
    """Within the context, files of the hub come from its cache at once if the hub does not answer.

    Yields whether it does.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    online = not before and hub_answers()
    constants.HF_HUB_OFFLINE = not online
    try:
        yield online
    finally:
        constants.HF_HUB_OFFLINE = before

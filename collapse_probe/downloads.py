"""Downloads that fail at once, in one line: libraries retry an absent network for minutes."""

from __future__ import annotations

import contextlib
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from collapse_probe.errors import CollapseProbeError

PATIENCE = 5.0  # seconds until a host that does not answer counts as absent


def first_line(error: BaseException) -> str:
    """The error's type and the first line of its text, at most 200 characters."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


@contextlib.contextmanager
def fetching(what: str, raises: type[CollapseProbeError], way_out: str, *, hub: bool) -> Iterator[None]:
    """Turn a failed download within the block into one error of the type `raises`.

    With `hub` the Hugging Face hub is asked once whether it answers; if it does not, the hub library's own
    offline switch is on for the length of the block: what is cached loads, what is not fails at once.
    """
    with hub_offline_if_silent() if hub else contextlib.nullcontext(True) as answers:
        try:
            yield
        except Exception as error:
            if not _from_network(error):
                raise
            why = first_line(error)
            if not answers:
                why = "no network: the model hub does not answer"
            elif isinstance(error, urllib.error.URLError) and not isinstance(error, urllib.error.HTTPError):
                why = f"no network: {error.reason}"
            raise raises(f"cannot fetch {what} ({why}); {way_out}") from error


def _from_network(error: BaseException | None) -> bool:
    """Whether the error is an OSError, as all download errors are, or comes from one."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error is not None


@contextlib.contextmanager
def hub_offline_if_silent() -> Iterator[bool]:
    """Yields whether the hub answers; while it does not, `huggingface_hub` stays off the network."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    answers = not before and _hub_answers(constants.ENDPOINT)
    constants.HF_HUB_OFFLINE = not answers
    try:
        yield answers
    finally:
        constants.HF_HUB_OFFLINE = before


def _hub_answers(endpoint: str) -> bool:
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=PATIENCE)
    except Exception:  # the client's error types differ between its versions
        return False
    return True


def check_url(url: str, cached: Path) -> None:
    """Raise OSError within seconds if `url` does not answer and there is no `cached` file."""
    if not cached.exists():
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PATIENCE).close()

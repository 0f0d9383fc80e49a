"""What stands between a run and a file that is there: a store that refuses, a machine that cannot read.

None of it says anything about the bytes of the file, so none of it may become a fact about a shard. A driver
translates what a store answers, often into an OSError that looks like one that passes; the answer itself is kept as
the cause of it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping

from tarsift.operators.errors import AGAIN, AccessError, StoreError, TarsiftError

# HTTP answers that stay the same however often one asks, unless their code says otherwise.
REFUSING = (301, 400, 401, 403)
PASSING = ("Timeout", "IncompleteBody", "Digest", "SHA256Mismatch", "SlowDown", "Throttl", "LimitExceeded", "TooMany")
# Credentials that were good when the run began. A request without a body (HEAD) is told a number for a code.
EXPIRED = ("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired", "400", "401")
# Errors of drivers that are not installed everywhere, by name: there is nothing to ask the store with.
UNCREDENTIALED = ("Credential", "ProfileNotFound", "RefreshError")
HTTP_CLIENTS = ("aiohttp", "botocore", "aiobotocore", "urllib3", "http")

_REGION = "check the region (AWS_DEFAULT_REGION) and the endpoint (AWS_ENDPOINT_URL)"
_RENEW = "renew the credentials (AWS_SESSION_TOKEN and its keys)"
CHECKS = {
    "InvalidAccessKeyId": "check the access key (AWS_ACCESS_KEY_ID, or the profile) and the endpoint",
    "SignatureDoesNotMatch": "check the secret key (AWS_SECRET_ACCESS_KEY)",
    "InvalidToken": "check AWS_SESSION_TOKEN: it must belong to the keys; unset it if they are no temporary ones",
    "AuthorizationHeaderMalformed": _REGION,
    "PermanentRedirect": _REGION,
    "301": _REGION,
    "RequestTimeTooSkewed": "set the clock of this machine",
    "AccessDenied": "the credentials are known but must not do this: check what they may read, list and write",
    "400": f"{_RENEW} if they have expired, and {_REGION}",
    **dict.fromkeys(EXPIRED[:4], _RENEW),
}
CHECK_ALL = "check credentials, region and endpoint (`tarsift doctor URL`)"


def refusal(error: BaseException) -> str | None:
    """Return the code by which a store refuses, or why it cannot be asked; None for any other error.

    `ExpiredToken` or `AccessDenied` where the store says so, else the number of its answer or the error's name.
    """
    name = type(error).__name__
    if any(part in name for part in UNCREDENTIALED):
        return name
    for cause in _causes(error):
        code, status = _answer(cause)
        if status in REFUSING and not any(part in code for part in PASSING):
            return code
    return name if isinstance(error, PermissionError) else None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _answer(error: BaseException) -> tuple[str, int | None]:
    """Return code and HTTP status of the answer that an error was made of; ("", None) if of none."""
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        code = str(response.get("Error", {}).get("Code") or status)
    else:  # aiohttp; requests and httpx; gcsfs: other errors have a `code` that no store has answered
        answers = [getattr(error, "status", None), getattr(response, "status_code", None)]
        answers += [getattr(error, "code", None)] if type(error).__name__ == "HttpError" else []
        status = next((answer for answer in answers if isinstance(answer, int)), None)
        code = str(status)
    return (code, status) if isinstance(status, int) else ("", None)


def refused(doing: str, error: BaseException, code: str) -> TarsiftError:
    """Return the error that ends a run because a store refuses: `code` is that of `refusal`.

    Args:
        doing: `read s3://bucket/a.tar`.
    """
    told = f"cannot {doing}: {said(error)}; {CHECKS.get(code, CHECK_ALL)}"
    return StoreError(f"{told}; {AGAIN}") if code in EXPIRED else AccessError(f"{told}.")


def unread(url: str, error: OSError) -> TarsiftError:
    """Return the error that ends a run because a shard that was listed cannot be read now."""
    told = f"cannot read the shard {url}: "
    code = refusal(error)
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return StoreError(f"{told}it was listed, and is gone; put it back, or mount again what holds it; {AGAIN}")
    if code == "PermissionError":
        return AccessError(f"{told}{said(error)}; let this user read it; {AGAIN}")
    if code is not None:
        return refused(f"read the shard {url}", error, code)
    if error.errno in (errno.EMFILE, errno.ENFILE):
        remedy = "too many files are open: raise the limit (`ulimit -n`)"
    else:
        remedy = "see to its disk, network file system or mount, or copy the file elsewhere"
    return StoreError(f"{told}{said(error)}; {remedy}; {AGAIN}")


def of_a_client(error: BaseException) -> bool:
    """Tell whether an error comes from the HTTP client of a driver; some of those are a ValueError as well."""
    return type(error).__module__.partition(".")[0] in HTTP_CLIENTS


def said(error: BaseException) -> str:
    """Return the first line of an error, behind the store's code for it if there is one, else behind its name."""
    code, name, text = refusal(error) or "", type(error).__name__, str(error)
    if code and code != name and not code.isdigit():
        name, text = code, getattr(error, "strerror", None) or text  # its number was chosen by the driver
    return f"{name}: {(text.splitlines() or [''])[0]}"

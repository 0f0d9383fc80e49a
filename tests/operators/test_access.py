"""What a store answers, as drivers translate it: which of it is a refusal, and what is to be checked."""

from __future__ import annotations

import errno
import pickle

import pytest

from tarsift.operators.access import CHECKS, refusal, refused, unread
from tarsift.operators.errors import AccessError, StoreError

ClientError = pytest.importorskip("botocore.exceptions").ClientError
ClientPayloadError = pytest.importorskip("aiohttp.client_exceptions").ClientPayloadError
ContentLengthError = pytest.importorskip("aiohttp.http_exceptions").ContentLengthError
translated = pytest.importorskip("s3fs.errors").translate_boto_error


def answered(code: str, status: int) -> Exception:
    """Return what s3fs raises for an answer of S3."""
    said = {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translated(ClientError(said, "GetObject"))


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("InvalidAccessKeyId", 403),
        ("SignatureDoesNotMatch", 403),
        ("AccessDenied", 403),
        ("RequestTimeTooSkewed", 403),
        ("ExpiredToken", 400),
        ("InvalidToken", 400),
        ("AuthorizationHeaderMalformed", 400),
        ("PermanentRedirect", 301),
        ("400", 400),  # a HEAD request with an expired token
        ("403", 403),
        ("SomethingNewOfAnotherStore", 403),
    ],
)
def test_refusals_of_s3(code: str, status: int):
    error = answered(code, status)
    assert refusal(error) == code
    told = refused("read s3://b/x", error, code)
    assert type(told) is (StoreError if code in ("ExpiredToken", "400") else AccessError)
    assert "cannot read s3://b/x" in str(told)
    assert CHECKS.get(code, "tarsift doctor URL") in str(told)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("SlowDown", 503),
        ("InternalError", 500),
        ("ServiceUnavailable", 503),
        ("RequestTimeout", 400),
        ("IncompleteBody", 400),
        ("BadDigest", 400),
        ("ThrottlingException", 400),
        ("RequestLimitExceeded", 400),
        ("NoSuchKey", 404),
        ("404", 404),
        ("OperationAborted", 409),
        ("PreconditionFailed", 412),
        ("TooManyRequests", 429),
    ],
)
def test_answers_that_are_none(code: str, status: int):
    assert refusal(answered(code, status)) is None


class HttpError(Exception):
    """Stands for gcsfs's, which has the number as `code`, and for aiohttp's, which has it as `status`."""

    def __init__(self, **values: int) -> None:
        super().__init__("no")
        self.__dict__ |= values


def test_other_drivers():
    assert refusal(HttpError(code=403)) == refusal(HttpError(status=403)) == "403"
    assert refusal(HttpError(code=503)) is None
    assert refusal(HttpError(code=None)) is None  # type: ignore[arg-type]
    assert refusal(type("NoCredentialsError", (Exception,), {})()) == "NoCredentialsError"
    assert refusal(PermissionError("no")) == "PermissionError"
    assert refusal(OSError(errno.EIO, "broken")) is None
    assert refusal(ValueError("x")) is None


def test_an_answer_that_broke_off_is_no_refusal():
    """aiohttp gives it the number of an answer that nobody has given."""
    broken = ClientPayloadError("Response payload is not completed")
    broken.__cause__ = ContentLengthError("Not enough data to satisfy content length header")
    assert broken.__cause__.code == 400
    assert refusal(broken) is None


def test_a_refusal_keeps_what_it_says_on_its_way_from_a_worker():
    told = refused("read s3://b/x", answered("ExpiredToken", 400), "ExpiredToken")
    again = pickle.loads(pickle.dumps(told))
    assert (type(again), str(again)) == (StoreError, str(told))
    assert "ExpiredToken: m; renew the credentials" in str(told)


def test_a_shard_that_a_store_refuses_is_named():
    told = unread("s3://b/x.tar", answered("AccessDenied", 403))  # type: ignore[arg-type]
    assert type(told) is AccessError
    assert "cannot read the shard s3://b/x.tar: AccessDenied: m" in str(told)

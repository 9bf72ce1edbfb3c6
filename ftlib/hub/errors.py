"""What the hub answers when something is wrong, as a user's mistake: what it is and what to do about it."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Iterator

from ftlib.core.paths import site_settings
from ftlib.errors import UserError
from ftlib.hub.cache import is_unreachable

_LOGIN = "log in with `hf auth login`, or set HF_TOKEN_PATH to a file of mode 0600 with a token"
_LATER = "Try again later."


@contextlib.contextmanager
def hub_errors(what: str, kind: str, revision: str | None = None, unreachable: str = "") -> Iterator[None]:
    """Turn the hub's errors into plain words; none of them holds the token.

    Args:
        what: begins the message, such as "model google/paligemma-3b-pt-224".
        kind: "model" or "dataset".
        unreachable: the remedy if there is no connection.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        told = _user_error(error, what, kind, revision, unreachable)
        if told is None:
            raise
        raise told from None


def _user_error(error: Exception, what: str, kind: str, revision: str | None, unreachable: str) -> UserError | None:
    from huggingface_hub import errors

    said = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if isinstance(error, errors.GatedRepoError):
        remedy = (
            f"Accept it on the {kind}'s page, then {_LOGIN}. A fine-grained token also needs the permission to read "
            "public gated repositories."
        )
        return UserError(f"{what}: its licence has to be accepted first", remedy)
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"{what}: no revision {revision}")
    if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        return UserError(f"{what}: no such {kind} on the hub: {said}", f"If it is private, {_LOGIN}.")
    if isinstance(error, errors.LocalTokenNotFoundError):
        return UserError(f"{what}: no token of the hub's is here", f"{_LOGIN[0].upper()}{_LOGIN[1:]}.")
    if isinstance(error, UnicodeEncodeError):
        remedy = "Look into HF_TOKEN and the file of HF_TOKEN_PATH: a token is plain ASCII."
        return UserError(f"{what}: the hub's token holds a character that no token has", remedy)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return UserError(f"{what}: HF_HUB_OFFLINE is set, so the hub is not asked", "Unset HF_HUB_OFFLINE to reach it.")
    if _has_bad_certificate(error):
        remedy = "Behind a proxy that opens TLS, set SSL_CERT_FILE to the file with the site's certificates."
        return UserError(f"{what}: the certificate of the hub, or of a proxy, is not trusted here", remedy)
    if isinstance(error, errors.HfHubHTTPError):
        return _http_error(error, what, said)
    if is_unreachable(error):
        return UserError(f"{what}, and the hub cannot be reached: {said}", unreachable)
    if isinstance(error, ValueError) and "Invalid metadata" in str(error):
        reason = " ".join(str(error).split())
        return UserError(f"{what}: the hub refuses its model card: {reason}", "Correct the head of its README.md.")
    if isinstance(error, ValueError):  # what came is no JSON
        endpoint = site_settings().get("HF_ENDPOINT") or "the hub's address"
        problem = f"{what}: {endpoint} answers with something else than the hub's JSON ({said})"
        return UserError(problem, "A network's login page, a proxy, or a wrong HF_ENDPOINT? Open it in a browser.")
    return None


def _http_error(error: Exception, what: str, said: str) -> UserError:
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if status == 401:
        return UserError(f"{what}: the hub does not accept this login (401): {said}", f"To log in anew, {_LOGIN}.")
    if status == 403:
        remedy = "Use a token of an account that may do this, with the permission for it (write, for uploads)."
        return UserError(f"{what}: the hub does not permit it (403): {said}", remedy)
    if 400 <= status < 500 and status not in (408, 429):
        reason = getattr(error, "server_message", None) or said
        return UserError(f"{what}: the hub refuses the request ({status}): {reason}")
    return UserError(f"{what}: the hub fails or is busy ({status}): {said}", _LATER)


def _has_bad_certificate(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError) or "CERTIFICATE_VERIFY_FAILED" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False

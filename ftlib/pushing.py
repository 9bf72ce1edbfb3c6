"""Put a folder on the hub, in one commit."""

from __future__ import annotations

from pathlib import Path

from ftlib import files, hub
from ftlib.errors import UserError
from ftlib.site import site_settings


def push(folder: Path, name: str, private: bool, message: str) -> str:
    """Upload a result folder with its card in one commit, making the repository if need be.

    Args:
        folder: the adapter or model.
        name: OWNER/NAME, or NAME under the user's own.
        message: of the commit.

    Returns:
        The address of the repository.

    Raises:
        UserError: no login, no permission, no connection.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi(endpoint=site_settings().get("HF_ENDPOINT"))
    parts = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != files.MARKER]
    operations = [CommitOperationAdd(str(path.relative_to(folder)), path) for path in parts]
    login = "Log in with `hf auth login`, with a token that may write; run it where the hub can be reached."
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.create_commit(address.repo_id, operations, commit_message=message)
    except Exception as error:
        known = isinstance(error, (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError))
        if not known and not hub.is_unreachable(error):
            raise
        raise UserError(f"{name}: cannot be pushed: {str(error).strip().splitlines()[0]}", login) from None
    return str(address)

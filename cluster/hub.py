"""An exported folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from data_services.schema import RunError, UsageError


def push(folder: Path, repository: str, public: bool = False) -> str:
    """Uploads a folder in one commit to OWNER/NAME, which is made (private, unless `public`) if it isn't there.

    Gives the repository's address. Raises UsageError for a name that none can have, RunError where the hub can't be
    reached or doesn't take it; then nothing of the folder is there.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UsageError(f"--push-to-hub {repository}: {str(error).splitlines()[0]}") from error
    if "/" not in repository:
        raise UsageError(f"--push-to-hub {repository}: write OWNER/NAME")
    without_answer: type[Exception] = HfHubHTTPError.__bases__[0]  # the hub's HTTP library's own error
    api, again = HfApi(), "; the copy is in place, and can be pushed with `hf upload`"
    try:
        made = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export of gyre")
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise RunError(
                f"the hub doesn't let this user write to {repository}: `hf auth login`, or HF_TOKEN{again}"
            ) from error
        raise RunError(f"the hub didn't take {repository}: {str(error).splitlines()[0]}{again}") from error
    except (OSError, without_answer) as error:
        raise RunError(f"the hub can't be reached: {str(error).splitlines()[0]}{again}") from error
    return str(made)

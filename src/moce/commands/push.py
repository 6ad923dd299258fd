"""moce push: an exported folder as a model on the Hugging Face hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

from moce.config import PushSettings
from moce.customization.chart import CHART
from moce.errors import MoceError
from moce.runs.model import WEIGHTS
from moce.runtime.progress import log

CARD = "README.md"
PUSHED = (CARD, "*.json", "*.safetensors", "*.onnx", "*.onnx.data", CHART)
PRIVATE = {"export.json", "inputs.json", "model.json"}  # paths of this machine, not of the model
SNAPSHOT = "from huggingface_hub import snapshot_download\n\nfolder = snapshot_download({repo!r})\n"


@dataclass
class PushResult:
    """repo: the model on the hub; url: its page; files: names of the pushed files."""

    repo: str
    url: str
    files: list[str]

    def summary(self) -> str:
        return f"pushed {', '.join(self.files)} to {self.url}"


def run(settings: PushSettings) -> PushResult:
    _check_name(settings.repo)
    card, files = _card(settings), _files(settings.folder)
    contents: list[tuple[str, str | bytes]] = [(CARD, str(card).encode())]
    contents += [(path.name, str(path)) for path in files]
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    _check_hub(api)
    try:
        repo = api.create_repo(settings.repo, private=settings.private or None, exist_ok=True)
        api.create_commit(
            repo.repo_id,
            [CommitOperationAdd(name, content) for name, content in contents],
            commit_message="Upload a backbone of moce",
        )
    except (HfHubHTTPError, ValueError, OSError) as error:
        raise MoceError(f"the hub refused {settings.repo}: {_one_line(error)}") from None
    return PushResult(repo.repo_id, str(repo), [name for name, _ in contents])


def _check_name(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise MoceError(f"'{repo}' cannot be a name on the hub: {_one_line(error)}") from None


def _files(folder: Path) -> list[Path]:
    """What the hub gets beside the card: the model and what loads it. Names what stays here."""
    found = {path for pattern in PUSHED for path in folder.glob(pattern)}
    found = {path for path in found if path.name not in PRIVATE | {CARD} and path.is_file()}
    if not any(path.suffix in {".safetensors", ".onnx"} for path in found):
        raise MoceError(f"{folder} contains no {WEIGHTS}: push a folder of customize or export")
    rest = sorted(p.name for p in folder.iterdir() if p not in found and p.name != CARD)
    if rest:
        log(f"not pushed: {', '.join(rest)}")
    return sorted(found)


def _card(settings: PushSettings) -> ModelCard:
    """The folder's card, with code that loads from the hub, and the license that was given."""
    path = settings.folder / CARD
    try:
        card = ModelCard(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MoceError(
            f"{settings.folder} has no {CARD}: push a folder of moce customize or moce export"
        ) from None
    except ValueError as error:
        raise MoceError(f"{path} has no valid metadata: {_one_line(error)}") from None
    if settings.license is not None:
        card.data["license"] = settings.license
    card.text = _of_the_hub(card.text, settings.repo)
    return card


def _of_the_hub(text: str, repo: str) -> str:
    """The code of a card, which loads the folder that it is in, with the name of the model on the hub."""
    text = text.replace("THIS_FOLDER", ".")  # cards of earlier versions
    text = text.replace('"local-dir:."', f'"hf-hub:{repo}"')
    text = text.replace('from_pretrained("."', f'from_pretrained("{repo}"')
    text = text.replace('from_pretrained(base, "."', f'from_pretrained(base, "{repo}"')
    if '"./' not in text:
        return text
    text = text.replace('"./', 'folder + "/')
    return text.replace("```python\n", "```python\n" + SNAPSHOT.format(repo=repo), 1)


def _check_hub(api: HfApi) -> None:
    """Raise MoceError unless the hub answers and knows the user."""
    try:
        api.whoami()
    except LocalTokenNotFoundError:
        raise MoceError("not logged in to the hub: run hf auth login, or set HF_TOKEN") from None
    except OfflineModeIsEnabled:
        raise MoceError("HF_HUB_OFFLINE is set: unset it to push to the hub") from None
    except HfHubHTTPError as error:
        raise MoceError(f"the hub does not accept the token: {_one_line(error)}") from None
    except Exception as error:  # of the HTTP library, which depends on the version of the hub's
        if isinstance(error, OSError) or type(error).__module__.startswith(("httpx", "requests")):
            raise MoceError(f"cannot reach the hub {api.endpoint}: {_one_line(error)}") from None
        raise


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())

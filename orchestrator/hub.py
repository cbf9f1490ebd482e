"""Models of the Hugging Face hub, or of the mirror that HF_ENDPOINT names: pinned to a commit, fetched once a node."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from orchestrator.config import Recipe
from orchestrator.errors import UserError
from orchestrator.model_config import ModelConfig, is_hub_model
from orchestrator.runs import run_of

log = logging.getLogger(__name__)

DESCRIPTION = ("*.json", "*.jinja", "merges.txt", "tokenizer.model")
WEIGHTS = ("*.safetensors",)
"""What of a repository is fetched, from its top: weights in safetensors, never in pickles, which run code."""

_COMMIT = re.compile("[0-9a-f]{40}")


def pinned(recipe: Recipe) -> Recipe:
    """The recipe with the commit of its model of the hub: the one that its run began with, so that the same command
    means the same weights.

    Raises:
        UserError: there is no such model or revision, or no way to the hub.
    """
    model = recipe.model
    if not model.path or not is_hub_model(model.path) or model.commit:
        return recipe
    run = run_of(recipe)
    before = run.read_json(run.resolved)
    known = before["recipe"]["model"] if before else {}
    commit = known.get("commit") if known.get("path") == model.path else None
    commit = commit or _commit(model.path)
    log.info("model: %s is commit %s", model.path, commit)
    chosen = model.model_copy(update={"commit": commit})
    return recipe.model_copy(update={"model": chosen})


def model_directory(model: ModelConfig, weights: bool = True) -> Path:
    """Where the files of `model.path` are on this node; a pinned model of the hub is fetched where they are not.

    Every process of a node may call it at once: one of them fetches each file, and a whole copy asks nothing of the
    network.

    Args:
        weights: whether they are needed, or the configuration and the tokenizer alone.
    """
    assert model.path is not None
    if not is_hub_model(model.path):
        return Path(model.path)
    assert model.commit, "a recipe is pinned before it is used"
    from huggingface_hub import snapshot_download

    _quiet()
    name, _ = _parts(model.path)
    files = [*DESCRIPTION, *(WEIGHTS if weights else ())]
    try:
        return Path(snapshot_download(name, revision=model.commit, allow_patterns=files, ignore_patterns="*/*"))
    except Exception as error:
        raise _explained(error, model.path) from error


def _commit(path: str) -> str:
    name, revision = _parts(path)
    if _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    _quiet()
    try:
        found = HfApi().model_info(name, revision=revision).sha
    except Exception as error:
        raise _explained(error, path) from error
    if not found:
        raise UserError(f"model.path={path}: the hub names no commit of it", "give org/name@commit")
    return found


def _quiet() -> None:
    """No line for every request, and no bars in log files."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    for library in ("httpx", "httpx2"):
        logging.getLogger(library).setLevel(logging.WARNING)


def _parts(path: str) -> tuple[str, str]:
    name, _, revision = path.partition("@")
    return name, revision


def _explained(error: Exception, path: str) -> Exception:
    """A failure of the hub as what a user can do about it; one that is none of the hub's as it is."""
    from huggingface_hub import errors

    name, revision = _parts(path)
    if isinstance(error, errors.GatedRepoError):
        hint = "accept them on its page, then hf auth login"
        return UserError(f"model.path: {name} asks for its terms to be accepted", hint)
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = "check the name; for a model that is not public, hf auth login"
        return UserError(f"model.path: the hub has no model {name}", hint)
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"model.path: {name} has no revision {revision}", "give a branch, tag or commit, as in @main")
    if isinstance(error, OSError | errors.HfHubHTTPError) or type(error).__module__.startswith("httpx"):
        message = f"model.path: {path} cannot be fetched from {_endpoint()}: {_first_line(error)}"
        return UserError(message, "HF_ENDPOINT may name a mirror; or download it elsewhere, and give its directory")
    return error


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)

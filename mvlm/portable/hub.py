"""Folders and uploads of trained models for the Hugging Face hub: weights, tokenizer, and a model card."""

import re
from pathlib import Path

from mvlm.errors import ConfigError, RunError
from mvlm.files import new_folder
from mvlm.model.pretrained import HUB_ID, write_model
from mvlm.portable.card import model_card, run_of
from mvlm.portable.folder import TOKENIZER
from mvlm.runs.folder import find_checkpoint
from mvlm.runs.load import load_for_export

CARD = "README.md"


def write_hub_folder(source: Path, out: Path, hub_id: str | None = None, data: Path | None = None) -> None:
    """Write what the hub shows of a model: model.safetensors, config.json, tokenizer.json and the card README.md.

    Args:
        source: a run, or one of its checkpoints.
        out: new or empty folder. After an error there is none.
        hub_id: id owner/name, for the examples of the card. Default: owner/ and the run's name.
        data: folder of the run's training data, if it is no longer where the run's config.json says.

    Raises:
        RunError: there is no such run, or its data's licence cannot be read.
        ConfigError: `hub_id` is not an id.
    """
    if hub_id is not None:
        check_hub_id(hub_id)
    with new_folder(out) as folder:
        run = run_of(source)
        source = find_checkpoint(source)  # once: a run that still trains may write another one meanwhile
        trained = load_for_export(source)
        model, tokenizer = trained.network, trained.tokenizer
        name = re.sub(r"[^\w.-]", "-", run.path.resolve().name, flags=re.ASCII)
        card = model_card(source, model, data, hub_id or f"owner/{name}", trained.sha256)
        write_model(model, folder)
        tokenizer.save(folder / TOKENIZER)
        (folder / CARD).write_text(card, encoding="utf-8")


def upload(folder: Path, hub_id: str, private: bool = False) -> str:
    """Upload a folder that `write_hub_folder` wrote, as one commit. Returns its address.

    The token is the one that `hf auth login` stored, or the variable HF_TOKEN.

    Raises:
        ConfigError: `hub_id` is not an id, or huggingface_hub is not installed.
        RunError: the hub refuses, or is not there. The model on the hub is then unchanged.
    """
    check_hub_id(hub_id)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if CARD not in [path.name for path in files]:
        raise RunError(
            f"{folder}: wanted a folder of `mvlm export --format hub`, found no {CARD} in it; write it first"
        )
    try:
        from huggingface_hub import CommitOperationAdd, HfApi
    except ImportError:
        raise ConfigError("hub: wanted huggingface_hub, which is not installed; pip install 'mvlm[train]'") from None
    try:
        api = HfApi()
        api.create_repo(hub_id, private=private, exist_ok=True)
        additions = [CommitOperationAdd(path.name, str(path)) for path in files]
        done = api.create_commit(hub_id, additions, commit_message="Model, tokenizer and card, written by mvlm export")
    except Exception as error:  # the network's and the hub's, which share no type
        causes = [error, *([error.__cause__] if error.__cause__ else [])]
        reason = "; ".join(f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}" for cause in causes)
        raise RunError(
            f"{hub_id}: wanted to upload {folder}, the hub did not take it ({reason}); log in with `hf auth login`, "
            f"then send the folder, which is complete, with `hf upload {hub_id} {folder}`"
        ) from None
    return str(done.repo_url)


def push_to_hub(
    source: Path, out: Path, hub_id: str, *, private: bool = False, data: Path | None = None, dry_run: bool = False
) -> str | None:
    """Write the folder and upload it. Returns its address on the hub; None after a dry run, which only writes.

    The arguments and errors are those of `write_hub_folder` and `upload`.
    """
    write_hub_folder(source, out, hub_id, data)
    return None if dry_run else upload(out, hub_id, private)


def check_hub_id(hub_id: str) -> None:
    """ConfigError unless it has the form owner/name."""
    if not HUB_ID.fullmatch(hub_id):
        raise ConfigError(f"push-to: wanted an id OWNER/NAME on the hub, got {hub_id!r}")

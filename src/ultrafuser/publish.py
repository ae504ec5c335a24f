"""Push a fused folder to the hub as one commit: its own files, a model card, and references to specialists that the hub has."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ultrafuser.errors import CheckpointError, MissingExtraError, UltraFuserError
from ultrafuser.model.card import MARK, hub_sources, model_card
from ultrafuser.model.checkpoint import fused_folder, read_manifest
from ultrafuser.model.configuration_ultrafuser import UltraFuserConfig
from ultrafuser.model.files import METADATA, model_files
from ultrafuser.model.hub import is_commit
from ultrafuser.model.manifest import REVISIONS, FileRecords, SourceKey, SpecialistEntry, weight_sources
from ultrafuser.model.references import PACKAGE, check_files, is_inside, resolve
from ultrafuser.model.saving import GATE_FILE, TOKENIZERS
from ultrafuser.recipe import Recipe, load_recipe
from ultrafuser.train.card import training_section
from ultrafuser.train.metrics import METRICS_FILE, read_metrics

CARD, FIGURE, RECIPE = "README.md", "training.png", "recipe.yaml"
_FOLDERS = ("specialists", "bases", TOKENIZERS)
_LOCAL_PATH = re.compile(r"""(?:^|[\s:'"\[])[/~]\w""", re.MULTILINE)
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Upload:
    """One file: its path in the repository, and the file or the bytes that it holds."""

    path: str
    content: Path | bytes

    @property
    def size_bytes(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass
class Push:
    """A push that is ready to go.

    Attributes:
        uploads: all files, in order of their paths.
        left_out: files of the folder that are no part of a fused model.
        notes: what the user should know.
        keeps_card: the card in the folder was edited, and goes as it is.
    """

    repository: str
    config: UltraFuserConfig
    uploads: list[Upload] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sections: list[str] = field(default_factory=list)
    keeps_card: bool = False

    @property
    def size_bytes(self) -> int:
        return sum(upload.size_bytes for upload in self.uploads)

    def put(self, path: str, content: Path | bytes) -> None:
        """Add a file, or replace it."""
        self.uploads = [upload for upload in self.uploads if upload.path != path] + [Upload(path, content)]
        self.uploads.sort(key=lambda upload: upload.path)


@dataclass(frozen=True)
class Pushed:
    """A commit on the hub. `pull_request` is its address, if one was opened."""

    url: str
    commit: str
    pull_request: str | None


# ---------------------------------------------------------------- what goes


def prepare(folder: str | Path, repository: str, *, copy: bool = False) -> Push:
    """Check a fused folder, and list what a push uploads. Needs no network for a local folder.

    Args:
        repository: `owner/name`.
        copy: also upload specialists that only this machine has.

    Raises:
        CheckpointError: no sound checkpoint, a specialist that only this machine has, or one without a commit.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise CheckpointError(f"{repository!r}: expected the name of a repository on the hub, such as owner/name")
    root = fused_folder(folder)
    config = read_manifest(root)
    tree = json.loads((root / "config.json").read_text(encoding="utf-8"))
    push = Push(repository, config)
    check_files(root, config.gate_files or {}, "the gate", every=True)
    _add_own_files(push, root)
    copied: dict[Path, str] = {}
    for entry, spec in zip(tree["specialists"], config.specialists, strict=True):
        for key, reference in weight_sources(spec["source"]):
            entry["source"] |= _add_source(push, spec, key, reference, root, copy, copied)
            spec["source"] |= entry["source"]  # the card names what the repository holds
        if Path(entry["config"].get("_name_or_path") or "").is_absolute():
            del entry["config"]["_name_or_path"]  # a folder of this machine
    push.put("config.json", (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode())
    _add_card(push, root)
    return push


def _add_own_files(push: Push, root: Path) -> None:
    """The files of the checkpoint. Others in its folder, such as notes and logs, stay here."""
    patterns = (*METADATA, GATE_FILE, "*.py", RECIPE, METRICS_FILE, CARD)
    own = {file for pattern in patterns for file in root.glob(pattern)}
    own |= {file for name in _FOLDERS for file in (root / name).rglob("*") if not file.name.startswith(".")}
    for file in sorted(path for path in root.rglob("*") if path.is_file()):
        path = file.relative_to(root).as_posix()
        if file in own:
            push.put(path, file)
        elif not any(part.startswith(".") for part in file.relative_to(root).parts):
            push.left_out.append(path)


def _add_source(
    push: Push,
    spec: SpecialistEntry,
    key: SourceKey,
    reference: str,
    root: Path,
    copy: bool,
    copied: dict[Path, str],
) -> dict[str, Any]:
    """Check the weights of one specialist. Returns what changes in its source."""
    name, owner = spec["name"], f"specialist {spec['name']!r}"
    path = resolve(reference, root, name)
    if not isinstance(path, Path):
        if not is_commit(spec["source"].get(REVISIONS[key])):
            raise CheckpointError(
                f"{owner}: {reference} has no recorded commit, so a push to it changes this model. Fuse again, or load it and "
                "save it, to record the commit"
            )
        return {}
    recorded: FileRecords = (spec.get("files") or {}).get(key) or {}
    check_files(path, recorded, owner, every=True)
    if is_inside(path, root):
        return {}
    if reference.startswith(PACKAGE) and not copy:
        package = reference.removeprefix(PACKAGE).partition("/")[0]
        push.notes.append(
            f"{owner}: whoever loads the model needs the Python package {package}. --copy uploads its weights"
        )
        return {}
    if not copy:
        raise CheckpointError(
            f"{owner}: only this machine has {reference}. Upload its weights with --copy, or push it to the hub by itself and "
            "fuse with its hub id"
        )
    if path not in copied:
        shelf = "bases" if key == "model" and spec["source"].get("adapter") else "specialists"
        copied[path] = f"{shelf}/{name}" + (f"/{path.name}" if path.is_file() else "")
        if path.is_file():
            push.put(copied[path], path)
        else:
            gguf_file = spec["source"].get("gguf_file") if key == "model" else None
            for file in model_files(path, gguf_file=gguf_file):
                push.put(f"{copied[path]}/{file.relative_to(path).as_posix()}", file)
    return {key: copied[path], REVISIONS[key]: None}


def _add_card(push: Push, root: Path) -> None:
    """The card, unless the folder has one that a person wrote, and the figure of the training."""
    metrics = read_metrics(root / METRICS_FILE)
    recipe: Recipe | None = None
    if metrics and (root / RECIPE).is_file():
        try:
            recipe = load_recipe(root / RECIPE)
        except UltraFuserError as error:  # of another version: the card does without
            push.notes.append(f"{RECIPE} cannot be read, so the card does not describe the training: {error}")
    if (root / RECIPE).is_file() and _LOCAL_PATH.search((root / RECIPE).read_text(encoding="utf-8", errors="replace")):
        push.notes.append(f"{RECIPE} names paths of this machine, which everybody will see. Edit it if they should not")
    figure = _figure(push, metrics)
    push.sections = training_section(recipe, metrics, figure)
    card = root / CARD
    push.keeps_card = card.is_file() and MARK not in card.read_text(encoding="utf-8", errors="replace")
    if push.keeps_card:
        push.notes.append(f"{CARD} was written by hand, and goes as it is")
    else:
        push.put(CARD, card_text(push).encode())


def _figure(push: Push, metrics: Sequence[dict[str, Any]]) -> str | None:
    """Add the figure of losses and gate weights over the training. Returns its file."""
    if not any("loss" in key or key.startswith("gate_weight") for row in metrics for key in row):
        return None
    from ultrafuser.display.drawing import png_bytes
    from ultrafuser.report.figures.training import training_curves

    try:
        push.put(FIGURE, png_bytes(training_curves(metrics), dpi=110))
    except MissingExtraError as error:
        push.notes.append(f"the card has no figure: {error}")
        return None
    return FIGURE


def card_text(push: Push, licence: str | None = None) -> str:
    """The model card of a push."""
    title = push.repository.rpartition("/")[2]
    return model_card(push.config, title=title, address=push.repository, sections=push.sections, licence=licence)


# ---------------------------------------------------------------- the hub


def upload(
    push: Push,
    *,
    message: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> Pushed:
    """Make one commit of a push. Files of an earlier push that this one does not have are removed in the same commit.

    The token is the hub's: `HF_TOKEN`, or the login of `hf auth login`.

    Raises:
        CheckpointError: the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    try:
        repository = api.create_repo(push.repository, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repository, branch=revision, exist_ok=True)
        stored = set(api.list_repo_files(repository, revision=revision))
        _settle_card(api, push, repository, revision, stored)
        paths = {upload.path for upload in push.uploads}
        stale = [path for path in sorted(stored - paths) if path.split("/")[0] in (*_FOLDERS, FIGURE)]
        added = [CommitOperationAdd(upload.path, _content(upload)) for upload in push.uploads]
        commit = api.create_commit(
            repository,
            [*added, *(CommitOperationDelete(path) for path in stale)],
            commit_message=message or "Upload a fused model",
            revision=revision,
            create_pr=create_pr,
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{push.repository}: the hub did not take the model: {reason}. Nothing was committed. Check the name, and that "
            "HF_TOKEN or `hf auth login` gives a token that may write there"
        ) from error
    return Pushed(f"{api.endpoint}/{repository}", commit.oid, commit.pr_url)


def _content(upload: Upload) -> str | bytes:
    return str(upload.content) if isinstance(upload.content, Path) else upload.content


def _settle_card(api: Any, push: Push, repository: str, revision: str | None, stored: set[str]) -> None:
    """Keep a card that a person wrote on the hub. Else name the licence in ours, if all specialists have the same."""
    if push.keeps_card:
        return
    if CARD in stored:
        card = Path(api.hf_hub_download(repository, CARD, revision=revision, force_download=True))
        if MARK not in card.read_text(encoding="utf-8", errors="replace"):
            push.uploads = [upload for upload in push.uploads if upload.path != CARD]
            push.notes.append(f"the {CARD} on the hub was written by hand, and stays")
            return
    push.put(CARD, card_text(push, _licence(api, push.config)).encode())


def _licence(api: Any, config: UltraFuserConfig) -> str | None:
    """The licence that all specialists have on the hub. None: one is not on the hub, names none, or they differ."""
    from huggingface_hub.errors import HfHubHTTPError

    references = {reference for spec in config.specialists for _, reference in weight_sources(spec["source"])}
    names: set[str | None] = set()
    for reference in references:
        if reference not in hub_sources(config):
            return None
        try:
            card = api.model_info(reference).card_data
        except (HfHubHTTPError, OSError):  # private, or gone since
            return None
        names.add(card.license if card is not None and isinstance(card.license, str) else None)
    return names.pop() if len(names) == 1 else None

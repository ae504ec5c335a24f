"""Fetch models from the hub, each repository once, at one commit, with the caller's token and cache. And push them."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from transformers.utils.hub import create_and_tag_model_card

from .card import model_card
from .errors import CheckpointError
from .files import ADAPTER_FILE, CODE, INDEX_FILE, METADATA, WEIGHTS_FILE, read_index
from .manifest import weight_sources

logger = logging.getLogger(__name__)
_OPTIONS = ("token", "cache_dir", "local_files_only", "force_download", "trust_remote_code")


class Access:
    """How the repositories of one fused model are reached, and whose code may run.

    Args:
        token, cache_dir, local_files_only, force_download: as in transformers' `from_pretrained`.
        trust_remote_code: whether the code in the repositories may run: of all specialists, or of those named.
    """

    def __init__(
        self,
        *,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        trust_remote_code: bool | Collection[str] | None = False,
    ) -> None:
        options = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        self._hub: dict[str, Any] = {key: value for key, value in options.items() if value}
        self._force_download, self._trusted = bool(force_download), trust_remote_code or False
        self._folders: dict[tuple, Path] = {}

    @classmethod
    def take(cls, options: dict[str, Any]) -> Access:
        """The access that options of `from_pretrained` describe. They leave `options`."""
        return cls(**{key: options.pop(key) for key in _OPTIONS if key in options})

    def trusts(self, specialist: str) -> bool:
        """Whether the code in a specialist's repository may run."""
        return self._trusted if isinstance(self._trusted, bool) else specialist in self._trusted

    def options(self, specialist: str) -> dict[str, Any]:
        """Options of transformers' `from_pretrained` for files that are here. Their code may name other repositories."""
        return self._hub | {"trust_remote_code": self.trusts(specialist)}

    def commit(self, repository: str, revision: str | None, specialist: str) -> str:
        """The commit of a branch or tag (default: the main branch).

        Raises:
            CheckpointError: the hub does not give it.
        """
        return revision if revision and is_commit(revision) else self.metadata(repository, revision, specialist).name

    def metadata(self, repository: str, revision: str | None, specialist: str) -> Path:
        """The folder of a repository's files, in the cache and named by the commit, without its weights."""
        patterns = (*METADATA, *(CODE if self.trusts(specialist) else ()))
        return self.fetch(repository, revision, patterns, f"specialist {specialist!r}: no model in {repository}")

    def model(self, repository: str, revision: str | None, specialist: str, gguf_file: str | None = None) -> Path:
        """The folder of a model with its weights."""
        folder = self.metadata(repository, revision, specialist)
        index = folder / INDEX_FILE
        files = [gguf_file] if gguf_file else read_index(index) if index.is_file() else [WEIGHTS_FILE]
        return self.fetch(repository, folder.name, files, f"specialist {specialist!r}: no weights in {repository}")

    def adapter(self, repository: str, revision: str | None, specialist: str) -> Path:
        """The folder of an adapter with its weights."""
        folder = self.metadata(repository, revision, specialist)
        return self.fetch(
            repository, folder.name, [ADAPTER_FILE], f"specialist {specialist!r}: no adapter in {repository}"
        )

    def fetch(self, repository: str, revision: str | None, patterns: Sequence[str] | None, problem: str) -> Path:
        """The folder of a repository's files that match, downloaded unless the cache has them.

        Args:
            patterns: None: all files.
            problem: the beginning of the error.

        Raises:
            CheckpointError: neither the hub nor the cache has them.
        """
        key = (repository, revision, None if patterns is None else tuple(patterns))
        if key not in self._folders:
            try:
                folder = snapshot_download(
                    repository,
                    revision=revision,
                    allow_patterns=None if patterns is None else list(patterns),
                    force_download=self._force_download,
                    **self._hub,
                )
            except (OSError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise CheckpointError(f"{problem}: no such folder, and the hub did not give it: {reason}") from error
            self._folders[key] = Path(folder)
        return self._folders[key]


def push_fused(
    model: Any,
    repo_id: str,
    *,
    copy: bool = False,
    max_shard_size: int | str = "50GB",
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
) -> Any:
    """See `UltraFuserForCausalLM.push_to_hub`. Returns the commit."""
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, copy=copy, max_shard_size=max_shard_size)
        facts = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        sources = [source for spec in facts["specialists"] for _, source in weight_sources(spec["source"])]
        if local := sorted({source for source in sources if Path(source).is_absolute()}):
            logger.warning(
                "%s: only this machine has %s. Push with copy=True to upload them", repo_id, ", ".join(local)
            )
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            _write_card(api, model, repo_id, Path(folder) / "README.md", tags)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or "Upload UltraFuserForCausalLM",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                delete_patterns=["specialists/*", "bases/*", "tokenizers/*"],  # of an earlier push
            )
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{repo_id}: the hub did not take the model: {reason}") from error


def _write_card(api: HfApi, model: Any, repo_id: str, file: Path, tags: Sequence[str] | None) -> None:
    """The card of an earlier push or of the repository's owner, with the tags, or else ours."""
    if api.file_exists(repo_id, "README.md"):
        create_and_tag_model_card(repo_id, list(tags or []), token=api.token).save(file)
    else:
        title = repo_id.rpartition("/")[2]
        file.write_text(model_card(model.config, title=title, address=repo_id, tags=tags or ()), encoding="utf-8")


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a commit, which never changes. Branches and tags move."""
    return re.fullmatch(r"[0-9a-f]{40}", revision or "") is not None


def needs_code(source: object, specialist: str) -> CheckpointError:
    """The error for a model or a tokenizer that only the code in its repository can load."""
    return CheckpointError(
        f"specialist {specialist!r}: {source} needs the code in its repository, which does not run unless you allow it. Read "
        "the code, then pass trust_remote_code=True (--trust-remote-code)"
    )

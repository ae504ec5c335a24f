"""`ultrafuser push`: upload a fused folder to the hub."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from rich.table import Table
from typer import Argument, Option

from ultrafuser.cli.ending import AGAIN, how_to_go_on
from ultrafuser.cli.options import Folder, Json
from ultrafuser.errors import RecipeError
from ultrafuser.printing import PlainConsole, echo
from ultrafuser.progress import ConsoleProgress, quiet_libraries

if TYPE_CHECKING:
    from ultrafuser.publish import Push, Pushed


@how_to_go_on(f"Nothing was committed. {AGAIN}", resumes=False)
def push_command(
    folder: Folder,
    repository: Annotated[str, Argument(help="Repository on the hub: owner/name. It is created if there is none.")],
    copy: Annotated[
        bool, Option("--copy", help="Upload the weights of specialists that only this machine has.")
    ] = False,
    private: Annotated[bool, Option("--private", help="Create the repository as a private one.")] = False,
    revision: Annotated[str | None, Option(help="Branch to push to. Default: main.")] = None,
    create_pr: Annotated[
        bool, Option("--create-pr", help="Open a pull request instead of changing the branch.")
    ] = False,
    message: Annotated[str | None, Option("--message", "-m", help="Message of the commit.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="List the files and their sizes. Needs no network.")] = False,
    as_json: Json = False,
) -> None:
    """Push a fused folder to the hub as one commit, with a model card.

    Specialists that are on the hub stay references to their commits. The token is that of `HF_TOKEN` or `hf auth login`.
    """
    quiet_libraries()
    from ultrafuser.publish import prepare, upload

    if revision is not None and not revision.strip():
        raise RecipeError("--revision is empty, expected the name of a branch")
    progress = ConsoleProgress()
    with progress.waiting("checking the folder"):
        push = prepare(folder, repository, copy=copy)
    result: Pushed | None = None
    if not dry_run:
        with progress.waiting(f"uploading {len(push.uploads)} files, {_size(push.size_bytes)}"):
            result = upload(push, message=message, private=private or None, revision=revision, create_pr=create_pr)
    if as_json:
        files = [{"path": item.path, "size_bytes": item.size_bytes} for item in push.uploads]
        facts = {"repository": repository, "files": files, "left_out": push.left_out, "notes": push.notes}
        return echo(json.dumps(facts | (asdict(result) if result else {}), ensure_ascii=False))
    for note in push.notes:
        progress.log(note)
    if result is None:
        return _print_files(push)
    echo(f"pushed: {result.pull_request or result.url}\ncommit: {result.commit}")
    if result.pull_request is None:
        at = f" --revision {revision}" if revision else ""
        echo(f"next: ultrafuser chat {repository}, ultrafuser serve {repository}, vllm serve {repository}{at}")


def _print_files(push: Push) -> None:
    table = Table(title=f"files for {push.repository}")
    table.add_column("file", overflow="fold")
    table.add_column("size", justify="right")
    for item in push.uploads:
        table.add_row(item.path, _size(item.size_bytes))
    PlainConsole().print(table)
    echo(f"{len(push.uploads)} files, {_size(push.size_bytes)}. Nothing was uploaded")
    if push.left_out:
        echo(f"no part of the model, left out: {', '.join(push.left_out)}")


def _size(size_bytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.1f} {unit}"
    return f"{size_bytes} bytes"

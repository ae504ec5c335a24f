"""The sources of a recipe as rows and as token sequences."""

from __future__ import annotations

from collections.abc import Sequence

from ultrafuser.data.schema import Row
from ultrafuser.data.sources import load_rows
from ultrafuser.data.templates import Rendered, Renderer
from ultrafuser.errors import DataError
from ultrafuser.progress import Progress
from ultrafuser.recipe import SourceRecipe


def load_source(source: SourceRecipe) -> list[Row]:
    """The rows of one source of a recipe.

    Raises:
        DataError: see `load_rows`.
    """
    return load_rows(**source.model_dump())


def read_sources(
    sources: Sequence[SourceRecipe], renderer: Renderer, progress: Progress, purpose: str
) -> list[Rendered]:
    """Rows of all sources as token sequences.

    Raises:
        DataError: no sources, or a domain of which no row fits.
    """
    if not sources:
        raise DataError(f"the recipe names no {purpose} data. Add sources under data.train")
    rows = [row for source in sources for row in load_source(source)]
    rendered, stats = renderer.render_all(rows)
    counts = {domain: sum(row.domain == domain for row in rendered) for domain in sorted({r.domain for r in rows})}
    for domain, count in counts.items():
        if count == 0:
            raise DataError(
                f"domain {domain!r} has no {purpose} row left: the prompts alone fill max_length={renderer.max_length} "
                "tokens. Raise data.max_length"
            )
    progress.log(
        f"{purpose} rows: " + ", ".join(f"{count} {domain}" for domain, count in counts.items()) + f" ({stats})"
    )
    return rendered

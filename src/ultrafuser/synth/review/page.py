"""The review page in a browser: one row at a time, to accept, edit or reject."""

from __future__ import annotations

from typing import Any

from ultrafuser.errors import DataError, MissingExtraError
from ultrafuser.synth.review.session import ALL_DOMAINS, STATES, ReviewSession

NO_ROWS = (
    "No rows left to review here. Select other rows above. Run `ultrafuser synth RECIPE` again to write the data set."
)


def review_page(session: ReviewSession) -> Any:
    """The page as a gradio app. `launch()` serves it.

    Raises:
        MissingExtraError: gradio is not installed.
    """
    try:
        import gradio as gr
    except ImportError:
        raise MissingExtraError("gradio", "review", "the review page") from None
    num_boxes = max((len(row.messages) for row in session.rows), default=2)

    def show(domain: str, state: str, index: int | None, step: int) -> list[Any]:
        """New values of all outputs, for the selected row `step` positions after `index`."""
        index = _move(session.select(domain, state), index, step)
        if index is None:
            return [None, NO_ROWS, session.summary(), "", *[gr.update(visible=False) for _ in range(num_boxes)]]
        row, messages = session.rows[index], session.messages(index)
        heading = f"**{row.domain}** / {row.topic} / {row.subtopic} · `{row.id}` · {row.source}"
        decision = session.decision(row)
        boxes = [gr.update(label=role, value=content, visible=True) for role, content in messages]
        boxes += [gr.update(visible=False) for _ in range(num_boxes - len(messages))]
        heading = f"{heading} · {decision or 'not reviewed'}"
        return [index, heading, session.summary(), session.reject_note(row), *boxes]

    def accept(domain: str, state: str, index: int | None) -> list[Any]:
        if index is not None:
            session.accept(index)
        return show(domain, state, index, 1)

    def reject(domain: str, state: str, index: int | None, note: str) -> list[Any]:
        if index is not None:
            session.reject(index, note)
        return show(domain, state, index, 1)

    def save(domain: str, state: str, index: int | None, *contents: str) -> list[Any]:
        if index is None:
            return show(domain, state, index, 0)
        try:
            session.edit(index, list(contents[: len(session.rows[index].messages)]))
        except DataError as error:
            raise gr.Error(str(error)) from error
        return show(domain, state, index, 1)

    with gr.Blocks(title="ultrafuser: review") as page:
        index = gr.State(None)
        summary = gr.Markdown(session.summary())
        with gr.Row():
            domain = gr.Dropdown(list(session.domains), value=ALL_DOMAINS, label="domain")
            state = gr.Dropdown(list(STATES), value=STATES[0], label="show")
        heading = gr.Markdown()
        boxes = [gr.Textbox(lines=3, max_lines=30, visible=False, interactive=True) for _ in range(num_boxes)]
        with gr.Row():
            accept_button = gr.Button("Accept", variant="primary")
            save_button = gr.Button("Save edit")
            reject_button = gr.Button("Reject", variant="stop")
            previous_button = gr.Button("Previous")
            next_button = gr.Button("Next")
        note = gr.Textbox(label="reason for rejecting (optional)", lines=1)
        outputs = [index, heading, summary, note, *boxes]
        page.load(lambda d, s: show(d, s, None, 0), [domain, state], outputs, api_name="show")
        for dropdown in (domain, state):
            dropdown.change(lambda d, s: show(d, s, None, 0), [domain, state], outputs)
        accept_button.click(accept, [domain, state, index], outputs, api_name="accept")
        reject_button.click(reject, [domain, state, index, note], outputs, api_name="reject")
        save_button.click(save, [domain, state, index, *boxes], outputs, api_name="save")
        previous_button.click(lambda d, s, i: show(d, s, i, -1), [domain, state, index], outputs, api_name="previous")
        next_button.click(lambda d, s, i: show(d, s, i, 1), [domain, state, index], outputs, api_name="next")
    return page


def _move(indices: list[int], index: int | None, step: int) -> int | None:
    """The selected index after (`step` 1) or before (-1) `index`, or `index` itself (0). None: no row is selected."""
    if not indices:
        return None
    if index is None:
        return indices[0]
    if step > 0:  # after the last one it starts again
        return next((candidate for candidate in indices if candidate > index), indices[0])
    if step < 0:
        return next((candidate for candidate in reversed(indices) if candidate < index), index)
    return index if index in indices else indices[0]

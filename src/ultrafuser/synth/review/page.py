"""The review page in a browser: one row at a time, to accept, edit or reject."""

from __future__ import annotations

from typing import Any

from ultrafuser.errors import DataError, MissingExtraError
from ultrafuser.synth.review.session import ALL, SHOWN, Desk

NOTHING = (
    "Nothing left to show here. Choose other rows above; run `ultrafuser synth RECIPE` again to write the data set."
)


def review_page(desk: Desk) -> Any:
    """The page as a gradio app; `launch()` serves it.

    Raises:
        MissingExtraError: gradio is not installed.
    """
    try:
        import gradio as gr
    except ImportError:
        raise MissingExtraError("gradio", "review", "the review page") from None
    most = max((len(row.messages) for row in desk.rows), default=2)

    def show(domain: str, what: str, place: int | None, step: int) -> list[Any]:
        """The row `step` places on among those chosen, from `place`; then all that the page shows of it."""
        places = desk.shown(domain, what)
        if place is not None and step:
            after = [one for one in places if one > place] if step > 0 else [one for one in places if one < place]
            place = after[0 if step > 0 else -1] if after else (places[0] if places and step > 0 else place)
        elif places and place not in places:
            place = places[0]
        if not places or place is None:
            return [None, NOTHING, desk.summary(), "", *[gr.update(visible=False) for _ in range(most)]]
        row, messages = desk.rows[place], desk.messages(place)
        where = f"**{row.domain}** / {row.topic} / {row.subtopic} · `{row.id}` · {row.source}"
        state = desk.decision(row)
        boxes = [gr.update(label=role, value=content, visible=True) for role, content in messages]
        boxes += [gr.update(visible=False) for _ in range(most - len(messages))]
        return [place, f"{where} · {state or 'not reviewed'}", desk.summary(), desk.why(row), *boxes]

    def accept(domain: str, what: str, place: int | None) -> list[Any]:
        if place is not None:
            desk.accept(place)
        return show(domain, what, place, 1)

    def reject(domain: str, what: str, place: int | None, why: str) -> list[Any]:
        if place is not None:
            desk.reject(place, why)
        return show(domain, what, place, 1)

    def save(domain: str, what: str, place: int | None, *contents: str) -> list[Any]:
        if place is None:
            return show(domain, what, place, 0)
        try:
            desk.edit(place, list(contents[: len(desk.rows[place].messages)]))
        except DataError as error:
            raise gr.Error(str(error)) from error
        return show(domain, what, place, 1)

    with gr.Blocks(title="ultrafuser: review") as page:
        place = gr.State(None)
        summary = gr.Markdown(desk.summary())
        with gr.Row():
            domain = gr.Dropdown(list(desk.domains), value=ALL, label="domain")
            what = gr.Dropdown(list(SHOWN), value=SHOWN[0], label="show")
        where = gr.Markdown()
        boxes = [gr.Textbox(lines=3, max_lines=30, visible=False, interactive=True) for _ in range(most)]
        with gr.Row():
            accept_button = gr.Button("Accept", variant="primary")
            save_button = gr.Button("Save edit")
            reject_button = gr.Button("Reject", variant="stop")
            back_button = gr.Button("Previous")
            skip_button = gr.Button("Next")
        why = gr.Textbox(label="why it is rejected, if you like", lines=1)
        shown = [place, where, summary, why, *boxes]
        page.load(lambda d, w: show(d, w, None, 0), [domain, what], shown, api_name="show")
        for choice in (domain, what):
            choice.change(lambda d, w: show(d, w, None, 0), [domain, what], shown)
        accept_button.click(accept, [domain, what, place], shown, api_name="accept")
        reject_button.click(reject, [domain, what, place, why], shown, api_name="reject")
        save_button.click(save, [domain, what, place, *boxes], shown, api_name="save")
        back_button.click(lambda d, w, p: show(d, w, p, -1), [domain, what, place], shown, api_name="previous")
        skip_button.click(lambda d, w, p: show(d, w, p, 1), [domain, what, place], shown, api_name="next")
    return page

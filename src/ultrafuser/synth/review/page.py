"""The review page in a browser: one row at a time, to accept, edit or reject."""

from __future__ import annotations

import functools
import socket
from typing import Any

from ultrafuser.errors import DataError, MissingExtraError
from ultrafuser.synth.review.session import ALL_DOMAINS, STATES, ReviewSession

NO_ROWS = (
    "No rows left to review here. Select other rows above. Run `ultrafuser synth RECIPE` again to write the data set."
)


def review_page(session: ReviewSession, host: str = "127.0.0.1") -> Any:
    """The page as a gradio app. `launch()` serves it.

    Rows are shown in text boxes alone: Markdown and HTML could load images from other servers.

    Args:
        host: the address that will be given to `launch()`. Requests with another Host header are refused.

    Raises:
        MissingExtraError: gradio is not installed.
    """
    try:
        import gradio as gr
    except ImportError:
        raise MissingExtraError("gradio", "review", "the review page") from None
    actions = _Actions(gr, session)
    with gr.Blocks(title="ultrafuser: review") as page:
        index = gr.State(None)
        summary = gr.Markdown(session.summary())
        with gr.Row():
            domain = gr.Dropdown(list(session.domains), value=ALL_DOMAINS, label="domain")
            state = gr.Dropdown(list(STATES), value=STATES[0], label="show")
        heading = gr.Textbox(label="row", lines=1, interactive=False)
        boxes = [gr.Textbox(lines=3, max_lines=30, visible=False, interactive=True) for _ in range(actions.num_boxes)]
        with gr.Row():
            accept_button = gr.Button("Accept", variant="primary")
            save_button = gr.Button("Save edit")
            reject_button = gr.Button("Reject", variant="stop")
            previous_button = gr.Button("Previous")
            next_button = gr.Button("Next")
        note = gr.Textbox(label="reason for rejecting (optional)", lines=1)
        outputs = [index, heading, summary, note, *boxes]
        page.load(lambda d, s: actions.show(d, s, None, 0), [domain, state], outputs, api_name="show")
        for dropdown in (domain, state):
            dropdown.change(lambda d, s: actions.show(d, s, None, 0), [domain, state], outputs)
        accept_button.click(actions.accept, [domain, state, index], outputs, api_name="accept")
        reject_button.click(actions.reject, [domain, state, index, note], outputs, api_name="reject")
        save_button.click(actions.save, [domain, state, index, *boxes], outputs, api_name="save")
        previous_button.click(
            lambda d, s, i: actions.show(d, s, i, -1), [domain, state, index], outputs, api_name="previous"
        )
        next_button.click(lambda d, s, i: actions.show(d, s, i, 1), [domain, state, index], outputs, api_name="next")
    page.launch = functools.partial(page.launch, ssr_mode=False, app_kwargs={"middleware": [_own_hosts(host)]})
    return page


def _own_hosts(host: str) -> Any:
    """Middleware that refuses requests to other names. Else a web page whose name leads here could use this one."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    hosts = {"127.0.0.1", "localhost", host}
    if host in ("0.0.0.0", "::"):  # all addresses of this machine
        names = {socket.gethostname(), socket.getfqdn()}
        infos = [info for name in names for info in _addresses(name)]
        hosts |= names | set(infos)
    return Middleware(TrustedHostMiddleware, allowed_hosts=sorted(hosts), www_redirect=False)


def _addresses(name: str) -> list[str]:
    try:
        return [str(info[4][0]) for info in socket.getaddrinfo(name, None)]
    except socket.gaierror:
        return []


class _Actions:
    """The actions of the page. Each one returns the new values of all outputs."""

    def __init__(self, gr: Any, session: ReviewSession) -> None:
        self.gr, self.session = gr, session
        self.num_boxes = max((len(row.messages) for row in session.rows), default=2)

    def show(self, domain: str, state: str, index: int | None, step: int) -> list[Any]:
        """New values of all outputs, for the selected row `step` positions after `index`."""
        index = _move(self.session.select(domain, state), index, step)
        if index is None:
            boxes = [self.gr.update(visible=False) for _ in range(self.num_boxes)]
            return [None, NO_ROWS, self.session.summary(), "", *boxes]
        row, messages = self.session.rows[index], self.session.messages(index)
        review = self.session.store.reviews.get(row.id)
        decision = review.decision if review is not None else "not reviewed"
        heading = " · ".join([f"{row.domain} / {row.topic} / {row.subtopic}", row.id, row.source, decision])
        reject_note = review.note if review is not None and decision == "reject" else ""
        boxes = [self.gr.update(label=role, value=content, visible=True) for role, content in messages]
        boxes += [self.gr.update(visible=False) for _ in range(self.num_boxes - len(messages))]
        return [index, heading, self.session.summary(), reject_note, *boxes]

    def accept(self, domain: str, state: str, index: int | None) -> list[Any]:
        if index is not None:
            self.session.accept(index)
        return self.show(domain, state, index, 1)

    def reject(self, domain: str, state: str, index: int | None, note: str) -> list[Any]:
        if index is not None:
            self.session.reject(index, note)
        return self.show(domain, state, index, 1)

    def save(self, domain: str, state: str, index: int | None, *contents: str) -> list[Any]:
        if index is None:
            return self.show(domain, state, index, 0)
        try:
            self.session.edit(index, list(contents[: len(self.session.rows[index].messages)]))
        except DataError as error:
            # The message is shown as HTML, so it may not hold the id of the row.
            raise self.gr.Error(str(error).removeprefix(f"row {self.session.rows[index].id}: ")) from error
        return self.show(domain, state, index, 1)


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

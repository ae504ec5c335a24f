"""The page in a browser: what a person types, sees, hovers and switches."""

from __future__ import annotations

import json
import re
import time

import pytest
from page_actions import ask, shares, text_of, token, until
from scripted_server import ANSWER, NAMES, Script

from ultrafuser.display.palette import NEUTRAL, blend, colour, ink_on, rgb
from ultrafuser.inspect.trace import leader
from ultrafuser.playground.proxy import Upstream
from ultrafuser.playground.routes import add_playground

pytestmark = pytest.mark.browser


# ---------------------------------------------------------------- an answer


def test_an_answer_streams_and_its_tokens_have_the_leaders_colours(script, playground, open_page):
    script.pause_s = 0.02
    page = open_page(playground.url)
    page.wait_for_selector("#legend button")
    assert page.locator("#model-name").inner_text() == "my-fused"
    assert page.locator("#legend button").all_inner_texts() == list(NAMES)
    ask(page, wait=False)
    lengths = []
    while page.locator("#stop").is_visible():
        lengths.append(page.locator(".answer .t").count())
        time.sleep(0.05)
    assert len(set(lengths)) > 5 and lengths == sorted(lengths)
    assert text_of(page) == ANSWER
    [body] = script.requests
    assert body["messages"] == [{"role": "user", "content": "Explain compound interest."}]
    assert body["stream"] and body["gate_weights"] and body["specialist_logprobs"] == 3 and "specialists" not in body
    rows = script.tokens(ANSWER, body)
    expected = {name: share for name, share in script.shares(rows).items()}
    assert shares(page) == pytest.approx({name: 100 * share for name, share in expected.items()}, abs=0.6)
    assert "80 tokens" in page.locator(".figures").inner_text()


def test_a_token_that_one_specialist_leads_has_its_colour_and_readable_ink(script, playground, open_page):
    page = open_page(playground.url)
    page.wait_for_selector("#legend button")
    ask(page)
    rows = script.tokens(ANSWER, {})
    styles = page.locator(".answer .t").evaluate_all(
        "spans => spans.map(span => {"
        "const style = getComputedStyle(span); return [span.dataset.i, style.backgroundColor, style.color] })"
    )
    levels = set()
    for index, background, ink in styles:
        lead, margin = leader(rows[int(index)]["weights"])
        level = int(margin * 8 + 0.5) / 8
        shade = tuple(int(value) for value in re.findall(r"\d+", background)[:3])
        expected = rgb(blend(NEUTRAL, colour(lead), 0.72 * level))
        assert all(abs(value - other) <= 1 for value, other in zip(shade, expected, strict=True))
        black_or_white = rgb(ink_on("#{:02x}{:02x}{:02x}".format(*shade)))
        assert ink == "rgb({}, {}, {})".format(*black_or_white)
        levels.add(level)
    assert min(levels) <= 0.25 and max(levels) >= 0.875


def test_code_is_kept_in_a_block_of_its_own(playground, open_page):
    page = open_page(playground.url, permissions=["clipboard-read", "clipboard-write"])
    page.wait_for_selector("#legend button")
    ask(page)
    block = page.locator(".answer .code")
    assert block.count() == 1 and block.locator(".code-bar span").inner_text() == "python"
    lines = block.locator("pre .t").evaluate_all("spans => spans.map(span => span.textContent).join('')")
    assert lines == ANSWER[ANSWER.index("```") : ANSWER.index("\n\nFor") + 1]
    block.get_by_role("button", name="Copy").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == "def balance(amount, rate, years):\n    return amount * (1 + rate) ** years\n"
    page.locator(".actions").get_by_role("button", name="Copy").click()
    assert page.evaluate("navigator.clipboard.readText()") == ANSWER


FENCES = {
    "two blocks": "a\n```\nx\n```\nb\n~~~js\n```\ny\n~~~\nc",
    "no end": "a\n```python\nx = 1\n",
    "longer fence": "````md\n```\nx\n```\n````\nb",
    "in a line": "```x``` is code\nand more",
    "empty": "\n\n\n```\n```\n\n",
    "unicode": "äöü 😀\n```\n😀\n```",
}


@pytest.mark.parametrize("name", FENCES)
def test_no_text_is_lost_around_fences(name, script, playground, open_page):
    text = FENCES[name]
    script.answer = lambda question: text
    page = open_page(playground.url)
    page.wait_for_selector("#legend button")
    ask(page)
    assert text_of(page) == "".join(row["text"] for row in script.tokens(text, {})) == text
    in_code = page.locator(".answer .code pre").evaluate_all("blocks => blocks.map(block => block.textContent)")
    expected = {
        "two blocks": ["```\nx\n```\n", "~~~js\n```\ny\n~~~\n"],
        "no end": ["```python\nx = 1\n"],
        "longer fence": ["````md\n```\nx\n```\n````\n"],
        "in a line": [],
        "empty": ["```\n```\n"],
        "unicode": ["```\n😀\n```"],
    }
    assert in_code == expected[name]


def test_markup_in_questions_and_answers_stays_text(script, playground, open_page):
    evil = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>\n```<b>\n</pre><script>\n```"
    script.answer = lambda question: evil
    script.model = "<img src=x onerror='window.hacked = 1'>"
    page = open_page(playground.url)
    page.wait_for_selector("#legend button")
    ask(page, evil)
    assert text_of(page) == evil and page.locator(".question p").inner_text() == evil
    assert page.evaluate("window.hacked") is None
    assert page.locator(".answer script, .answer img, .question script").count() == 0


# ---------------------------------------------------------------- weights of a token


def assert_card(page, script, index):
    row = script.tokens(ANSWER, {})[index]
    card = page.locator("#token-card")
    card.wait_for(state="visible")
    assert card.locator(".name").all_inner_texts() == list(NAMES)
    values = [float(value) for value in card.locator(".value").all_inner_texts()]
    assert values == pytest.approx(row["weights"], abs=6e-4)
    assert f"token {index + 1} of 80" in card.inner_text()
    assert card.locator(".tops code").count() == 9 and "·the" in card.inner_text() and "0.80" in card.inner_text()
    bar, space = card.locator(".bar i").first.bounding_box(), card.locator(".bar").first.bounding_box()
    assert bar["width"] / space["width"] == pytest.approx(row["weights"][0], abs=0.03)
    box, view = card.bounding_box(), page.viewport_size
    assert box["x"] >= 0 and box["x"] + box["width"] <= view["width"]
    assert box["y"] >= 0 and box["y"] + box["height"] <= view["height"]


def test_pointing_tapping_and_arrow_keys_show_the_weights_and_candidates(script, playground, open_page):
    page = open_page(playground.url)
    page.wait_for_selector("#legend button")
    ask(page)
    token(page, " means").hover()
    assert_card(page, script, 2)
    page.mouse.move(5, 5)
    page.locator("#token-card").wait_for(state="hidden")
    page.locator(".answer .tokens").focus()
    page.keyboard.press("Home")
    assert_card(page, script, 0)
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    until(page, "document.querySelector('.t.active')?.dataset.i === '3'")
    assert_card(page, script, 3)
    assert re.match(r'" that": text leads\. text \d+', page.locator("#status").inner_text())
    page.keyboard.press("End")
    until(page, "document.querySelector('.t.active')?.dataset.i === '79'")
    page.keyboard.press("Escape")
    page.locator("#token-card").wait_for(state="hidden")


def test_a_tap_shows_the_weights_on_a_phone_and_nothing_scrolls_sideways(script, playground, open_page):
    page = open_page(playground.url, viewport={"width": 375, "height": 720}, has_touch=True, is_mobile=True)
    page.wait_for_selector("#legend button")

    def width():
        return page.evaluate("document.documentElement.scrollWidth")

    assert width() == 375
    page.select_option("#compare", label="code alone")
    ask(page)
    assert width() == 375 and page.locator(".answer").count() == 2
    first, second = (page.locator(".answer").nth(i).bounding_box() for i in (0, 1))
    assert second["y"] > first["y"] + first["height"] - 1
    token(page, " means").tap()
    assert_card(page, script, 2)
    page.locator(".answer h3").first.tap()
    page.locator("#token-card").wait_for(state="hidden")
    page.tap("#open-settings")
    assert page.locator("#settings").is_visible() and width() == 375


def test_a_server_without_candidates_gives_weights_alone(script, playground, open_page):
    script.has_candidates = False
    page = open_page(playground.url)
    page.wait_for_selector("#legend button")
    ask(page)
    assert text_of(page) == ANSWER and page.locator(".problem:visible").count() == 0
    assert ["specialist_logprobs" in body for body in script.requests] == [True, False]
    token(page, " means").hover()
    page.locator("#token-card").wait_for(state="visible")
    assert page.locator("#token-card .tops code").count() == 0


# ---------------------------------------------------------------- controls


def test_a_specialist_that_is_switched_off_takes_no_part(script, playground, open_page):
    page = open_page(playground.url)
    legend = page.get_by_role("group", name="Specialists that take part").get_by_role("button")
    legend.nth(1).click()
    assert legend.nth(1).get_attribute("aria-pressed") == "false"
    ask(page)
    assert script.requests[-1]["specialists"] == ["text", "math"]
    assert shares(page)["code"] == 0 and sum(shares(page).values()) == pytest.approx(100, abs=1)
    legend.nth(0).click()
    assert legend.nth(2).is_disabled()  # one has to stay
    legend.nth(1).click()
    legend.nth(0).click()
    ask(page)
    assert "specialists" not in script.requests[-1]


def test_the_sampling_controls_reach_the_request_and_are_remembered(script, playground, open_page):
    page = open_page(playground.url)
    page.click("#open-settings")
    page.fill("textarea[name=system]", "Be brief.")
    page.fill("#temperature", "0")
    page.fill("#top_p", "0.5")
    page.fill("input[name=max_tokens]", "7")
    page.fill("input[name=seed]", "11")
    ask(page)
    body = script.requests[-1]
    assert {key: body[key] for key in ("temperature", "top_p", "max_tokens", "seed")} == {
        "temperature": 0, "top_p": 0.5, "max_tokens": 7, "seed": 11,
    }  # fmt: skip
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert page.locator(".answer .t").count() == 7
    page.reload()
    assert (
        page.locator("#temperature").input_value() == "0" and page.locator("output[for=top_p]").text_content() == "0.50"
    )
    ask(page, "And then?")
    assert script.requests[-1]["seed"] == 11


def test_a_value_that_is_not_valid_is_shown_before_anything_is_sent(script, playground, open_page):
    page = open_page(playground.url)
    page.click("#open-settings")
    page.fill("input[name=max_tokens]", "9000")  # the context has 8,192
    page.click("#close-settings")
    page.fill("#message", "Hello")
    page.click("#send")
    page.wait_for_selector("#settings", state="visible")
    assert script.requests == [] and page.locator("#message").input_value() == "Hello"


def test_a_second_question_sends_the_conversation_and_new_forgets_it(script, playground, open_page):
    page = open_page(playground.url)
    page.locator("#examples button").first.click()
    until(page, "document.querySelector('.shares:not([hidden])')")
    page.fill("#message", "And then?")
    page.keyboard.press("Shift+Enter")
    page.keyboard.press("Enter")
    until(page, "document.querySelectorAll('.shares:not([hidden])').length === 2")
    roles = [message["role"] for message in script.requests[-1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert script.requests[-1]["messages"][1]["content"] == ANSWER
    assert page.locator(".retry:visible").count() == 1
    page.click("#new")
    assert page.locator("#welcome").is_visible() and page.locator(".turn").count() == 0
    ask(page)
    assert len(script.requests[-1]["messages"]) == 1


def test_stop_keeps_the_text_and_retry_asks_again(script, playground, open_page):
    script.pause_s = 0.05
    page = open_page(playground.url)
    page.wait_for_selector("#legend button")
    ask(page, wait=False)
    until(page, "document.querySelectorAll('.answer .t').length > 8")
    page.click("#stop")
    until(page, "document.querySelector('.state')?.innerText === 'stopped'")
    assert page.locator("#send").is_visible()
    part = text_of(page)
    assert ANSWER.startswith(part) and 0 < len(part) < len(ANSWER)
    assert page.locator(".shares").is_visible()
    script.pause_s = 0
    page.locator(".retry").click()
    until(page, "!document.querySelector('[aria-busy]')")
    assert text_of(page) == ANSWER and script.requests[0]["messages"] == script.requests[1]["messages"]


def test_play_back_shows_the_answer_as_it_grew(script, playground, open_page):
    page = open_page(playground.url)
    page.wait_for_selector("#legend button")
    ask(page)
    slider, position = page.locator(".playback input"), page.locator(".position")
    assert position.inner_text() == "80 / 80" and page.locator(".t.later").count() == 0
    slider.fill("30")
    assert position.inner_text() == "30 / 80"
    assert page.locator(".t.later").count() == 50
    weights = [float(value) for value in page.locator(".now .value").all_inner_texts()]
    assert weights == pytest.approx(script.tokens(ANSWER, {})[29]["weights"], abs=6e-4)
    page.get_by_role("button", name="Play the generation").click()
    seen = set()
    while position.inner_text() != "80 / 80":
        seen.add(position.inner_text())
        time.sleep(0.1)
    assert len(seen) > 5 and page.locator(".t.later").count() == 0
    pixels = page.locator(".track canvas").evaluate(
        "canvas => [...new Set(Array.from({length: canvas.width}, (_, x) =>"
        "[...canvas.getContext('2d').getImageData(x, 2, 1, 1).data].join()))].length"
    )
    assert pixels >= 3  # the ribbon shows every leader


def test_dark_and_light(playground, open_page):
    page = open_page(playground.url, color_scheme="dark")
    page.wait_for_selector("#legend button")

    def background():
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    def shade():
        return page.locator(".answer .t").first.evaluate("span => getComputedStyle(span).backgroundColor")

    ask(page)
    assert background() == "rgb(18, 21, 26)"
    dark = shade()
    page.get_by_role("button", name="Switch between light and dark").click()
    assert background() == "rgb(255, 255, 255)" and shade() != dark
    page.reload()
    assert background() == "rgb(255, 255, 255)"
    page.emulate_media(color_scheme="light")
    page.get_by_role("button", name="Switch between light and dark").click()
    assert background() == "rgb(18, 21, 26)"


def test_colours_can_be_switched_off_and_lines_on(playground, open_page):
    page = open_page(playground.url)
    page.wait_for_selector("#legend button")
    ask(page)
    page.click("#open-settings")
    page.uncheck("input[name=colours]")
    first = page.locator(".answer .t").first
    assert first.evaluate("span => getComputedStyle(span).backgroundColor") == "rgba(0, 0, 0, 0)"
    page.check("input[name=lines]")
    styles = page.locator(".answer .t").evaluate_all(
        "spans => [...new Set(spans.map(span => getComputedStyle(span).textDecorationStyle))]"
    )
    assert sorted(styles) == ["dashed", "dotted", "solid"]


# ---------------------------------------------------------------- comparison and export


def test_a_single_specialist_answers_beside_the_fused_model(script, playground, open_page):
    page = open_page(playground.url)
    page.wait_for_selector("#legend button")
    page.select_option("#compare", label="math alone")
    ask(page)
    bodies = sorted(script.requests, key=lambda body: body.get("specialists", []))
    assert [body.get("specialists") for body in bodies] == [None, ["math"]]
    assert page.locator(".answer h3").all_inner_texts() == ["my-fused", "math alone"]
    assert shares(page, 1) == {"text": 0, "code": 0, "math": 100}
    left, right = (page.locator(".answer").nth(i).bounding_box() for i in (0, 1))
    assert left["y"] == right["y"] and right["x"] >= left["x"] + left["width"]


def test_another_server_answers_beside_the_fused_model(script, run, open_page):
    plain = Script(names=(), model="llama", answer=lambda question: "I am plain.")
    other, missing = run(plain.app()), Upstream("http://127.0.0.1:9")
    app = script.app()
    add_playground(app, {"plain": Upstream(other.url), "gone": missing})
    page = open_page(run(app).url)
    page.wait_for_selector("#legend button")
    assert page.locator("#compare option").all_inner_texts()[-2:] == ["plain", "gone (not reachable)"]
    page.select_option("#compare", label="plain")
    ask(page)
    assert (text_of(page, 0), text_of(page, 1)) == (ANSWER, "I am plain.")
    [body] = plain.requests
    assert body["model"] == "llama" and not {"gate_weights", "specialist_logprobs", "specialists"} & set(body)
    ask(page, "Again?")
    assert [message["content"] for message in plain.requests[-1]["messages"]] == [
        "Explain compound interest.", "I am plain.", "Again?",
    ]  # fmt: skip
    assert page.locator(".answer >> nth=1 >> .shares").is_hidden()


def download(page, button):
    page.click("#export summary")
    with page.expect_download() as info:
        page.get_by_role("button", name=button).click()
    return info.value


def test_a_conversation_is_exported_as_json_and_as_the_page_of_inspect(script, playground, open_page, tmp_path):
    page = open_page(playground.url)
    page.wait_for_selector("#legend button")
    page.select_option("#compare", label="code alone")
    ask(page, "Why <b>?")
    file = download(page, "JSON")
    assert file.suggested_filename == "conversation.json"
    conversation = json.loads(open(file.path(), encoding="utf-8").read())
    [turn] = conversation["turns"]
    assert turn["question"] == "Why <b>?"
    assert [answer["text"] for answer in turn["answers"]] == [ANSWER, ANSWER]
    assert turn["answers"][0]["tokens"][2] == script.tokens(ANSWER, {})[2]
    assert conversation["settings"]["max_tokens"] == "512"
    file = download(page, "HTML page")
    file.save_as(tmp_path / "conversation.html")
    page.goto((tmp_path / "conversation.html").as_uri())
    assert page.locator("h1").inner_text() == "Conversation"
    assert page.locator("h2").inner_text() == "Why <b>?"
    assert page.locator(".uf-trace").count() == 2
    tokens = page.locator(".uf-trace").first.locator(".uf-t").evaluate_all("spans => spans.map(s => s.textContent)")
    assert "".join(tokens) == ANSWER

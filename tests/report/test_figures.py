"""Figures: what is drawn is the data, in the palette's colours; text is never mathematics."""

from __future__ import annotations

import io
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ultrafuser.display.palette import blend, colour, domain_colours
from ultrafuser.errors import DataError, MissingExtraError
from ultrafuser.inspect.trace import TokenTrace, printable

pytest.importorskip("matplotlib")
from matplotlib import colors, image
from matplotlib.figure import Figure
from matplotlib.text import Text

from ultrafuser.display.drawing import png_bytes, svg
from ultrafuser.inspect.figure import trace_figure, trace_png, wrap
from ultrafuser.report.figures.gate import weights_by_domain, weights_heatmap
from ultrafuser.report.figures.training import training_curves

PNG = b"\x89PNG\r\n\x1a\n"


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def lines_of(axes: Any, shade: str) -> list[Any]:
    return [line for line in axes.lines if colors.same_color(line.get_color(), shade) and len(line.get_xdata())]


def test_wrapping_keeps_tokens_columns_and_order() -> None:
    tokens = ["one", " two", " th", "ree", "\n", "\tx", " 数数", " ", "y" * 25]
    lines = wrap(tokens, 10)
    assert all(column + cells <= 10 for line in lines for column, cells, _, _ in line)
    assert ["".join(piece for _, _, piece, _ in line) for line in lines] == [
        "one two ", "three", "    x 数数", "y" * 10, "y" * 10, "y" * 5,
    ]  # fmt: skip
    assert [owner for line in lines for _, _, _, owner in line] == [0, 1, 2, 2, 3, 5, 6, 8, 8, 8]


def test_the_trace_shows_each_token_on_the_leaders_colour(trace: TokenTrace) -> None:
    figure = trace_figure(trace)
    response, strip = figure.axes
    words = [token.strip() for token in map(printable, trace.tokens)]
    assert [text.get_text().strip() for text in response.texts] == [word for word in words if word]
    boxes = {(box.get_x(), box.get_y()): colors.to_hex(box.get_facecolor()) for box in response.patches}  # type: ignore[attr-defined]
    shades = [blend("#ffffff", colour(index), 0.06 + 0.94 * margin) for index, margin in trace.leaders]
    drawn = [
        boxes[text.get_position()[0] + 0.04, round(text.get_position()[1] - 0.68) + 0.06] for text in response.texts
    ]
    assert drawn == [shade for shade, word in zip(shades, words, strict=True) if word]
    tops = np.array([patch.get_data().values for patch in strip.patches])  # type: ignore[attr-defined]
    np.testing.assert_allclose(tops, np.cumsum(np.array(trace.weights).T, axis=0))


def test_dollars_in_tokens_are_not_mathematics() -> None:
    broken = TokenTrace(["$\\frac{", "$", " $x^$"], [[1.0]] * 3, ["a$b$"], prompt="$\\bad$", title="$^$")
    figure = trace_figure(broken)
    assert png_bytes(figure, dpi=40).startswith(PNG)
    assert "$\\bad$" in texts(figure) and "$\\frac{" in texts(figure)


def test_trace_png_writes_the_file(trace: TokenTrace, tmp_path: Path) -> None:
    figure = trace_png(trace, tmp_path / "trace.png")
    pixels = image.imread(io.BytesIO((tmp_path / "trace.png").read_bytes()))
    assert pixels.shape[:2] == tuple(int(200 * side) for side in figure.get_size_inches()[::-1])
    trace_png(TokenTrace([], [], ["x"]), tmp_path / "empty.png")


def test_bars_are_the_weights_stacked(results: dict[str, Any]) -> None:
    gate = results["gate_weights"]["fused"]
    axes = weights_by_domain(gate).axes[0]
    drawn = np.array([[bar.get_width() for bar in bars] for bars in axes.containers])
    np.testing.assert_allclose(drawn.T, [list(row.values()) for row in gate.values()])
    for k, bars in enumerate(axes.containers):
        assert {colors.to_hex(bar.get_facecolor()) for bar in bars} == {colour(k)}
    assert {f"{w:.2f}" for row in gate.values() for w in row.values()} <= set(texts(axes.figure))  # type: ignore[arg-type]


def test_the_heat_map_has_a_column_per_sample_and_a_row_per_specialist() -> None:
    samples = {"p": [{"x": 0.9, "y": 0.1}, {"y": 0.8, "x": 0.2}], "q": [{"x": 0.5, "y": 0.5}]}
    first, second, _ = weights_heatmap(samples).axes
    np.testing.assert_allclose(first.images[0].get_array(), [[0.9, 0.2], [0.1, 0.8]])  # type: ignore[arg-type]
    np.testing.assert_allclose(second.images[0].get_array(), [[0.5], [0.5]])  # type: ignore[arg-type]
    assert (first.get_title(), second.get_title()) == ("p", "q")


def test_training_curves_have_a_column_per_stage(metrics: list[dict[str, Any]]) -> None:
    grid = np.array(training_curves(metrics).axes).reshape(3, 2)
    assert [axes.get_title() for axes in grid[0]] == ["stage 1: gate", "stage 2: joint"]
    shades = domain_colours(["text", "code", "math", "mixed"], ["text", "code", "math"])
    for axes, steps in zip(grid[0], (40, 6), strict=True):
        for n, shade in enumerate(shades.values()):
            raw, *_, diamonds = lines_of(axes, shade)
            np.testing.assert_allclose(raw.get_ydata(), [1 + n + 1 / step for step in range(1, steps + 1)])
            assert (list(diamonds.get_xdata()), list(diamonds.get_ydata())) == ([steps], [1.1])
    np.testing.assert_allclose(lines_of(grid[1, 0], colour(2))[-1].get_ydata(), 0.25)


def test_of_a_step_logged_twice_the_later_row_counts_and_gaps_are_skipped() -> None:
    rows = [{"stage": "gate", "step": step, "loss/a": value} for step, value in ((1, 5.0), (2, 4.0), (2, 3.0))]
    rows += [
        {"stage": "gate", "step": 3},
        {"stage": "gate", "step": 4, "loss/a": float("nan")},
        {"note": "no step"},
    ]
    (axes,) = training_curves(rows).axes
    (line,) = lines_of(axes, colour(0))
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 2], [5.0, 3.0])


@pytest.mark.parametrize(
    ("draw", "data", "message"),
    [
        (training_curves, [{"loss": 1.0}], "no row has both 'stage' and 'step'"),
        (weights_by_domain, {}, "no domains"),
        (
            weights_by_domain,
            {"p": {"x": 1.0}, "q": {"y": 1.0}},
            r"'q' has weights of \['y'\], expected \['x'\]",
        ),
        (weights_heatmap, {"p": []}, "domain 'p' has no samples"),
        (weights_heatmap, {"p": [{"x": 1.0}, {}]}, r"'p 1' has weights of \[\], expected \['x'\]"),
    ],
)
def test_data_that_cannot_be_drawn_is_refused(draw: Any, data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        draw(data)


def test_svg_is_well_formed_repeatable_and_follows_the_page(results: dict[str, Any], trace: TokenTrace) -> None:
    first, second = (svg(weights_by_domain(results["gate_weights"]["fused"])) for _ in range(2))
    assert first == second
    assert ElementTree.fromstring(first).tag.endswith("svg")
    assert "mixed" in first and "0.88" in first  # text stays text
    assert "var(--ink, " in first and "var(--muted, " in first
    ElementTree.fromstring(svg(trace_figure(trace)))  # an escape character would not be XML


def test_without_matplotlib_the_message_is_the_command(
    monkeypatch: pytest.MonkeyPatch, results: dict[str, Any], metrics: list[dict[str, Any]], trace: TokenTrace
) -> None:
    for name in [name for name in sys.modules if name == "matplotlib" or name.startswith("matplotlib.")]:
        monkeypatch.setitem(sys.modules, name, None)
    draws = (
        lambda: trace_figure(trace),
        lambda: training_curves(metrics),
        lambda: weights_by_domain(results["gate_weights"]["fused"]),
        lambda: weights_heatmap({"p": [{"x": 1.0}]}),
    )
    for draw in draws:
        with pytest.raises(MissingExtraError) as error:
            draw()
        assert 'pip install "ultrafuser[report]"' in str(error.value)

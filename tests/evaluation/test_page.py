"""A page is one well-formed file that needs nothing from anywhere; charts put marks where the values are."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.axes import Scale, number
from evaluation.charts import Axis, bar_chart, line_chart, parallel_coordinates, path_chart, point_chart
from evaluation.distributions import histogram_chart, interval_chart
from evaluation.page import columns, command, example, item, page, paragraph, section, table, tiles

EVIL = "<script>alert('&')</script>"
VOID = {"meta", "img"}
finite = st.floats(-1e6, 1e6, allow_nan=False).filter(lambda x: x == 0 or abs(x) > 1e-6)


def everything():
    charts = [
        line_chart({EVIL: [(1, 2), (3, 4)], "b": [(1, 1)]}, EVIL, "y", caption=EVIL),
        line_chart({}, "x", "y"),
        line_chart({f"l{i}": [(1, i), (2, i)] for i in range(9)}, "x", "y"),
        point_chart({EVIL: (1, 2), "b": (10, 3)}, "x", "y", strong=[EVIL], log_x=True),
        bar_chart({EVIL: 0.5, "none": 0.0}),
        path_chart([(1, 2), (2, 1)], [EVIL, "b"], EVIL, "y", caption=EVIL),
        path_chart([], [], "x", "y"),
        histogram_chart({EVIL: [0, 3, 1], "b": [0, 0, 2]}, -1, 1, EVIL, caption=EVIL),
        histogram_chart({"a": [0, 0]}, -1, 1, "x"),
        interval_chart({EVIL: (-0.1, 0.0, 0.2), "b": (0.1, 0.2, 0.3)}, EVIL, caption=EVIL),
        interval_chart({}, "x"),
        parallel_coordinates(
            [Axis("t", True), Axis("q", choices=("0", EVIL))], {"a": {"t": 0.1, "q": EVIL, "s": 1}}, "s"
        ),
    ]
    blocks = [paragraph(EVIL), command(EVIL), tiles({EVIL: EVIL}), table([EVIL, "n"], [[EVIL, "1.5"], ["b", "−2"]])]
    shown = example(item(EVIL, EVIL, EVIL), [item(EVIL, "", "", True)], [item("x", EVIL, "", False)])
    return page(EVIL, [section(EVIL, *blocks, shown, columns(*charts))], EVIL)


class Nesting(HTMLParser):
    """Fails where an end doesn't match its beginning."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_page_is_well_formed_escapes_what_it_is_given_and_fetches_nothing():
    html, parser = everything(), Nesting()
    parser.feed(html.removeprefix("<!doctype html>"))
    assert parser.open == []
    assert "script" not in parser.seen
    assert {"svg", "table", "figure", "h2", "pre"} <= parser.seen
    assert not re.search(r"(src=\"(?!data:)|href|url\(|@import|https?:)", html)
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


def test_columns_of_numbers_are_flush_right():
    html = table(["name", "value"], [["a", "1,234.5"], ["b", "−2 %"]])
    assert html.count('class="number"') == 3
    assert '<td class="number">1,234.5</td>' in html


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=20))
def test_marks_lie_inside_the_chart(points):
    chart = line_chart({"a": points}, "x", "y")
    svg = ElementTree.fromstring(re.search(r"<svg.*</svg>", chart).group())
    _, _, width, height = map(float, svg.get("viewBox").split())
    marks = list(svg.iter("circle"))
    coordinates = [(float(c.get("cx")), float(c.get("cy"))) for c in marks]
    for line in svg.iter("polyline"):
        coordinates += [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
    assert coordinates
    assert all(-0.1 <= x <= width + 0.1 and -0.1 <= y <= height + 0.1 for x, y in coordinates)


@given(st.lists(st.integers(0, 50), min_size=2, max_size=30).filter(any), st.floats(-3, 0), st.floats(0.5, 3))
def test_a_histogram_has_a_step_for_each_bin_with_something_and_its_heights_are_shares(counts, low, span):
    chart = histogram_chart({"a": counts}, low, low + span, "x")
    (area,) = re.findall(r'<polygon points="([^"]+)"', chart)
    corners = [tuple(map(float, pair.split(","))) for pair in area.split()]
    heights = [corners[0][1] - y for _, y in corners[1:-1:2]]
    seen = [i for i, count in enumerate(counts) if count]
    shown = counts[seen[0] : seen[-1] + 1]
    assert len(heights) == len(shown)
    assert [h * max(shown) for h in heights] == pytest.approx([c * max(heights) for c in shown], abs=0.3 * max(shown))


def test_an_interval_that_leaves_zero_out_stands_out_by_its_side():
    html = interval_chart({"better": (0.1, 0.2, 0.3), "worse": (-0.3, -0.2, -0.1), "either": (-0.1, 0, 0.1)}, "x")
    assert re.findall(r'class="mark" style="stroke: var\((--\w+)\)', html) == ["--s2", "--s5", "--soft"]


@given(finite, finite)
def test_ticks_are_few_and_inside(a, b):
    low, high = min(a, b), max(a, b)
    if high - low < 1e-6 * max(abs(low), abs(high), 1):
        return
    ticks = Scale(low, high, 0, 100).ticks()
    assert len(ticks) <= 7
    slack = (high - low) * 1e-6
    assert all(low - slack <= t <= high + slack for t in ticks)
    assert ticks == sorted(ticks)


def test_a_logarithmic_scale_puts_equal_ratios_apart_equally():
    scale = Scale(0.01, 1.0, 0, 100, log=True)
    assert scale(0.1) == pytest.approx(50)
    assert scale.ticks() == pytest.approx([0.01, 0.05, 0.2, 1.0]) or len(scale.ticks()) <= 6


def test_a_bar_is_as_long_as_its_value():
    html = bar_chart({"a": 0.5, "b": 0.25})
    lengths = [float(x) for x in re.findall(r'<rect [^>]*width="([\d.]+)"', html)]
    assert lengths[0] == pytest.approx(2 * lengths[1])


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.123456, "0.1235"), (12345.6, "12,346"), (1e-7, "1e-07"), (1.5e9, "1.5 G")]
)
def test_numbers_are_short(value, text):
    assert number(value) == text

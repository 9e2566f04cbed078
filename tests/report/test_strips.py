"""Strips: rows of marks on one axis."""

import re
from xml.etree import ElementTree

import pytest

from saegrid.report.figures.strips import Mark, Row, strips
from saegrid.report.figures.style import Look

OURS, THEIRS = Look("ours", "#d55e00"), Look("theirs", shape="D", hollow=True)


def parse(figure):
    return ElementTree.fromstring(figure.html)


def test_marks_lie_where_their_values_are_and_intervals_around_them():
    rows = [
        Row("a & b", [Mark(OURS, 1.0, (0.5, 2.0)), Mark(THEIRS, 0.0)], "+1.0", "note", href="#a"),
        Row("empty", [], "–"),
    ]
    root = parse(strips(rows, axis="nats", caption="c", origin=0.0))
    at = [float(re.search(r"left:([\d.]+)%", mark.get("style"))[1]) for mark in root.iter("b")]
    span = next(mark for mark in root.iter("i") if mark.get("class") == "span").get("style")
    low, high = map(float, re.findall(r"([\d.]+)%(?:;|\))", span.replace("100% - ", "")))
    assert 0 < at[1] < low < at[0] < high < 100
    assert (at[0] - low) / (high - low) == pytest.approx(1 / 3, abs=0.01)
    origin = next(mark for mark in root.iter("i") if mark.get("class") == "origin").get("style")
    assert f"left:{at[1]:.2f}%" == origin
    assert ["".join(item.itertext()).strip() for item in root.find("ul[@class='legend']")] == ["ours", "theirs"]
    assert [link.get("href") for link in root.iter("a")] == ["#a"] and "a & b" in "".join(root.itertext())


def test_a_logarithmic_axis_has_ticks_of_plain_numbers():
    root = parse(
        strips([Row("a", [Mark(OURS, 0.5), Mark(OURS, 8.0)])], axis="ratio", caption="c", log=True, origin=1.0)
    )
    axis = next(item for item in root.iter("li") if item.get("class") == "axis")
    assert [mark.text for mark in axis.iter("i")] == ["0.5", "1", "2", "5"]
    at = {mark.text: float(mark.get("style")[5:-1]) for mark in axis.iter("i")}
    assert at["2"] - at["1"] == pytest.approx(at["1"] - at["0.5"], abs=0.02)
    assert root.find("ul[@class='legend']") is None  # one kind of mark needs none


def test_values_that_are_all_alike_have_an_axis_too():
    assert "nan" not in strips([Row("a", [Mark(OURS, 0.0)])], axis="x", caption="c")

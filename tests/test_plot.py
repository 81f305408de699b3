"""Ablation curves as a picture: one line a layer, in order, within the frame, whatever the layers are called."""

from __future__ import annotations

from xml.etree import ElementTree

from optimizers.plot import HEIGHT, LEGEND, WIDTH, curves_svg


def drawn(curves: list[dict[str, object]]) -> ElementTree.Element:
    return ElementTree.fromstring(curves_svg(curves, "a <model> & its cuts"))


def test_each_layer_is_one_line_through_its_cuts_from_left_to_right() -> None:
    cuts = [{"layer": layer, "saved": saved, "loss": loss} for layer, saved, loss in (("a<b>", 30, 0.4), ("a<b>", 10, 0.1), ("c", 20, 0.8))]
    root = drawn(cuts)
    lines = {group.findtext("{*}title"): group.find("{*}polyline") for group in root.findall("{*}g")}
    assert set(lines) == {"a<b>", "c"} and root.findtext("{*}title") == "a <model> & its cuts"
    line = lines["a<b>"]
    assert line is not None
    points = [tuple(map(float, point.split(","))) for point in line.get("points", "").split()]
    [(x1, y1), (x2, y2)] = points
    assert x1 < x2 and y1 > y2, "more saved is further right, more lost is higher up"
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in points)


def test_nothing_measured_or_nothing_lost_is_a_picture_too_and_the_legend_ends() -> None:
    assert drawn([]).findall("{*}g") == []
    many = drawn([{"layer": f"l{i}", "saved": 0, "loss": 0.0} for i in range(LEGEND + 20)])
    assert len(many.findall("{*}g")) == LEGEND + 20
    assert sum(text.get("class") == "name" for text in many.findall("{*}text")) == LEGEND

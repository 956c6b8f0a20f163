"""Pages and pictures: what is escaped, and that equal pictures have equal bytes."""

import jinja2
import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from pictures import has_named_axes, read_picture

from mlmjax.cli.demo_report import Efficiency, curve_figure, efficiency_figure
from mlmjax.reporting import charts, markdown, pages
from mlmjax.reporting.accuracy import Method, accuracy_figure, confusion_figure, confusion_fits

HOSTILE = "<script>|`x`\n# y</script>"


def render(monkeypatch, name, source, **values):
    environment = pages._environment()
    monkeypatch.setattr(environment, "loader", jinja2.DictLoader({name: source}))
    return pages.render(name, **values)


def test_text_is_escaped_in_html_and_by_the_filters_of_markdown(monkeypatch):
    html = render(monkeypatch, "one.html.j2", "<p>{{ text }}</p>", text=HOSTILE)
    assert html == "<p>&lt;script&gt;|`x`\n# y&lt;/script&gt;</p>"
    shown = render(monkeypatch, "two.md.j2", "| {{ text | cell }} |\n", text=HOSTILE)
    assert shown.count("|") == 2
    assert shown.count("\n") == 1
    assert "<script>" not in shown


def test_a_missing_value_is_an_error(monkeypatch):
    with pytest.raises(jinja2.UndefinedError, match="'text' is undefined"):
        render(monkeypatch, "three.md.j2", "{{ text }}")


def test_numbers_are_written_in_one_way():
    assert markdown.number(1234567) == "1,234,567"
    assert (markdown.percent(0.12345), markdown.percent(None)) == ("12.35%", "")
    assert (markdown.share(1, 3), markdown.share(1, 0)) == ("33.33%", "0.00%")
    assert markdown.score(-0.5) == "-0.5000"


METHODS = [
    Method("chance", 0.5),
    Method("ours & <b>$x$</b>", 0.7, (0.6, 0.8), is_ours=True),
]


def test_equal_pictures_have_equal_bytes_whatever_the_users_settings(tmp_path):
    charts.save(accuracy_figure(METHODS), tmp_path / "one.svg", "it")
    with mpl.rc_context({"axes.facecolor": "red", "svg.fonttype": "path", "font.size": 30}):
        charts.save(accuracy_figure(METHODS), tmp_path / "two.svg", "it")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


@pytest.mark.parametrize(
    "figure",
    [
        accuracy_figure(METHODS),
        confusion_figure(["a", "<b>$x$"], np.array([[3, 1], [0, 0]])),
        efficiency_figure([Efficiency(0, METHODS[1], METHODS[0]), Efficiency(8, *METHODS)]),
        curve_figure([{"step": 1, "split": "train", "loss_atp": 2.0, "answer_accuracy": 0.1}]),
        curve_figure([]),
    ],
)
def test_a_picture_fits_a_phone_and_names_its_axes(figure):
    assert has_named_axes(figure)
    texts = read_picture(charts.embedded_picture(figure, '"> & <b>'))
    assert {axes.get_ylabel() for axes in figure.axes} <= set(texts)


def test_text_in_a_picture_is_text():
    page = charts.embedded_picture(accuracy_figure(METHODS), '"> <b>')
    assert "ours &amp; &lt;b&gt;$x$&lt;/b&gt;" in page
    assert 'aria-label="&quot;&gt; &lt;b&gt;"' in page


@pytest.mark.parametrize(
    ("labels", "most", "fits"), [(8, 63, True), (8, 100, True), (12, 9, True), (30, 9, False)]
)
def test_a_confusion_matrix_is_drawn_where_its_numbers_have_room(labels, most, fits):
    assert confusion_fits(np.full((labels, labels), most)) == fits


def test_scripts_that_the_drawing_font_lacks_stay_text_without_a_warning():
    figure = Figure()
    figure.subplots().set_xlabel("größe 日本")
    assert "größe 日本" in charts.svg(figure, "a picture")
    labels = ["größe", "日本 <b>"]
    assert {"größe", "日本 <b>"} <= set(
        read_picture(charts.embedded_picture(confusion_figure(labels, np.eye(2, dtype=int)), "it"))
    )

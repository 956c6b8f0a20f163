"""Pages and pictures: what is escaped, and that equal pictures have equal bytes."""

import jinja2
import matplotlib as mpl
import pytest

from mlmjax.reporting import charts, markdown, pages
from mlmjax.reporting.accuracy import Method, accuracy_figure

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


def test_equal_pictures_have_equal_bytes_whatever_the_users_settings(tmp_path):
    methods = [Method("chance", 0.5), Method("ours", 0.7, (0.6, 0.8), is_ours=True)]
    charts.save(accuracy_figure(methods), tmp_path / "one.png")
    with mpl.rc_context({"axes.facecolor": "red", "savefig.dpi": 20, "font.size": 30}):
        charts.save(accuracy_figure(methods), tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    shown = charts.embedded_picture(accuracy_figure(methods), '">')
    assert shown.startswith('<img alt="&#34;&gt;" src="data:image/png;base64,iVBOR')

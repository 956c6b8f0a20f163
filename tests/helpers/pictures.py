"""What every picture has: a size that fits a phone, texts that can be read, and named axes."""

from xml.etree import ElementTree

PHONE, SMALLEST = 360, 11
SVG = "{http://www.w3.org/2000/svg}"


def read_picture(text):
    """Return the texts of an SVG picture, which fills a phone's width and stays legible there."""
    root = ElementTree.fromstring(text)
    assert root.tag == f"{SVG}svg"
    assert not {"width", "height", "style"} & set(root.keys())
    assert root.get("aria-label")
    *_, width, _ = map(float, root.get("viewBox").split())
    texts = root.findall(f".//{SVG}text")
    for one in texts:
        assert float(one.get("font-size").removesuffix("px")) * PHONE / width >= SMALLEST
        assert one.get("fill", "#000000") != "#000000", "black text cannot be read in dark mode"
    assert not root.findall(f".//{SVG}image")
    assert "prefers-color-scheme: dark" in root.find(f"{SVG}style").text
    return ["".join(one.itertext()) for one in texts]


def has_named_axes(figure):
    """Say whether all axes of a figure have names; panels of a column may share the lowest's."""
    panels = figure.axes
    return bool(panels and panels[-1].get_xlabel() and all(one.get_ylabel() for one in panels))

"""The architecture drawings of the five networks: the committed files are what the models give."""

import importlib.util
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "material"
SPEC = importlib.util.spec_from_file_location("draw_architectures", FOLDER / "draw_architectures.py")
drawing = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(drawing)


@pytest.mark.parametrize("name", drawing.DRAWINGS)
def test_the_committed_drawing_is_what_the_model_gives_now(name):
    committed = (FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    assert drawing.DRAWINGS[name]() == committed, "run: python material/draw_architectures.py"


@pytest.mark.parametrize("name", drawing.DRAWINGS)
def test_everything_is_inside_the_page(name):
    page = ElementTree.parse(FOLDER / f"{name}.svg").getroot()
    width, height = float(page.get("width")), float(page.get("height"))
    for words in page.iter("{http://www.w3.org/2000/svg}text"):
        x, y = float(words.get("x")), float(words.get("y"))
        length = 0.62 * float(words.get("font-size")) * len(words.text)
        left = x - {"start": 0, "middle": length / 2, "end": length}[words.get("text-anchor")]
        assert left >= 4 and left + length <= width - 4 and 20 <= y <= height - 8, words.text
    for face in page.iter("{http://www.w3.org/2000/svg}polygon"):
        for point in face.get("points").split():
            x, y = map(float, point.split(","))
            assert 10 <= x <= width - 10 and 60 <= y <= height - 40, (name, point)


def test_a_drawing_changes_with_its_model(monkeypatch):
    build = drawing.build_model
    monkeypatch.setattr(drawing, "build_model", lambda name, classes: build(name, classes, base_channels=16))
    assert "1024" not in drawing.draw_unet()

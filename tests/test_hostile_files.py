"Files that are not what their names say are refused, in one line that names them."
import numpy as np
import pytest
from PIL import Image

from reinpp.data.datasets import LabelForm, read_image, read_label
from reinpp.files import BadFile


@pytest.mark.parametrize("content", ["EPS", "GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_under_a_png_name_are_no_images(content, tmp_path):
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "a.png", content)
    with pytest.raises(BadFile, match="a.png: cannot be read as an image"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("content", ["GIF", "JPEG"])
def test_labels_are_png_whatever_their_name(content, tmp_path):
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(tmp_path / "a.png", content)
    with pytest.raises(BadFile, match="a.png: cannot be read as an image"):
        read_label(tmp_path / "a.png", LabelForm({0: 0}))
    if content == "JPEG":
        assert read_image(tmp_path / "a.png").shape == (4, 6, 3)

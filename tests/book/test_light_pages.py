"""Frames of sliders become files, and pictures wait until they come near, at any depth of the book."""

import base64
import io

import PIL.Image
import pytest

from tools import light_pages


def picture(kind: str, width: int, height: int) -> bytes:
    drawn = io.BytesIO()
    PIL.Image.new("RGB", (width, height)).save(drawn, kind)
    return drawn.getvalue()


@pytest.mark.parametrize(("page", "up"), [("a.html", ""), ("book/a.html", "../"), ("book/b/a.html", "../../")])
def test_a_page_names_files_in_place_of_frames(tmp_path, page: str, up: str):
    frame, shown = picture("webp", 2, 2), tmp_path / page
    shown.parent.mkdir(parents=True, exist_ok=True)
    shown.write_text(f'<script>["data:image/webp;base64,{base64.b64encode(frame).decode()}"]</script>')
    light_pages.lighten(tmp_path)
    address = shown.read_text().split('"')[1]
    assert address.startswith(f"{up}_images/") and (shown.parent / address).read_bytes() == frame


@pytest.mark.parametrize(("asked", "size"), [("", (40, 20)), (' width="10"', (10, 5))])
def test_a_picture_waits_and_keeps_its_place(tmp_path, asked: str, size: tuple[int, int]):
    (tmp_path / "_images").mkdir()
    (tmp_path / "_images" / "x.png").write_bytes(picture("png", 40, 20))
    (tmp_path / "a.html").write_text(f'<img alt="x" src="_images/x.png"{asked}/><img src="_static/logo.png">')
    light_pages.lighten(tmp_path)
    first, second = (tmp_path / "a.html").read_text().split("<img ")[1:]
    assert first.count("width=") == 1 and 'loading="lazy"' in first and "lazy" not in second
    assert f'width="{size[0]}"' in first and f'height="{size[1]}"' in first

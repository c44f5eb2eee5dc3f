"""Pages that are there soon: what they show later is fetched later, from files beside them."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from pathlib import Path

import PIL.Image

from iclgd_helpers import storage

FRAME = re.compile(r"data:image/webp;base64,([A-Za-z0-9+/=]+)")
PICTURE = re.compile(r'<img ([^>]*\bsrc="((?:\.\./)*_images/[^"]+\.png)"[^>]*)>')
WIDTH = re.compile(r'\bwidth="(\d+)"')


def lighten(html: Path) -> None:
    """
    Let the pages of `html` fetch the frames of their sliders when one moves, and pictures when they come near.

    A phone shows a page before all of its frames have come. The place of a picture is kept free.
    """
    for page in html.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        if (light := _light(text, html, page.parent)) != text:
            storage.write_text(page, light)


def _light(text: str, html: Path, folder: Path) -> str:
    """What `lighten` makes of a page's text; the page lies in `folder`."""
    text = FRAME.sub(lambda frame: _as_file(frame[1], html, folder), text)
    return PICTURE.sub(lambda picture: f"<img {_later(picture[1], folder / picture[2])}>", text)


def _as_file(frame: str, html: Path, folder: Path) -> str:
    """Write a frame into the build's folder of pictures; its address from `folder`."""
    content = base64.b64decode(frame)
    file = html / "_images" / f"{hashlib.sha256(content).hexdigest()}.webp"
    storage.write_bytes(file, content)
    return Path(os.path.relpath(file, folder)).as_posix()


def _later(attributes: str, file: Path) -> str:
    """A picture's attributes, with its size and that it can wait."""
    width, height = PIL.Image.open(file).size
    if asked := WIDTH.search(attributes):
        return f'loading="lazy" height="{round(height * int(asked[1]) / width)}" {attributes}'
    return f'loading="lazy" width="{width}" height="{height}" {attributes}'

"""Figures that are wider than high are marked for the style sheet: on a phone they scroll."""

import io
import posixpath
import re
from typing import Any

from PIL import Image

IMAGE = re.compile(r'<img (?=[^>]*src="(?P<src>[^":]+)")')
WIDER = 1.2  # times the height; what is nearly square or upright is legible when it shrinks


def on_page_content(html: str, *, page: Any, files: Any, **_: Any) -> str:
    """Give each wide figure of the site the class `wide`."""

    def marked(image: re.Match[str]) -> str:
        folder = posixpath.dirname(page.file.src_uri)
        file = files.get_file_from_path(posixpath.normpath(posixpath.join(folder, image["src"])))
        if file is None:
            return image[0]
        width, height = Image.open(io.BytesIO(file.content_bytes)).size
        return image[0] + 'class="wide" ' * (width > WIDER * height)

    return IMAGE.sub(marked, html)

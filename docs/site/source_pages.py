"""Pages of the site for the repository's files that a page links to, so that no link leaves it.

A link such as ``../sslkit/masking.py`` is right where the page is read in the repository; in the
site it leads to a page with that file. A link to a file that is not there is a warning, which
``mkdocs build --strict`` refuses.
"""

import logging
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\((?P<target>(?:\.\./)+[^)#\s]+)(?P<anchor>#[^)\s]+)?\)")
LANGUAGES = {".py": "python", ".md": "markdown", ".toml": "toml", ".yml": "yaml"}
log = logging.getLogger("mkdocs.plugins.source_pages")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each file outside of ``docs`` that some page links to."""
    found: dict[str, str] = {}
    for page in files.documentation_pages():
        for link in LINK.finditer(page.content_string):
            path = in_repository(page.src_uri, link["target"])
            if path is not None:
                found[path] = page.src_uri
    for path, page_uri in sorted(found.items()):
        if not (ROOT / path).exists():
            log.warning("%s links to %s, which the repository does not have", page_uri, path)
            continue
        file = File.generated(
            config, _page_of(path), content=_content(path), inclusion=InclusionLevel.NOT_IN_NAV
        )
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links to such files into links to their pages."""
    if page.file.src_uri.startswith("source/"):
        return markdown

    def rewritten(link: re.Match[str]) -> str:
        path = in_repository(page.file.src_uri, link["target"])
        if path is None or not (ROOT / path).exists():
            return link[0]
        here = posixpath.dirname(page.file.src_uri) or "."
        return f"]({posixpath.relpath(_page_of(path), here)})"

    return LINK.sub(rewritten, markdown)


def in_repository(page_uri: str, target: str) -> str | None:
    """The path from the root of the repository, or None for a file of ``docs``."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page_uri), target))
    return None if path.startswith(("docs/", "..")) else path


def _page_of(path: str) -> str:
    return f"source/{path.rstrip('/')}.md"


def _content(path: str) -> str:
    source = ROOT / path
    if source.is_dir():
        names = sorted(
            p.name + "/" * p.is_dir() for p in source.iterdir() if not p.name.startswith((".", "_"))
        )
        listing = "\n".join(f"- `{name}`" for name in names)
        return f"# {path}\n\nA folder of the repository:\n\n{listing}\n"
    language = LANGUAGES.get(source.suffix, "text")
    return f"# {path}\n\n~~~~~{language}\n{source.read_text()}\n~~~~~\n"

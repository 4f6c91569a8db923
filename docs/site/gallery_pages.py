"""The gallery's pages, which `make gallery` wrote to build/gallery, as pages of the site."""

import logging
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
BUILT, SCRIPTS = ROOT / "build" / "gallery", ROOT / "docs" / "gallery"
log = logging.getLogger("mkdocs.plugins.gallery_pages")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and pictures; the scripts themselves are not part of the site."""
    for script in sorted(SCRIPTS.glob("*.py")):
        files.remove(files.get_file_from_path(f"gallery/{script.name}"))
        page = BUILT / f"{script.stem}.md"
        if script.name != "run.py" and not page.exists():
            log.warning("%s was not run: make gallery", script.relative_to(ROOT))
    for path in sorted([*BUILT.glob("*.md"), *BUILT.glob("*.png")]):
        files.append(File.generated(config, f"gallery/{path.name}", abs_src_path=str(path)))
    return files

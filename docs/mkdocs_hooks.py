"""MkDocs hooks (mkdocs.yml): README is the first page, and links to files beside `docs` lead to copies in the site.

So the pages' links are right on GitHub and in the site alike. Links to folders become plain text there.
"""

import os
import pathlib
import posixpath
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {"README.md": "index.md"} | {
    name: name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
}
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^()\s:#]+)(#[\w-]+)?\)")
HOME = {there: here for here, there in PAGES.items()}


def _beside(page: str, target: str) -> str:
    """Where a link of a page leads, as a path in the repository."""
    folder = "" if page in HOME else posixpath.join("docs", posixpath.dirname(page))
    return posixpath.normpath(posixpath.join(folder, target))


def _place(path: str) -> str:
    """A file of the repository in the site."""
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}.txt"


def on_files(files, config):
    for here, there in PAGES.items():
        files.append(File.generated(config, there, abs_src_path=str(ROOT / here)))
    linked = set()
    for file in files.documentation_pages():
        linked |= {_beside(file.src_uri, target) for _, target, _ in LINK.findall(file.content_string)}
    for path in sorted(linked):
        if _place(path).startswith("repository/") and (ROOT / path).is_file():
            files.append(File.generated(config, _place(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, **_):
    source = page.file.src_uri

    def rewritten(link):
        text, target, anchor = link.groups()
        path = _beside(source, target)
        if (ROOT / path).is_dir():
            return text[1:-1]
        return f"{text}({os.path.relpath(_place(path), posixpath.dirname(source) or '.')}{anchor or ''})"

    return LINK.sub(rewritten, markdown)

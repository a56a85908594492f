"""Hook of mkdocs.yml: the pages that are generated, and links that lead out of docs/ into the repository.

Home is the README. The reference comes from the schema, the command line's parser, the metric list and docstrings, the
benchmark page from benchmarks/results. A link to another file of the repository is followed into the site: the file is
put under repository/, a report under reports/.
"""

from __future__ import annotations

import posixpath
import re
import sys
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import docs_reference as reference  # noqa: E402

HOMES = {"README.md": "index.md", "README.zh-CN.md": "index.zh-CN.md"}
GENERATED: dict[str, Callable[[], str]] = {
    "benchmarks.md": reference.benchmarks,
    "reference/cli.md": reference.command_line,
    "reference/params.md": reference.params,
    "reference/sweeps.md": reference.sweeps,
    "reference/protocols.md": reference.protocols,
    "reference/episodes.md": reference.episodes,
    "reference/metrics.md": reference.metrics,
    "reference/python.md": reference.python,
}
# Pages that a reader follows a link to rather than copies of files
_RESULTS, _REPORT = re.compile(r"benchmarks/results/([\w-]+)\.\w+"), re.compile(r"reports/(.+)/report\.md")
_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s]+)(\))")
_CODE = re.compile(r"(^```.*?^```|`(?:[^`\n]|\n(?!\n))+`)", re.MULTILINE | re.DOTALL)  # code may go on in the next line


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages and the files of the repository that pages link to."""
    for source, name in HOMES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    for name, make in GENERATED.items():
        files.append(File.generated(config, name, content=make()))
    for page in [file for file in files if file.is_documentation_page()]:
        for target in _repository_links(page.content_string, _source(page.src_uri)):
            address = _address(target)
            if address.startswith(("repository/", "reports/")) and address not in files.src_uris:
                copied = target if address.startswith("repository/") else address
                files.append(File.generated(config, address, content=(ROOT / copied).read_bytes()))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to files of the repository lead to where the site has them."""
    source, here = _source(page.file.src_uri), posixpath.dirname(page.file.src_uri)

    def rewritten(match: re.Match[str]) -> str:
        path, anchor = _split(match[2])
        target = _target(path, source)
        if target is None:
            return match[0]
        return f"{match[1]}{posixpath.relpath(_address(target), here or '.')}{anchor}{match[3]}"

    return _outside_code(markdown, lambda text: _LINK.sub(rewritten, text))


def on_post_page(output: str, *, page: Page, config: MkDocsConfig) -> str:
    """Say of pages in Chinese that they are; the theme knows one language for all."""
    if page.file.src_uri.endswith(".zh-CN.md"):
        return output.replace('<html lang="en"', '<html lang="zh-CN"', 1)
    return output


def _source(uri: str) -> str:
    """The file in the repository that a page of the site is made from."""
    return {page: source for source, page in HOMES.items()}.get(uri, f"docs/{uri}")


def _address(target: str) -> str:
    """Where the site has a file of the repository."""
    if target in HOMES:
        return HOMES[target]
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    if results := _RESULTS.fullmatch(target):
        return f"benchmarks.md#{results[1]}"
    if report := _REPORT.fullmatch(target):
        return f"reports/{report[1]}/index.html"
    return f"repository/{target}"


def _target(path: str, source: str) -> str | None:
    """The file of the repository that a link means; None for the web, anchors, and what is not there."""
    if not path or "://" in path or path.startswith(("mailto:", "/")):
        return None
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    return target if (ROOT / target).is_file() or _RESULTS.fullmatch(target) else None


def _repository_links(markdown: str, source: str) -> list[str]:
    found: list[str] = []

    def collect(text: str) -> str:
        found.extend(match[2] for match in _LINK.finditer(text))
        return text

    _outside_code(markdown, collect)
    targets = (_target(_split(path)[0], source) for path in found)
    return [target for target in targets if target is not None]


def _split(link: str) -> tuple[str, str]:
    path, mark, anchor = link.partition("#")
    return path, mark + anchor


def _outside_code(markdown: str, change: Callable[[str], str]) -> str:
    parts = _CODE.split(markdown)
    return "".join(part if number % 2 else change(part) for number, part in enumerate(parts))

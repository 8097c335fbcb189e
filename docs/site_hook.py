"""
For mkdocs: the README as the home page, files outside `docs/` that pages link to, and the lists of methods.

Links in the Markdown are those of the repository, so that they work there as well. A linked file outside `docs/`
becomes `repository/PATH` of the site.
"""

import os.path
import re
import runpy
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
# by its file, as the package need not be installed; those with classes of this package come first
METHODS = sorted(
    runpy.run_path(str(ROOT / "trl_ext" / "methods" / "__init__.py"))["METHODS"].values(),
    key=lambda method: not method.is_public,
)
CLASSES = re.compile(r"<!-- methods: .*? -->")
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"^ *```.*?^ *```", re.S | re.M)


def site_path(source: Path) -> str:
    """Where a file of the repository is on the site."""
    relative = source.relative_to(ROOT)
    if relative == Path("README.md"):
        return "index.md"
    if relative.parts[0] == "docs":
        return relative.relative_to("docs").as_posix()
    return f"repository/{relative.as_posix()}"


def linked(page: Path) -> list[Path]:
    """Files of the repository that a page links to."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [Path(os.path.normpath(page.parent / match[1])) for match in LINK.finditer(text)]


def on_config(config):
    """Fill the list of methods in the navigation."""
    entry = next(entry for entry in config.nav if "Methods" in entry)
    entry["Methods"] = [{method.label[0].upper() + method.label[1:]: method.page} for method in METHODS]
    return config


def on_files(files, config):
    """Add the README and every linked file that exists, and what these link to."""
    waiting = [ROOT / "README.md", *(Path(file.abs_src_path) for file in files if file.is_documentation_page())]
    seen = set()
    while waiting:
        source = waiting.pop()
        if source in seen or not source.is_file() or not source.is_relative_to(ROOT):
            continue
        seen.add(source)
        if files.get_file_from_path(site_path(source)) is None:
            files.append(File.generated(config, site_path(source), abs_src_path=str(source)))
        if source.suffix == ".md":
            waiting += linked(source)
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links of the repository into links of the site, and list the classes of methods."""
    sections = (
        f"## {method.label}\n\n::: trl_ext.methods.{method.folder}.trainer.{method.classes}Trainer\n"
        f"::: trl_ext.methods.{method.folder}.config.{method.classes}Config"
        for method in METHODS
        if method.is_public
    )
    markdown = CLASSES.sub("\n\n".join(sections), markdown)
    source = Path(page.file.abs_src_path)
    here = os.path.dirname(site_path(source))

    def moved(match: re.Match) -> str:
        target = Path(os.path.normpath(source.parent / match[1]))
        if not target.is_relative_to(ROOT):
            return match[0]
        return f"]({os.path.relpath(site_path(target), here or '.')}{match[2] or ''})"

    return LINK.sub(moved, markdown)

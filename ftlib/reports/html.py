"""Render pages from the jinja2 templates in templates/; run_report.py and sweep_report.py collect what they show.

Every string that a template prints is escaped, except SVG from `charts`. Templates run in jinja2's sandbox and get
plain data, so that a template in a shared folder can neither run code nor read files.
"""

from __future__ import annotations

import errno
import os
import traceback
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, FileSystemLoader, FunctionLoader, StrictUndefined, Template
from jinja2.exceptions import TemplateNotFound, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ftlib.errors import UserError

Context = dict[str, Any]
"""Variables of a template: str, numbers, bool, None, Markup of `charts`, and lists, dicts and Tables of these;
nothing with a method that reads files. docs/reports.md lists them."""

TEMPLATES = Path(__file__).parent / "templates"
_PAGE = "page.html.j2"
"""Cannot be overridden: its content security policy forbids scripts and requests in all other templates."""


def render_page(title: str, body: str | Template, templates: Path | None = None, **context: Any) -> str:
    """Return a page.

    Args:
        body: the template of its content, or its name.
        templates: a folder whose templates replace those of the same name.
        context: variables of `body`, see `Context`.

    Raises:
        UserError: `templates` has a file with an unknown name, or a template with an error.
    """
    environment = make_environment(templates)
    try:
        page = environment.get_template(_PAGE).render(context, title=title, body=body)
    except Exception as error:
        if templates is None:
            raise
        missing = "there is no template " if isinstance(error, TemplateNotFound) else ""
        reason = getattr(error, "message", None) or str(error) or type(error).__name__
        raise UserError(
            f"{_location(error, templates)}: {missing}{reason}",
            "docs/reports.md lists what each template gets, under Templates.",
        ) from error
    return page.encode("utf-8", "replace").decode("utf-8") + "\n"  # answers can contain lone surrogates


def make_environment(templates: Path | None = None) -> Environment:
    """Return an environment that searches templates in the folder `templates`, if given, then in the package.

    Raises:
        UserError: as `render_page`.
    """
    replaced = _read_overrides(templates) if templates else {}

    def load(name: str) -> tuple[str, str, None] | None:
        return (replaced[name], f"{templates}/{name}", None) if name in replaced else None

    return ImmutableSandboxedEnvironment(
        loader=ChoiceLoader([FunctionLoader(load), FileSystemLoader(TEMPLATES)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _read_overrides(folder: Path) -> dict[str, str]:
    """Return name → text. Links are not followed: they could expose a file that only the reader may read."""
    if not folder.is_dir():
        raise UserError(f"--templates {folder}: no such folder")
    known = sorted({path.name for path in TEMPLATES.iterdir()} - {_PAGE})
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.name not in known:
            raise UserError(
                f"{path}: there is no template with this name to replace", f"Use one of: {', '.join(known)}"
            )
        try:
            with open(path, encoding="utf-8", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW)) as file:
                found[path.name] = file.read()
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise UserError(f"{path}: is a symbolic link", "Copy the template into the folder.") from None
    if not found:
        raise UserError(f"{folder}: contains no template", f"Use one of: {', '.join(known)}")
    return found


def _location(error: Exception, folder: Path) -> str:
    """Return file and line of an error, in a template of the folder if one was being rendered."""
    if isinstance(error, TemplateSyntaxError):
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    for place in (folder, TEMPLATES):
        for frame in reversed(frames):
            if Path(frame.filename).parent == place:
                return f"{frame.filename}:{frame.lineno}"
    return str(folder)

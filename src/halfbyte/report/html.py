"""A document as one HTML file: inline style and pictures, no script, nothing fetched."""

from __future__ import annotations

import re
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from halfbyte.report.blocks import Code, Document
from halfbyte.report.text import clean

if TYPE_CHECKING:
    from jinja2 import Environment


# Letters of code that stand on one line of a table's cell.
LONGEST_WHOLE = 36


def to_html(document: Document, svgs: dict[str, str]) -> str:
    """The page; ``svgs`` holds the ``<svg>`` element of each plot by its name."""
    return _template("report.html.jinja").render(document=document, svgs=svgs)


def render_page(template: str, style: str, **values: Any) -> str:
    """A page that is no report: ``template`` filled with ``values``, under the style sheet of its
    own that ``style`` names."""
    from markupsafe import Markup

    sheet = Markup(_source(_environment(), style))
    title = SimpleNamespace(title=values.pop("title"))
    return str(_template(template).render(document=title, style=sheet, **values))


def _template(name: str) -> Any:
    return _environment().get_template(name)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup, escape

    environment = Environment(
        loader=PackageLoader("halfbyte.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else clean(str(value)),
    )

    def drawing(svg: str, alt: str) -> Markup:
        """The plot, which is our own markup, under its text alternative, which is not."""
        opened = f'<svg role="img" aria-label="{escape(clean(alt))}" '
        return Markup(svg.replace("<svg ", opened, 1))

    def breakable(text: str) -> Markup:
        """Code that, where it is long, may be broken after a slash, a dot or an underscore."""
        if len(text) < LONGEST_WHOLE:
            return escape(clean(text))
        return Markup(re.sub(r"([/_.\\])(?=\w)", r"\1<wbr>", str(escape(clean(text)))))

    def ends(text: str) -> Markup:
        """A token's text with its line feeds shown, since they are what the model sees."""
        return Markup(str(escape(clean(text))).replace("\n", '<i class="nl">↵</i>\n'))

    environment.filters["drawing"] = drawing
    environment.filters["ends"] = ends
    environment.filters["breakable"] = breakable
    environment.tests["code"] = lambda value: isinstance(value, Code)
    environment.globals["longest_whole"] = LONGEST_WHOLE
    environment.globals["style"] = Markup(_source(environment, "report.css"))
    return environment


def _source(environment: Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]

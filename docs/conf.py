"""Sphinx configuration: python -m sphinx -W --keep-going -b html docs docs/_build/html."""

from __future__ import annotations

import os
from importlib.metadata import version as installed_version
from typing import Any

from sphinx.util import logging

import neuronlens as nl

project = "neuronlens"
author = "the neuronlens authors"
copyright = f"{author}; Apache License 2.0"
release = version = installed_version("neuronlens-vlm")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
html_theme = "furo"
html_title = f"neuronlens {release}"
html_theme_options = {"navigation_with_keys": True}
html_static_path = ["_static"]
html_css_files = ["neuronlens.css"]
html_copy_source = False

# Docstrings: a name in single backticks is code, and a link if it is a public name.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_attr_annotations = False  # a class's signature has the types already
python_maximum_signature_line_length = 88

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

# Pages with code are executed on every build, each in a folder of its own that is thrown away.
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True
# The kernels inherit these. One thread is enough for a model this small, and far faster than
# several wherever something else runs on the same cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")  # tqdm without ipywidgets

NAMESPACES = {
    "neuronlens.testbed": nl.testbed.__all__,
    "neuronlens.chat": nl.chat.__all__,
    "neuronlens.segment": [name for name in nl.segment.__all__ if name not in nl.__all__],
    "neuronlens.adapters": [name for name in nl.adapters.__all__ if name not in nl.__all__],
    "neuronlens.testing": ["check_adapter", "Checked"],
}


def public_names() -> set[str]:
    """Dotted names that the API pages have to describe."""
    root = {f"neuronlens.{name}" for name in nl.__all__}
    return root | {f"{space}.{name}" for space, names in NAMESPACES.items() for name in names}


def link_public_name(app: Any, env: Any, node: Any, text: Any) -> Any:
    """A link for a public name written alone, or with the module it is defined in."""
    if node.get("refdomain") != "py":
        return None
    name = node["reftarget"].rsplit(".", 1)[-1]
    for full in (f"{space}.{name}" for space in ("neuronlens", *NAMESPACES)):
        if full in public_names():
            return env.get_domain("py").resolve_xref(
                env, node["refdoc"], app.builder, "obj", full, node, text
            )
    return None


def report_missing_names(app: Any, env: Any) -> None:
    """A public name without a place on an API page is a warning, and so an error."""
    described = set(env.get_domain("py").objects)
    for name in sorted(public_names() - described):
        logging.getLogger(__name__).warning("%s is public, but on no API page", name)


def setup(app: Any) -> None:
    """Attach the two checks above."""
    app.connect("missing-reference", link_public_name)
    app.connect("env-check-consistency", report_missing_names)

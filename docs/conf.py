"""How the manual is built: ``make docs``.

The source directory is the repository's root, so that links between README, docs, tutorials and
records are the same here as in the repository. Nothing is fetched and no notebook is run: the
formulas become MathML, the notebooks bring their outputs.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import captum_mllm

project = "captum_mllm"
copyright = "the captum_mllm founders"
release = version = captum_mllm.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_nb",
    "sphinx_copybutton",
    "cli_options",
    "mathml",
    "method_table",
    "names_as_links",
    "public_names",
    "repository_pages",
]

# ---- sources ------------------------------------------------------------------------------------
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "tutorials/*.ipynb",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "captum_mllm/reference/models/*/README.md",
]
exclude_patterns = [
    "docs/studies/weights",
    "**/__pycache__",
    "**/.ipynb_checkpoints",
    ".git",
    ".venv*",
    ".torchvision",
    ".openmoji",
    "build",
    "dist",
    "demo",
    "tests",
    "docs/_ext",
    "docs/_static",
]

# ---- Markdown and notebooks ---------------------------------------------------------------------
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"
nb_mime_priority_overrides = [("html", "image/jpeg", 5), ("html", "image/png", 6)]
suppress_warnings = ["myst.header"]  # cards and records may begin at any level

# ---- API ----------------------------------------------------------------------------------------
default_role = "py:obj"  # single backticks of docstrings are code, and links where there is a page
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # an override that says nothing new has no entry
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autosummary_generate = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Reference", "Controls"]
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
smartquotes_action = "D"  # dashes of parameter lists; quotes stay, as they mark strings

# ---- HTML ---------------------------------------------------------------------------------------
html_theme = "furo"
html_math_renderer = "mathml"
html_title = f"captum_mllm {version}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_show_sourcelink = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
linkcheck_timeout = 20
linkcheck_retries = 2

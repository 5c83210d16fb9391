"""One file to mail: an answer's maps as a self-contained page.

``contents`` gathers what a page shows from results and pictures, ``atlas`` writes maps as grey
pictures of 8 bits, ``provenance`` says where all of it comes from, and ``page`` puts it into
the template. The page's script only shows what is in the page; each value it shows is the result's.
"""

from captum_mllm.report.contents import Contents, contents_of
from captum_mllm.report.page import render_page
from captum_mllm.report.provenance import Provenance, describe

__all__ = ["Contents", "Provenance", "contents_of", "describe", "render_page"]

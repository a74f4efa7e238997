"""nbconvert's settings for README.md: `jupyter nbconvert --config .ci/readme.py --output-dir . nbs/index.ipynb`."""

import re

from nbconvert.preprocessors import Preprocessor


class FrontPage(Preprocessor):
    """Drop hidden cells, unseen code and nbdev's directives, name the language, make links relative to the root."""

    def preprocess(self, nb, resources):
        nb.metadata["language_info"] = {"name": "python"}
        nb.cells = [cell for cell in nb.cells if not re.match(r"#\|\s*hide\b", cell.source)]
        for cell in nb.cells:
            if cell.cell_type == "code":
                cell.metadata["transient"] = {"remove_source": bool(re.match(r"#\|\s*echo: false", cell.source))}
                cell.source = re.sub(r"(?m)^#\|.*\n+", "", cell.source)
            else:
                cell.source = re.sub(r"\]\((?!\w+:|[/#])([^)]+)\)", self._from_root, cell.source)
        return nb, resources

    def _from_root(self, link):
        return f"]({link[1].removeprefix('../')})" if link[1].startswith("../") else f"](nbs/{link[1]})"


c = get_config()  # noqa: F821 (nbconvert defines it)
c.NbConvertApp.export_format = "markdown"
c.NbConvertApp.output_base = "README"
c.MarkdownExporter.preprocessors = [FrontPage]

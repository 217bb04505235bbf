"""What goes into the wheel; everything else about the distribution is declared in pyproject.toml.

The packages are listed, not searched for: `attnstats.kernels` is the folder kernels/ seen through the symlink
attnstats/kernels. It has no `__init__.py`, because a package `kernels` at the root would hide Hugging Face's
package of that name, which transformers imports. tests/test_packaging.py fails when a module is missing here.
"""

from setuptools import setup

setup(
    packages=["attnstats", "attnstats.kernels", "attnstats.report"],
    package_data={"attnstats": ["py.typed"], "attnstats.report": ["*.jinja", "*.css"]},
)

"""Everything that turns the notebooks into the PDF and the ZIP; see ``make.py``."""

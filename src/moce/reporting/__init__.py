"""Run folders as one self-contained HTML page. Imported only by `moce report`: it needs matplotlib."""

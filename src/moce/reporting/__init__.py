"""Run folders as one self-contained HTML page. Only results_table is used outside of `moce report`."""

"""The parts of reports: HTML pages in one file without external resources, plots in their colours, Markdown."""

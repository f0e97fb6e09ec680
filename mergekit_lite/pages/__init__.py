"""The parts of HTML reports: pages in one file without external resources, and plots in their colours."""
